"""The one base class of VQ models: encode, decode, forward, embed_codes (docs/design.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, initialization

from vqtok.codes import CodeLayout, check_range
from vqtok.configuration import VQConfig
from vqtok.files import read_json
from vqtok.fingerprint import fingerprint
from vqtok.hub.folders import fetch_folder
from vqtok.hub.publish import PublishedModel
from vqtok.hub.weights import MODEL_FILES, require_safetensors, weight_shapes
from vqtok.layers import initialise_convolution
from vqtok.outputs import QuantizerOutput, VQDecoderOutput, VQEncoderOutput, VQModelOutput
from vqtok.quantizers import Hierarchy, full_precision, mean_losses

# Of a tokenizer that is made from a recipe: 32 GiB in fp32, far beyond any that was ever published.
MAX_NUMBERS = 1 << 33


class CheckedModel(PublishedModel):
    """A model of transformers that is published, and loaded, with checks of what a file says."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):  # type: ignore[no-untyped-def]
        """As transformers does, but safetensors only, and every weight must be there and fit.

        Raises:
            OSError: the folder or repository has no safetensors.
            ValueError: the file is damaged, or weights are missing from it, unknown, or of another shape than the config says;
                they are named.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]


class VQPreTrainedModel(CheckedModel, PreTrainedModel):
    """What every room's model promises.

    - *Same codes, same media.* In eval, `forward` decodes the codes of `encode`; `quantized` is the table row itself.
    - *Codes belong to the sample.* A sample alone, in any batch and with any padding has latents that agree to 1e-5 of their
      spread, and codes that agree but for near-ties below that bound.
    - *Precision.* Codebooks stay fp32; `encode` runs in the dtype of the weights without autocast and with TF32 off.
    - *`encode` never changes state.* In train mode `forward` only accumulates; `update_codebooks()` applies it.
    - *Fingerprint.* The code space is hashed from encoder, quantizer and preprocessing; entering train mode with anything of
      these trainable forgets it, because codes may change from then on.

    A room supplies the submodules `encoder`, `quantizer` and `decoder` and the hooks `extract`, `propose`, `synthesise` and
    `reconstruction_losses`. Only `encoder` and `quantizer` decide codes: the decoder may be fine-tuned freely.
    """

    config: VQConfig
    base_model_prefix = "vqtok"
    # Patterns of parameter names. Not the whole quantizer: transformers would make integers and bools float32 as well.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012 (the name and form it reads)
        f"quantizer.*{name}"
        for name in (
            *("embedding", "counts", "project_in", "project_out", "frozen_codes"),
            *("code_map", "code_bias", "logit", "smoothings"),
        )
    ]
    encoder: nn.Module
    quantizer: Hierarchy
    decoder: nn.Module

    # -- what a room supplies

    def extract(self, media: Tensor, sizes: Tensor | None = None) -> Any:
        """Features of checked media, as `propose` wants them; `sizes` are checked ones of media padded to each other, or None."""
        raise NotImplementedError

    def propose(self, features: Any, level: int, quantized: Sequence[Tensor]) -> Tensor:
        """Channel-last latents of `level`, given the quantized latents of the coarser levels."""
        raise NotImplementedError

    def synthesise(
        self, quantized: Sequence[Tensor], keep: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Media from a prefix of levels of channel-last quantized latents.

        Args:
            keep: int64 `(B,)`, how many levels of each sample to use; None for all that are given.
            sizes: checked sizes of samples padded to each other, or None.
        """
        raise NotImplementedError

    def seen_by_decoder(self, fields: dict[str, Any]) -> Sequence[Tensor]:
        """What a training pass decodes, of the fields of its output: the quantized latents, unless a room knows better."""
        return fields["quantized"]

    def reconstruction_losses(self, reconstruction: Tensor, media: Tensor) -> dict[str, Tensor]:
        """Terms that compare the reconstruction with the input, by name, before their weights."""
        raise NotImplementedError

    def check_sizes(self, sizes: Tensor, batch: int, grid: Sequence[int]) -> Tensor:
        """Refuse sizes `(B, ndim)` that do not fit a batch whose coarsest grid is `grid`; here all of them."""
        raise ValueError(f"{type(self).__name__} takes samples of one padded size, without sizes: group them by it")

    def check_media(self, media: Tensor) -> Tensor:
        """Refuse input of a wrong shape or dtype with a sentence that names it; return it in the dtype of the weights."""
        raise NotImplementedError

    # -- the contract

    @property
    def layout(self) -> CodeLayout:
        """The static shape of the codes."""
        return self.config.layout

    @torch.no_grad()
    def encode(self, media: Tensor, sizes: Tensor | None = None) -> VQEncoderOutput:
        """Codes of a batch. Never changes state, also in train mode.

        Args:
            media: as `forward` takes them.
            sizes: int64 `(B, ndim)`, the size of each sample where samples of different size were padded to each other, in rooms
                that allow it; the codes of a sample are then those it has alone, and beyond its own grid they mean nothing.

        Returns:
            `codes`, `latents`, `quantized`: tuples over levels, coarse to fine.
        """
        media = self.check_media(media)
        if sizes is not None:
            sizes = self.check_sizes(
                sizes, len(media), [n // self.layout.stride for n in media.shape[-self.layout.ndim :]]
            )
        with full_precision(media.device.type):
            features = self.extract(media, sizes)
            levels = self.quantizer.encode(lambda level, quantized: self.propose(features, level, quantized))
        return VQEncoderOutput(**_by_field(levels))

    def decode(self, codes: Sequence[Tensor], sizes: Tensor | None = None) -> VQDecoderOutput:
        """Media of codes: a tuple over levels, each int64 `(B, Q, *grid)`; fewer levels than the layout's are a prefix.

        Args:
            sizes: as `encode` takes them.

        Raises:
            ValueError: codes out of range, of a wrong dtype, or of shapes that the layout does not have.
        """
        quantized = self.embed_codes(codes)
        if sizes is not None:
            sizes = self.check_sizes(sizes, len(codes[0]), codes[0].shape[2:])
        return VQDecoderOutput(reconstruction=self.synthesise(quantized, sizes=sizes))

    def encode_long(self, media: Tensor) -> tuple[Tensor, ...]:
        """The codes of `encode`, in memory that does not grow with the media in rooms that can take them in parts."""
        return self.encode(media).codes

    def decode_long(self, codes: Sequence[Tensor]) -> Tensor:
        """The media of `decode`, with working memory that does not grow with them in rooms that can take them in parts."""
        return self.decode(codes).reconstruction

    def embed_codes(self, codes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The quantized latents of codes: each `(B, Q, *grid)` -> `(B, *grid, D)`."""
        self._check_codes(codes)
        return self.quantizer.embed_codes(codes)

    def forward(self, media: Tensor) -> VQModelOutput:
        """Reconstruct a batch; in training also the losses' gradients and the statistics for `update_codebooks`.

        Returns:
            `loss` and its unweighted terms `losses`, `reconstruction`, `codes`, `latents`, `quantized`.
        """
        media = self.check_media(media)
        if not self.training:
            encoded = self.encode(media)
            fields = {name: encoded[name] for name in ("codes", "latents", "quantized")}
            reconstruction = self.decode(encoded.codes).reconstruction
            losses: dict[str, Tensor] = {}
            quantizer_loss: Tensor | float = 0.0
        else:
            features = self.extract(media)
            levels = self.quantizer(lambda level, quantized: self.propose(features, level, quantized))
            fields = _by_field(levels)
            reconstruction = self.synthesise(self.seen_by_decoder(fields), self._kept_levels(media))
            quantizer_losses = mean_losses(levels)
            losses, quantizer_loss = quantizer_losses["losses"], quantizer_losses["loss"]
        own = self.reconstruction_losses(reconstruction, media)
        loss = sum(value * self._loss_weight(name) for name, value in own.items()) + quantizer_loss
        losses = {**own, **losses}
        return VQModelOutput(loss=loss, reconstruction=reconstruction, losses=losses, **fields)

    def init_codebooks(self, batches: Iterable[Tensor], max_latents: int | None = None) -> None:
        """Start every codebook from the latents of `batches`, coarse to fine; call it once, before the first step.

        The latents of all processes are joined, of each at most `max_latents`: None takes 65,536, or 16 per code of the largest
        codebook where that is more, and of a codebook of the commonest latents four times as many. A level is initialised before
        the finer ones see its codes.
        """
        if max_latents is None:
            max_latents = max(config.start_latents for config in self.quantizer.level_configs)
        batches = list(batches)
        if not batches:
            raise ValueError("init_codebooks needs at least one batch")
        self.quantizer.initialise(lambda: map(self._proposal, batches), max_latents)
        self.config.fingerprint = None

    def update_codebooks(self) -> None:
        """Apply what training passes accumulated: one collective, the EMA, the revival. Call it after `optimizer.step()`."""
        self.quantizer.update()

    def freeze_codes(self) -> None:
        """Keep the code space: encoder and quantizer stop learning, so that only the decoder is fine-tuned."""
        self.encoder.requires_grad_(False)
        self.quantizer.freeze()

    def code_fingerprint(self, preprocessing: dict[str, Any]) -> str:
        """The fingerprint of encoder, quantizer tables and `preprocessing` as they are now (see `vqtok.fingerprint`)."""
        state = self.state_dict()
        bookkeeping = (".counts", ".updates", ".initialised")
        tensors = {
            name: value
            for name, value in state.items()
            if name.startswith(("encoder.", "quantizer.")) and not name.endswith(bookkeeping)
        }
        return fingerprint({**self.config.code_fields, "preprocessing": preprocessing}, tensors)

    def train(self, mode: bool = True) -> VQPreTrainedModel:
        parameters = (*self.encoder.parameters(), *self.quantizer.parameters())
        moving = self.quantizer.codebooks  # the table of an EMA codebook is no parameter, and moves all the same
        if mode and (any(p.requires_grad for p in parameters) or not all(codebook.frozen for codebook in moving)):
            self.config.fingerprint = None
        return super().train(mode)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' default is normal(0, 0.02) for every layer, far below what convolutions without norms need. It visits
        # children before parents, and patches torch.nn.init while it loads, so that values from the file stay.
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d):
            initialise_convolution(module)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _kept_levels(self, media: Tensor) -> Tensor | None:
        dropout = getattr(self.config, "level_dropout", 0.0)
        num_levels = len(self.layout.levels)
        if num_levels == 1:
            return None
        # Also without dropout, so that the null vectors are part of every training pass: DDP waits for all parameters.
        batch = media.shape[0]
        dropped = torch.rand(batch) < dropout
        kept = torch.where(dropped, torch.randint(1, num_levels, (batch,)), num_levels)
        return kept.to(media.device)

    def _loss_weight(self, name: str) -> float:
        return getattr(self.config, name.removesuffix("_loss") + "_weight", 1.0)

    @torch.no_grad()
    def _proposal(self, media: Tensor) -> Callable[[int, Sequence[Tensor]], Tensor]:
        """The latents of a batch as the quantizer asks for them."""
        media = self.check_media(media)
        with full_precision(media.device.type):
            features = self.extract(media)

        def propose(level: int, quantized: Sequence[Tensor]) -> Tensor:
            with full_precision(media.device.type):
                return self.propose(features, level, quantized)

        return propose

    def _check_codes(self, codes: Sequence[Tensor]) -> None:
        levels = self.layout.levels
        if not isinstance(codes, Sequence) or not all(isinstance(value, Tensor) for value in codes):
            raise ValueError(
                f"codes are a tuple of int64 tensors, one per level, coarse to fine, got {type(codes).__name__}; "
                "of a `Codes` give its levels"
            )
        if not 1 <= len(codes) <= len(levels):
            raise ValueError(f"codes must have 1 to {len(levels)} levels, coarse to fine, got {len(codes)}")
        for index, (value, level) in enumerate(zip(codes, levels, strict=False)):
            if (
                value.dtype != torch.int64
                or value.ndim != 2 + self.layout.ndim
                or not 1 <= value.shape[1] <= level.num_codebooks
                or 0 in value.shape[2:]
            ):
                raise ValueError(
                    f"level {index}: codes must be int64 (B, 1<=Q<={level.num_codebooks}, *grid), got {value.dtype} {tuple(value.shape)}"
                )
            ratio = levels[0].stride // level.stride
            wanted = (codes[0].shape[0], *(n * ratio for n in codes[0].shape[2:]))
            if (value.shape[0], *value.shape[2:]) != wanted:
                raise ValueError(
                    f"level {index}: batch and grid must be {wanted}, as level 0 says, got {tuple(value.shape)}"
                )
            check_range(value, level.codebook_size, f"level {index}")


def load_checked(from_pretrained: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """What `from_pretrained` of transformers loads, but safetensors only, and every weight must be there and fit.

    The headers of the files are compared with the config before anything is allocated: a small file cannot ask for a large model.
    With `may_hold_more` the files may hold weights that the model does not have.

    Raises:
        OSError: the folder or repository has no safetensors, or cannot be read.
        ValueError: the file is damaged, or weights are missing from it, unknown, or of another shape than the config says; they
            are named.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    extra = kwargs.pop("may_hold_more", False)
    name, plain = source, source is not None and not kwargs.get("variant") and not kwargs.get("gguf_file")
    try:
        if plain:
            names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
            hub = {key: value for key in names if (value := kwargs.pop(key, None)) is not None}
            hub["revision"] = kwargs.pop("_commit_hash", None) or hub.get("revision")
            source, _ = fetch_folder(source, MODEL_FILES, **hub)
            require_safetensors(source)
            model_class: Any = getattr(from_pretrained, "__self__", None)
            config = kwargs.get("config")
            config = (
                config if isinstance(config, PreTrainedConfig) else model_class.config_class.from_pretrained(source)
            )
            check_shapes(model_class, config, weight_shapes(source), source)
            _check_generation_config(source)
        # Mismatches are not ignored, they are collected: transformers' own error does not name them.
        ours = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model, info = from_pretrained(source, *args, **{**kwargs, **ours})
    except SafetensorError as error:
        raise ValueError(
            f"{source}: the weights file is truncated or damaged ({error}): save or download it again"
        ) from error
    except (
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # what transformers' loader makes of fields that nobody checks
        raise ValueError(
            f"{source}: the config makes no sense to transformers ({type(error).__name__}: {error})"
        ) from error
    kinds = ("missing_keys", "mismatched_keys", *(() if extra else ("unexpected_keys",)))
    _refuse(source, {key: sorted(map(str, info[key])) for key in kinds})
    model.config.name_or_path = str(name)
    return (model, info) if wants_info else model


def count_on_meta(model_class: Any, config: Any) -> tuple[int, dict[str, tuple[int, ...]]]:
    """How many numbers a model of `config` stores, and the shape of each tensor by name. Nothing is allocated.

    Raises:
        ValueError: no model can be built from the config.
    """
    try:
        with initialization.no_init_weights(), initialization.meta_device_safe_creation_ops(), torch.device("meta"):
            model = model_class(config)
            model.tie_weights()  # where nothing is initialised, nothing is tied
            state = model.state_dict(keep_vars=True)
    except (ValueError, ImportError):
        raise
    except Exception as error:  # backbones of transformers raise whatever wrong values lead to
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"no {model_class.__name__} can be built from this config ({reason}): mend it") from error
    total = sum(value.numel() for value in {id(value): value for value in state.values()}.values())
    return total, {key: tuple(value.shape) for key, value in state.items()}


def check_size(model_class: Any, config: Any) -> None:
    """Refuse to make a model anew that is larger than any machine should try.

    Raises:
        ValueError: it stores more than `MAX_NUMBERS`, or cannot be built.
    """
    total, _ = count_on_meta(model_class, config)
    if total > MAX_NUMBERS:
        raise ValueError(
            f"a {model_class.__name__} of this config stores {total:,} numbers, more than {MAX_NUMBERS:,}: make it smaller"
        )


def check_shapes(
    model_class: Any, config: Any, held: dict[str, tuple[int, ...]], source: Any, unused: tuple[str, ...] = ()
) -> None:
    """Refuse what does not fit, or what asks for more than the file holds, before anything is allocated.

    Names alone decide nothing here: transformers renames and joins tensors of some backbones while it loads.

    Args:
        held: shapes that the files hold (see `weight_shapes`).
        unused: how names begin of what the files may lack.

    Raises:
        ValueError: naming `source` and the tensors.
    """
    text = config.get_text_config()
    layers = max(getattr(text, name, None) or 0 for name in ("num_hidden_layers", "encoder_layers", "decoder_layers"))
    if layers > len(held):  # each would have a tensor at least; building so many would take minutes
        raise ValueError(
            f"{source}: the weights do not fit the config: {layers} layers, and the file holds {len(held)} tensors"
        )
    needed, wanted = count_on_meta(model_class, config)
    wrong = [f"{key} {held[key]} instead of {shape}" for key, shape in wanted.items() if held.get(key, shape) != shape]
    missing, unknown = sorted(wanted.keys() - held.keys()), sorted(held.keys() - wanted.keys())
    needed -= sum(math.prod(shape) for key, shape in wanted.items() if key.startswith(unused) and key not in held)
    if wrong or needed > sum(math.prod(shape) for shape in held.values()):
        _refuse(source, {"missing_keys": missing, "mismatched_keys": wrong, "unexpected_keys": unknown})


def _check_generation_config(folder: Path) -> None:
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    read_json(path)
    try:
        GenerationConfig.from_pretrained(folder)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} makes no sense ({error}): save it again") from error


def _refuse(source: Any, problems: dict[str, list[str]]) -> None:
    if shown := {kind: names[:5] for kind, names in problems.items() if names}:
        raise ValueError(f"{source}: the weights do not fit the config: {shown}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block. `model.train()` is not used to go back, because it forgets the fingerprint."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _by_field(levels: Sequence[QuantizerOutput]) -> dict[str, tuple[Tensor, ...]]:
    return {name: tuple(getattr(level, name) for level in levels) for name in ("codes", "latents", "quantized")}
