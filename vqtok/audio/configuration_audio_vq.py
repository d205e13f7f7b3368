"""Configuration of the audio tokenizer."""
# No `from __future__ import annotations` in config files: `strict` reads the annotations and lets strings pass unchecked.

import math
from dataclasses import field
from itertools import accumulate
from operator import mul
from typing import Any

from huggingface_hub.dataclasses import strict

from vqtok.codes import CodeLayout
from vqtok.configuration import VQConfig, require
from vqtok.quantizers import QuantizerConfig, check_hierarchy, quantizer_config


@strict
class AudioVQConfig(VQConfig):
    """Configuration of `AudioVQModel`: convolutions on the waveform, and codes at one rate or at several.

    One stride with a quantizer of type "residual" is a codec like SoundStream, EnCodec or DAC; with "vector" or "fsq" it has one
    large codebook; with "multi_rate" it is like SNAC. Several strides make a VQ-VAE-2 of sound, as in Jukebox, whose finer levels
    know the coarser ones.

    Args:
        sampling_rate: samples per second that the model is for.
        num_channels: 1 (mono) or 2 (stereo, coded together).
        downsampling_ratios: samples per step that each stage of the encoder takes together, as sound flows. A first ratio of 1 is
            a convolution at the full rate (as in DAC; dear), a larger one takes that many samples into one step at once.
        strides: samples per latent of each level, coarse to fine; products of the first ratios, the largest of all of them.
        quantizer: how latents become codes: a dict with the key `type` (see `vqtok.quantizers.quantizer_config`), or a list of
            them, one per stride. One dict stands for every stride. "multi_rate" takes one stride and makes several levels.
        hidden_sizes: channels of each stage, as many as ratios.
        decoder_hidden_sizes: channels of the decoder's stages in the same order; None: those of the encoder.
        latent_size: width of the latents.
        kernel_size: of convolutions at the full rate and of the decoder's first, odd.
        residual_kernel_size: of the convolutions in residual units, odd.
        dilations: one residual unit of each stage for every number.
        compress: channels of a stage per channel inside its residual units.
        activation: "snake" (DAC) or "elu" (EnCodec, quicker on a CPU).
        encoder_front: the encoder's first stage, "convolution", or "stft": features of spectra, one frame every first ratio.
        decoder_head: the decoder's last stage, "convolution", or "istft": spectra that are transformed back (Vocos), so that
            nothing is computed at the rate of samples. Quick, and quick to train.
        spectral_window: samples of the frames of both, a multiple of the first ratio, and at least three of them.
        causal: no latent and no output depends on what comes later, so that sound can be encoded and decoded as it arrives.
        level_dropout: chance that a training sample is decoded from a prefix of its levels, so that every prefix decodes.
        reconstruction_weight: of the mean absolute difference of the waveforms.
        mel_weight: of the distance of log-mel spectrograms (see `vqtok.audio.losses`).
        stft_weight: of the spectral convergence and log-magnitude distance.
        loss_windows: samples of the windows of these spectrograms.
        loss_floor: amplitudes in them that count as silence; a higher one spends nothing on what nobody hears, and learns faster.

    Example:
        >>> layer = {"type": "vector", "codebook_size": 1024}
        >>> residual = {"type": "residual", "num_codebooks": 12, "layer": layer}
        >>> config = AudioVQConfig(sampling_rate=16_000, strides=[320], quantizer=residual)
        >>> config.layout.grids((16_000,)), config.kbps()
        (((50,),), 6.0)
        >>> config.kbps(num_codebooks=3)
        1.5
    """

    model_type = "vqtok_audio"

    sampling_rate: int = 16_000
    num_channels: int = 1
    downsampling_ratios: list[int] | tuple[int, ...] = (8, 5, 8)
    strides: list[int] | tuple[int, ...] = (320,)
    quantizer: dict[str, Any] | list[dict[str, Any]] | tuple[dict[str, Any], ...] = field(
        default_factory=lambda: {"type": "residual", "num_codebooks": 4, "layer": {"type": "vector"}}
    )
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128)
    decoder_hidden_sizes: list[int] | tuple[int, ...] | None = None
    latent_size: int = 64
    kernel_size: int = 7
    residual_kernel_size: int = 7
    dilations: list[int] | tuple[int, ...] = (1, 3, 9)
    compress: int = 1
    activation: str = "snake"
    encoder_front: str = "convolution"
    decoder_head: str = "convolution"
    spectral_window: int = 640
    causal: bool = False
    level_dropout: float | int = 0.1
    reconstruction_weight: float | int = 1.0
    mel_weight: float | int = 1.0
    stft_weight: float | int = 0.0
    loss_windows: list[int] | tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)
    loss_floor: float = 1e-5

    def check_ranges(self) -> None:
        """Refuse values that no model can be built from, before anything is allocated."""
        require(1 <= self.sampling_rate <= 1_000_000, self, "sampling_rate", "from 1 to 1000000 Hz")
        require(self.num_channels in (1, 2), self, "num_channels", "1 (mono) or 2 (stereo)")
        ratios = self.downsampling_ratios
        spectral = self.encoder_front == "stft" and self.decoder_head == "istft"
        fits = 1 <= len(ratios) <= 12 and 1 <= ratios[0] <= (1024 if spectral else 64)
        fits = fits and all(2 <= ratio <= 64 for ratio in ratios[1:])
        wanted = "1 to 12 ratios from 2 to 64, the first perhaps 1, or up to 1024 with both encoder_front and decoder_head of spectra"
        require(fits, self, "downsampling_ratios", wanted)
        products = list(accumulate(ratios, mul))
        require(1 <= len(self.strides) <= 6, self, "strides", "a list of 1 to 6 strides")
        fits = list(self.strides) == sorted(set(self.strides) & set(products), reverse=True)
        require(
            fits and self.strides[0] == products[-1], self, "strides", f"chosen from {products[::-1]}, coarse to fine, the first included"
        )  # fmt: skip
        require(self.strides[0] > 1, self, "downsampling_ratios", "ratios whose product is above 1")
        for name in ("hidden_sizes", "decoder_hidden_sizes"):
            sizes = getattr(self, name)
            wanted = f"{len(ratios)} numbers from 1 to 4096, one per ratio"
            fits = sizes is None or (len(sizes) == len(ratios) and all(1 <= size <= 4096 for size in sizes))
            require(fits, self, name, wanted)
        require(1 <= self.latent_size <= 4096, self, "latent_size", "from 1 to 4096")
        given = len(self.quantizer) if isinstance(self.quantizer, list) else len(self.strides)
        require(
            given == len(self.strides), self, "quantizer", f"one dict, or {len(self.strides)} of them, one per stride"
        )
        check_hierarchy(self.quantizers, self.latent_size, ndim=1)
        self.layout  # noqa: B018 (it refuses what does not nest)
        for name in ("kernel_size", "residual_kernel_size"):
            value = getattr(self, name)
            require(1 <= value <= 99 and value % 2 == 1, self, name, "odd, from 1 to 99")
        fits = len(self.dilations) <= 16 and all(1 <= dilation <= 1024 for dilation in self.dilations)
        require(fits, self, "dilations", "at most 16 numbers from 1 to 1024")
        require(1 <= self.compress <= 16, self, "compress", "from 1 to 16")
        require(self.activation in ("snake", "elu"), self, "activation", "'snake' or 'elu'")
        self._check_spectra()
        self._check_losses()

    def _check_spectra(self) -> None:
        require(self.encoder_front in ("convolution", "stft"), self, "encoder_front", "'convolution' or 'stft'")
        require(self.decoder_head in ("convolution", "istft"), self, "decoder_head", "'convolution' or 'istft'")
        if self.encoder_front == self.decoder_head == "convolution":
            return
        window, hop = self.spectral_window, self.downsampling_ratios[0]
        require(
            window % hop == 0 and window % 2 == 0 and 3 * hop <= window <= 16_384, self, "spectral_window",
            f"an even multiple of the first ratio {hop}, from 3 times to 16384",
        )  # fmt: skip

    def _check_losses(self) -> None:
        require(0 <= self.level_dropout <= 1, self, "level_dropout", "a probability in [0, 1]")
        for name in ("reconstruction_weight", "mel_weight", "stft_weight"):
            require(0 <= getattr(self, name) < math.inf, self, name, "at least 0")
        fits = 1 <= len(self.loss_windows) <= 12 and all(32 <= w <= 16_384 and w % 4 == 0 for w in self.loss_windows)
        require(fits, self, "loss_windows", "1 to 12 numbers of samples from 32 to 16384, multiples of 4")
        require(0 < self.loss_floor <= 0.1, self, "loss_floor", "above 0, at most 0.1")

    @property
    def quantizers(self) -> list[QuantizerConfig]:
        """The typed configuration of each stride's quantizer."""
        values = self.quantizer if isinstance(self.quantizer, list) else [self.quantizer] * len(self.strides)
        return [quantizer_config(each) for each in values]

    @property
    def layout(self) -> CodeLayout:
        """The shape of the codes."""
        pairs = zip(self.strides, self.quantizers, strict=True)
        return CodeLayout(1, tuple(level for stride, config in pairs for level in config.levels(stride)))

    def kbps(self, num_codebooks: int | None = None, num_levels: int | None = None) -> float:
        """Kilobits per second of the codes: log2(codebook_size) bits each, without padding and header.

        Args:
            num_codebooks: of each level; None for all.
            num_levels: of the coarsest; None for all.
        """
        bits = sum(
            level.bits / level.num_codebooks * min(level.num_codebooks, num_codebooks or level.num_codebooks) / level.stride
            for level in self.layout.levels[:num_levels]
        )  # fmt: skip
        return bits * self.sampling_rate / 1000

    @property
    def code_fields(self) -> dict[str, Any]:
        """The fields that decide codes, for the fingerprint. Losses, dropout and what only concerns the decoder do not."""
        names = ("model_type", "sampling_rate", "num_channels", "downsampling_ratios", "strides", "hidden_sizes")
        names += ("latent_size", "kernel_size", "residual_kernel_size", "dilations", "compress", "activation", "causal")
        if self.encoder_front != "convolution":  # codecs without it keep the fingerprints they have
            names += ("encoder_front", "spectral_window")
        quantizers = [config.code_fields for config in self.quantizers]
        return {**{name: getattr(self, name) for name in names}, "quantizers": quantizers}
