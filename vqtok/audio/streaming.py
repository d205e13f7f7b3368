"""Sound that is encoded and decoded as it arrives, with causal models.

Every layer remembers the last steps of its input, and nothing is computed twice. For other models, and for files, there are chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqtok.layers import StreamState
from vqtok.quantizers import full_precision

from .modeling_audio_vq import AudioVQModel


class StreamingEncoder:
    """Codes of sound as it arrives, the same as of the whole (but for near-ties, as latents differ by rounding).

    Args:
        model: a causal one, in eval mode.

    Raises:
        ValueError: the model is not causal.

    Example:
        >>> from vqtok.audio import AudioVQConfig
        >>> model = AudioVQModel(AudioVQConfig(hidden_sizes=[8, 8, 16], latent_size=8, causal=True)).eval()
        >>> encoder = StreamingEncoder(model)
        >>> codes = [encoder.push(torch.zeros(1, 1, 1280))[0] for _ in range(2)]  # 80 ms each
        >>> [tuple(part.shape) for part in codes], encoder.num_samples
        ([(1, 4, 4), (1, 4, 4)], 2560)
    """

    def __init__(self, model: AudioVQModel):
        _require_causal(model)
        self.model = model
        self.num_samples = 0
        self._state: StreamState = {}
        self._rest: Tensor | None = None

    @torch.no_grad()
    def push(self, sound: Tensor) -> tuple[Tensor, ...]:
        """The codes that these samples complete, a tuple over levels, int64 `(B, Q, t)`; t may be 0.

        Args:
            sound: float `(B, C, n)` with any n, the same B each time.
        """
        channels, stride = self.model.config.num_channels, self.model.layout.stride
        batch = None if self._rest is None else len(self._rest)
        if sound.ndim != 3 or sound.shape[1] != channels or batch not in (None, len(sound)):
            raise ValueError(f"a chunk must be (B, {channels}, n) with B as before, got {tuple(sound.shape)}")
        self.num_samples += sound.shape[2]
        if self._rest is not None:
            sound = torch.cat([self._rest, sound], -1)
        whole = sound.shape[2] // stride * stride
        self._rest = sound[..., whole:].clone()
        if not whole:
            levels = self.model.layout.levels
            return tuple(torch.zeros((len(sound), each.num_codebooks, 0), dtype=torch.int64) for each in levels)
        return self._encode(sound[..., :whole])

    def flush(self) -> tuple[Tensor, ...]:
        """The codes of what is left at the end, padded with silence as the feature extractor does; then it starts anew."""
        assert self._rest is not None, "nothing was pushed"
        rest = self._rest
        padded = torch.nn.functional.pad(rest, (0, -rest.shape[2] % self.model.layout.stride))
        self._rest = rest[..., :0]
        codes = self.push(padded)
        self.num_samples, self._state, self._rest = 0, {}, None
        return codes

    def _encode(self, sound: Tensor) -> tuple[Tensor, ...]:
        return tuple(out.codes for out in self.outputs(sound))

    def outputs(self, sound: Tensor):  # type: ignore[no-untyped-def]
        """The `QuantizerOutput` of each level for a chunk of whole steps."""
        media = self.model.check_media(sound.to(self.model.device))
        with full_precision(media.device.type):
            features = self.model.extract(media, None, self._state)
            return self.model.quantizer.encode(lambda level, quantized: self.model.propose(features, level, quantized))


class StreamingDecoder:
    """Sound of codes as they arrive, the same as of the whole to rounding.

    Args:
        model: a causal one, in eval mode.

    Raises:
        ValueError: the model is not causal.
    """

    def __init__(self, model: AudioVQModel):
        _require_causal(model)
        self.model = model
        self._state: StreamState = {}

    @torch.no_grad()
    def push(self, codes: Sequence[Tensor]) -> Tensor:
        """The samples of these codes, float `(B, C, t * stride)`.

        Args:
            codes: as `model.decode` takes them, of one step of the coarsest level or more, the same number of levels each time.
        """
        quantized = self.model.embed_codes([value.to(self.model.device) for value in codes])
        return self.model.synthesise(quantized, state=self._state)


def _require_causal(model: AudioVQModel) -> None:
    if not model.config.causal:
        raise ValueError(
            "this model is not causal, it sees what comes later: encode in chunks, or train one with causal=true"
        )
