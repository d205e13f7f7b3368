"""`VQTokenizer`: media to codes and back, of any modality.

Nothing here knows how a picture becomes a tensor or a tensor codes: that is the processor's and the model's business. Here is
what lies around them: where the files come from, batches, the order of results, the fingerprint.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqtok.codes import CodeLayout, Codes
from vqtok.fingerprint import check_fingerprint, fingerprint, stamp
from vqtok.hub.folders import config_folder, fetch_folder, replace_files
from vqtok.hub.publish import PublishedFacade
from vqtok.modeling import VQPreTrainedModel, check_size, evaluating

from .batches import default_batch_size, group_by_shape
from .rooms import FILES, ROOMS, WRAPPED, bits_per_unit, load_config, load_model, load_processor, quiet, room_of
from .wrapped import card_facts, check_pushable, describe, open_wrapped, write_wrapped


class VQTokenizer(PublishedFacade):
    """Media to codes and back: a model and its processor.

    Args:
        model: `ImageVQModel` or another `VQPreTrainedModel`.
        processor: the one that belongs to it.

    Attributes:
        model: keeps the encode/decode contract on tensors.
        processor: turns media into tensors and back.
        layout: the static shape of the codes.
        fingerprint: the code space; None while it was never saved, or since it began to train.

    Raises:
        ValueError: model and processor do not belong together.

    Example:
        >>> from PIL import Image
        >>> config = ImageVQConfig(strides=[8, 4], hidden_size=16, residual_size=8, latent_size=4)
        >>> tok = VQTokenizer(ImageVQModel(config), ImageVQImageProcessor(stride=8))
        >>> codes = tok.encode([Image.new("RGB", (30, 21)), Image.new("RGB", (16, 16))])
        >>> [tuple(level.shape) for level in codes.levels]
        [(2, 1, 3, 4), (2, 1, 6, 8)]
        >>> [image.size for image in tok.decode(codes)]
        [(30, 21), (16, 16)]
    """

    def __init__(self, model: VQPreTrainedModel, processor: Any) -> None:
        room = ROOMS.get(model.config.model_type)
        if room is None or not isinstance(processor, room.processor):
            raise ValueError(f"{type(model).__name__} and {type(processor).__name__} do not make a tokenizer together")
        if processor.stride % model.layout.stride:
            raise ValueError(
                f"the processor pads to multiples of {processor.stride}, the model needs multiples of {model.layout.stride}: "
                "set stride in preprocessor_config.json to the largest stride of config.json"
            )
        for name in ("num_channels", "sampling_rate", "vocab_size"):
            wanted = getattr(model.config, name, None)
            if wanted is not None and wanted != getattr(processor, name):
                raise ValueError(
                    f"the processor gives {name} {getattr(processor, name)}, the model takes {wanted}: make them equal in "
                    "preprocessor_config.json and config.json"
                )
        self.model, self.processor = model, processor
        self._room = room
        self._origin: dict[str, Any] | None = None  # where to load it from again, while it is unchanged
        self._origin_stamp: Any = None
        self._digest: tuple[Any, str] | None = None
        self._source: dict[str, str] | None = None

    # -- from files and to files

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> VQTokenizer:
        """The tokenizer of a folder or of a repository on the Hub, in eval mode. No code and no pickle is ever loaded.

        Args:
            id_or_folder: a folder that `save_pretrained` wrote, or "owner/name" on the Hub; or a published codec of transformers: EnCodec,
                DAC, Mimi or X-Codec.
            device: where the model goes; None means the CPU.
            dtype: of the weights; None means float32, in which codes are reproducible. Codebooks are always float32.
            revision: branch, tag or commit on the Hub.
            token, cache_dir, local_files_only: as everywhere in huggingface_hub.
            subfolder: where in the folder or repository the tokenizer lies.

        Raises:
            OSError: no such folder or repository, or a file is missing from it; the sentence says which and what to do.
            ValueError: the folder is of something else, config and weights do not fit, or the weights are damaged.
        """
        folder, commit = fetch_folder(
            id_or_folder,
            FILES,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        room = room_of(folder)
        where = str(id_or_folder) if commit else str(Path(id_or_folder).expanduser().resolve())
        if room is WRAPPED:
            within = {"subfolder": subfolder} if subfolder else {}
            place = {"repo": where, "revision": commit, **within} if commit else {"folder": str(Path(where, subfolder))}
            hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            model, processor = open_wrapped(folder, place, commit is not None, dtype or torch.float32, **hub)
        else:
            config, processor = load_config(folder, room), load_processor(folder, room)
            model = load_model(folder, room, config, dtype or torch.float32)
        tokenizer = cls(model if device is None else model.to(device), processor)
        model.config.name_or_path = where
        tokenizer._remember(
            id_or_folder=where, revision=commit, cache_dir=cache_dir and str(cache_dir), subfolder=subfolder
        )
        if commit is not None and tokenizer.fingerprint is not None:
            tokenizer.comes_from({"repo": where, "revision": commit, "fingerprint": tokenizer.fingerprint})
        elif room is WRAPPED and "repo" in (named := model.config.source or {}) and tokenizer.fingerprint is not None:
            own = {"repo": named["repo"], "revision": named["revision"], "fingerprint": tokenizer.fingerprint}
            tokenizer.comes_from(own)
        return tokenizer

    @classmethod
    def from_config(cls, name_or_folder: str | os.PathLike) -> VQTokenizer:
        """A tokenizer with fresh random weights, drawn from torch's global generator, in eval mode.

        Args:
            name_or_folder: a name such as "image/vqvae2-digits" (see `config_folder`) or a folder with `config.json` and
                `preprocessor_config.json`.

        Raises:
            ValueError: an unknown name (near ones are said), or files that describe no tokenizer.
            OSError: a file is missing.
        """
        folder = config_folder(name_or_folder)
        room = room_of(folder)
        if room is WRAPPED:
            raise ValueError(
                f"{folder} is of a published codec, which is nothing without its weights: use from_pretrained"
            )
        config, processor = load_config(folder, room), load_processor(folder, room)
        check_size(room.model, config)  # before anything is allocated
        config.fingerprint = None  # of the weights that lie beside, perhaps; not of these
        return cls(room.model(config).eval(), processor)

    def save_pretrained(
        self, folder: str | os.PathLike, weights: bool | None = None, license: str | None = None
    ) -> None:
        """Write `config.json`, `model.safetensors` and `preprocessor_config.json`; other files in the folder stay.

        The fingerprint is computed from the weights as they are now and stored in `config.json`. A model in train mode keeps
        its own `fingerprint` as it was (None), because its next step changes the codes.

        Of a published codec only its repository and revision are stored, and loading fetches it from there.

        Args:
            folder: is made if it is not there.
            weights: of a published codec: store its weights, too, which are somebody's; None does if the folder it came from held them.
            license: under which the weights are, such as "mit"; for `weights=True`, see the codec's page on the Hub.

        Raises:
            OSError: the disk is full, say. The three files are then as they were before.
            ValueError: the folder holds a pipeline, whose `config.json` would be overwritten; or a codec cannot be saved by name,
                because it was changed, or with its weights, because their license is not said.
        """
        if Path(folder, "pipeline.json").exists():
            raise ValueError(f"{folder} holds a pipeline, which this would overwrite: name another folder")
        self._write(Path(folder), weights, license)
        if not self.model.training:
            self._remember(id_or_folder=str(Path(folder).resolve()), revision=None, cache_dir=None, subfolder="")

    def _write(self, folder: Path, weights: bool | None = None, license: str | None = None) -> None:
        if self._room is WRAPPED:
            write_wrapped(self.model, self.processor, folder, weights, license)
            return
        if weights is False or license is not None:
            raise ValueError("weights and license are for published codecs: of a model of one's own all is saved")
        config = self.model.config
        before, now = config.fingerprint, self.model.code_fingerprint(self.processor.code_fields)
        written = False
        try:
            with replace_files(folder, last="config.json") as staging, quiet():
                config.fingerprint = now
                self.model.save_pretrained(staging)
                self.processor.save_pretrained(staging)
            written = True
        finally:
            config.fingerprint = now if written and not self.model.training else before

    @property
    def home(self) -> Path | None:
        """The folder on this machine that holds this tokenizer as it is now; None if it is not saved, or changed since."""
        known = self._origin
        is_here = known is not None and known["revision"] is None and self._origin_stamp == self._stamp()
        return Path(known["id_or_folder"], known["subfolder"]) if known is not None and is_here else None

    @property
    def source(self) -> dict[str, str] | None:
        """`{"repo", "revision", "fingerprint"}` of the place on the Hub that this code space comes from, if it does."""
        return self._source if self._source is not None and self._source["fingerprint"] == self.fingerprint else None

    def comes_from(self, source: dict[str, str] | None) -> None:
        """Note where on the Hub the code space comes from; it counts as long as the fingerprint is that one."""
        self._source = source

    def card_facts(self) -> dict[str, Any]:
        """What `vqtok.hub.card.render` wants to know of it."""
        rate = getattr(self.processor, "sampling_rate", None)
        own = {} if rate is None else {"sampling_rate": rate, "kbps": bits_per_unit(self.layout) * rate / 1000}
        return {
            "kind": "tokenizer",
            "modality": self._room.modality,
            "class": type(self.model).__name__,
            "levels": self.layout.to_dict()["levels"],
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "fingerprint": self.fingerprint,
            **own,
            **(card_facts(self.model) if self._room is WRAPPED else {}),
        }

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        if self._room is WRAPPED:
            check_pushable(self.model)
        return super().push_to_hub(repo_id, **options)

    push_to_hub.__doc__ = PublishedFacade.push_to_hub.__doc__

    # -- media to codes and back

    @property
    def layout(self) -> CodeLayout:
        return self.model.layout

    @property
    def fingerprint(self) -> str | None:
        return self.model.config.fingerprint

    @property
    def modality(self) -> str:
        """Which room it is of: "image", "audio" or "text"."""
        return self._room.modality

    def to(self, device: torch.device | str) -> VQTokenizer:
        """Move the model; returns itself."""
        unchanged = self._origin is not None and self._origin_stamp == self._stamp()
        self.model.to(device)
        if unchanged:
            self._origin_stamp = self._stamp()  # buffers are new tensors now
        return self

    @torch.no_grad()
    def encode(
        self,
        media: Any,
        sampling_rate: int | None = None,
        batch_size: int | None = None,
        num_codebooks: int | None = None,
        num_levels: int | None = None,
        max_pixels: int | None = None,
        max_seconds: int | None = None,
    ) -> Codes:
        """The codes of media, in their order, on the CPU. The model's state and mode do not matter and do not change.

        Media of equal padded size are encoded together; none is padded to the size of another. A single sound file is read and
        encoded in parts, in memory that does not grow with it.

        Args:
            media: one item or an iterable of items. Of images: PIL pictures, uint8 arrays, paths, of any sizes. Of audio: arrays
                `(samples,)` or `(channels, samples)`, paths, or dicts with "audio" and "sampling_rate", of any lengths. Of text:
                strings, path objects of text files, or integer arrays of ids, of any lengths.
            sampling_rate: of audio given as arrays, in Hz; files know their own.
            batch_size: items at once; None means up to 64, fewer of large ones.
            num_codebooks: keep this residual depth of each level.
            num_levels: keep this many levels, the coarsest.
            max_pixels: of a picture; None means the processor's bound, which guards against files that would fill the memory.
            max_seconds: of a clip of sound; None means the processor's bound.

        Returns:
            Codes with levels int64 `(B, Q, *grid)`, sizes and the fingerprint.

        Raises:
            ValueError, TypeError, OSError: an item cannot be read or is too small; its place in the list is said.
        """
        if sampling_rate is not None and self._room.modality != "audio":
            raise ValueError(
                f"sampling_rate={sampling_rate} is for audio, this tokenizer is for {self._room.plural}: leave it out"
            )
        if max_pixels is not None and self._room.modality != "image":
            raise ValueError(
                f"max_pixels={max_pixels} is for images, this tokenizer is for {self._room.plural}: leave it out"
            )
        if max_seconds is not None and self._room.modality != "audio":
            raise ValueError(
                f"max_seconds={max_seconds} is for audio, this tokenizer is for {self._room.plural}: leave it out"
            )
        counts = {"num_codebooks": num_codebooks, "num_levels": num_levels}
        bounds = {"max_pixels": max_pixels, "max_seconds": max_seconds}
        self._check_counts(batch_size=batch_size, **counts, **bounds)
        if self._room.encode_file is not None and isinstance(media, (str, os.PathLike)) and sampling_rate is None:
            with evaluating(self.model):
                levels, size = self._room.encode_file(self.model, self.processor, media, max_seconds)
            codes = Codes(levels, torch.tensor([size]), self.layout, self.fingerprint)
            return codes.prefix(num_levels, num_codebooks)
        given = {**bounds, "sampling_rate": sampling_rate}
        options = {name: value for name, value in given.items() if value is not None}
        parts: list[Codes] = []
        order: list[int] = []
        with evaluating(self.model):
            for places, batch, sizes in group_by_shape(self._prepared(media, options), batch_size, self.layout.ndim):
                levels = self.model.encode_long(batch.to(self.model.device))
                parts.append(Codes(tuple(c.cpu() for c in levels), torch.tensor(sizes), self.layout, self.fingerprint))
                order += places
        codes = Codes.cat(parts)[np.argsort(order).tolist()] if parts else self._no_codes()
        return codes.prefix(num_levels, num_codebooks)

    @torch.no_grad()
    def decode(self, codes: Codes, batch_size: int | None = None) -> list[Any]:
        """Media of codes, in their order, of exactly their sizes.

        Args:
            codes: of this tokenizer; a prefix of levels or codebooks is decodable.
            batch_size: items at once; None means up to 64, fewer of large ones.

        Returns:
            PIL pictures, float32 arrays of sound, `(samples,)` or `(2, samples)`, at `processor.sampling_rate`, or strings.

        Raises:
            ValueError: the codes belong to another tokenizer (both fingerprints are named) or have another layout.
            TypeError: not `Codes`.
        """
        self.check_codes(codes)
        self._check_counts(batch_size=batch_size)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, size in enumerate(codes.sizes.tolist()):
            groups.setdefault(self.layout.padded(size), []).append(index)
        media: list[Any] = [None] * len(codes)
        with evaluating(self.model):
            for shape, indices in groups.items():
                step = batch_size or default_batch_size(shape)
                for start in range(0, len(indices), step):
                    chosen = indices[start : start + step]
                    part = codes[chosen]
                    output = self.model.decode_long([level.to(self.model.device) for level in part.levels])
                    for index, item in zip(chosen, self.processor.postprocess(output, part.sizes), strict=True):
                        media[index] = item
        return media

    def check_codes(self, codes: Codes) -> None:
        """Refuse codes that are not of this tokenizer.

        Raises:
            ValueError: the codes belong to another tokenizer (both fingerprints are named) or have another layout.
            TypeError: not `Codes`.
        """
        if not isinstance(codes, Codes):
            raise TypeError(f"decode takes Codes, got {type(codes).__name__}: bare tensors go through tok.model.decode")
        if self.fingerprint is not None and codes.fingerprint is not None:
            check_fingerprint(self.fingerprint, codes.fingerprint, "these codes")
        if codes.layout != self.layout:
            raise ValueError(
                f"codes of the layout {codes.layout.to_dict()} do not fit this tokenizer's {self.layout.to_dict()}"
            )

    def reconstruct(self, media: Any, batch_size: int | None = None, sampling_rate: int | None = None) -> list[Any]:
        """What is left of media after encoding and decoding, a list also for one item."""
        return self.decode(self.encode(media, sampling_rate, batch_size), batch_size)

    def verify(self) -> str:
        """Compute the fingerprint again and return it.

        Raises:
            ValueError: it was never saved, or encoder, codebooks or preprocessing are not those that were saved; both
                fingerprints are named.
        """
        if self.fingerprint is None:
            raise ValueError(
                "this tokenizer has no fingerprint, because it was never saved or has trained since: save it first"
            )
        found = self.model.code_fingerprint(self.processor.code_fields)
        if found != self.fingerprint:
            remedy = "load it again from a source you trust, or save it as a new one"
            if self.model.dtype != torch.float32:
                remedy = "load it in float32 to verify it"
            raise ValueError(
                f"encoder, codebooks or preprocessing give the fingerprint {found}, but {self.fingerprint} was saved: {remedy}"
            )
        return found

    def __repr__(self) -> str:
        layout, unit = self.layout, self._room.unit
        count = sum(parameter.numel() for parameter in self.model.parameters())
        lines = [f"VQTokenizer for {self._room.plural} ({type(self.model).__name__}, {count / 1e6:.2f} M parameters)"]
        for index, level in enumerate(layout.levels):
            area = "x".join([str(level.stride)] * layout.ndim)
            each = f"{level.num_codebooks} code{'s' * (level.num_codebooks > 1)} of {level.codebook_size}"
            lines.append(f"  level {index}: {each} per {area} {unit}s, {level.bits:g} bits")
        rate = getattr(self.processor, "sampling_rate", None)
        speed = "" if rate is None else f", {bits_per_unit(layout) * rate / 1000:.4g} kbps at {rate} Hz"
        lines.append(f"  {bits_per_unit(layout):.4g} bits per {unit}{speed}")
        if self._room is WRAPPED:
            lines.append(f"  {describe(self.model)}")
        lines.append(f"  fingerprint {self.fingerprint or 'none: not saved since it was made or trained'}")
        return "\n".join(lines)

    # -- pickling: by reference while it is what a folder holds, so that `dataset.map` caches and workers start fast

    def __reduce__(self) -> tuple[Any, ...]:
        known = self._origin is not None and self.fingerprint is not None and not self.model.training
        if known and self._origin_stamp == self._stamp():
            dtype = str(self.model.dtype).removeprefix("torch.")
            return _load_again, (self._origin, self.fingerprint, self._weights_digest(), dtype, str(self.model.device))
        return VQTokenizer, (self.model, self.processor)

    def _remember(self, **origin: Any) -> None:
        self._origin, self._origin_stamp = origin, self._stamp()

    def _stamp(self) -> Any:
        """Changes when a tensor is written to, or model or processor are changed."""
        return stamp(self.model), self.processor.to_json_string()

    def _weights_digest(self) -> str:
        stamp = self._stamp()
        if self._digest is None or self._digest[0] != stamp:
            self._digest = (stamp, fingerprint({}, self.model.state_dict()))
        return self._digest[1]

    # -- helpers

    def _prepared(self, media: Any, options: dict[str, int]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        single = isinstance(media, (str, os.PathLike, np.ndarray, Tensor, dict)) or not isinstance(media, Iterable)
        if single:
            yield self.processor.prepare(media, **options)
            return
        for index, item in enumerate(media):
            try:
                yield self.processor.prepare(item, **options)
            except (ValueError, TypeError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"item {index}: {error}") from error

    def _no_codes(self) -> Codes:
        grid = (0,) * self.layout.ndim
        levels = tuple(torch.zeros((0, level.num_codebooks, *grid), dtype=torch.int64) for level in self.layout.levels)
        return Codes(levels, torch.zeros((0, self.layout.ndim), dtype=torch.int64), self.layout, self.fingerprint)

    def _check_counts(self, **counts: int | None) -> None:
        levels = self.layout.levels
        limits = {"num_levels": len(levels), "num_codebooks": max(level.num_codebooks for level in levels)}
        for name, value in counts.items():
            most = limits.get(name)
            if value is not None and not (isinstance(value, int) and 1 <= value <= (most or value)):
                raise ValueError(f"{name} must be {f'from 1 to {most}' if most else 'at least 1'}, got {value!r}")


def _load_again(origin: dict[str, Any], saved: str, digest: str, dtype: str, device: str) -> VQTokenizer:
    """The tokenizer that was pickled by reference."""
    tokenizer = VQTokenizer.from_pretrained(**origin, dtype=dtype, device=device)
    if tokenizer.fingerprint != saved or tokenizer._weights_digest() != digest:
        raise ValueError(
            f"{origin['id_or_folder']} has changed since the tokenizer was pickled: load it again and start over"
        )
    return tokenizer
