"""`VQPipeline`: from words, classes or nothing to media. A prior, the VQ tokenizer whose codes it knows, and a text tokenizer."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import PreTrainedTokenizerBase

from vqtok.auto import VQTokenizer
from vqtok.auto.rooms import FILES as TOKENIZER_FOLDER
from vqtok.auto.rooms import quiet
from vqtok.codes import Codes
from vqtok.files import read_json, write_json
from vqtok.fingerprint import check_fingerprint, stamp
from vqtok.hub.folders import HUB_ID, fetch_folder, file_digests, is_revision, replace_files
from vqtok.hub.publish import PublishedFacade
from vqtok.hub.weights import MODEL_FILES, require_safetensors
from vqtok.prior import PRIORS, CodeCascade, CodePriorModel, Known, MaskedCodePriorModel, encode_prompts
from vqtok.prior.features import ENCODER_FILES, TextEncoder
from vqtok.prior.reranking import Scorer, best_first, check_keep_best
from vqtok.prior.text import TOKENIZER_FILES, from_ranges, load_text_tokenizer, to_ranges

FORMAT = 1
PIPELINE_FILE = "pipeline.json"
TEXT_ENCODER = "text_encoder"  # its folder
# What reads the prompts.
_TEXT_FILES = (*TOKENIZER_FILES, *(f"{TEXT_ENCODER}/{name}" for name in ENCODER_FILES))
# What a pipeline's folder consists of, for downloads: no samples, no checkpoints.
FILES = (
    *(PIPELINE_FILE, *MODEL_FILES),
    *(f"vq_tokenizer/{name}" for name in TOKENIZER_FOLDER),
    *(f"stage_[0-9]*/{name}" for name in MODEL_FILES),
    *_TEXT_FILES,
)


class VQPipeline(PublishedFacade):
    """Media of prompts.

    Args:
        prior: knows how codes go together; a `CodeCascade` of several for a cascade.
        vq_tokenizer: turns codes into media; the one whose codes the prior was trained on.
        text_tokenizer: of the prior's text tokens; only for a prior with the condition "text".
        text_ids_seen: the text tokens that the training captions had (see `vqtok.prior.text.seen_token_ids`); a prompt with
            another one is refused. None asks for nothing.
        text_encoder: reads the prompts; only for a prior with the condition "features".

    Attributes:
        prior, vq_tokenizer, text_tokenizer, text_ids_seen, text_encoder: as given.
        text_tokenizer_source: `{"repo", "revision"}` of the place on the Hub that the text tokenizer comes from, if it does.

    Raises:
        ValueError: the three do not belong together; both fingerprints or layouts are named.

    Example:
        >>> vq_tokenizer = VQTokenizer.from_config("image/vqvae-digits")
        >>> backbone = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> layout = vq_tokenizer.layout.to_dict()
        >>> prior = CodePriorModel(CodePriorConfig(layout=layout, condition="class", text_size=10, backbone_config=backbone))
        >>> pipe = VQPipeline(prior, vq_tokenizer)
        >>> [image.size for image in pipe([3, 7], num_samples=2, sizes=(24, 32), seed=0)]
        [(32, 24), (32, 24), (32, 24), (32, 24)]
    """

    def __init__(
        self,
        prior: CodePriorModel | CodeCascade,
        vq_tokenizer: VQTokenizer,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        text_ids_seen: Iterable[int] | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        config = prior.config
        check_fingerprint(config.fingerprint, vq_tokenizer.fingerprint, "the codes of this VQ tokenizer")
        if prior.vocabulary.layout != vq_tokenizer.layout:
            raise ValueError(
                f"the prior was made for codes of the layout {prior.vocabulary.layout.to_dict()}, this VQ tokenizer makes "
                f"{vq_tokenizer.layout.to_dict()}: use the tokenizer that the prior was trained with"
            )
        if (config.condition == "text") != (text_tokenizer is not None):
            remedy = "give the one it was trained with" if config.condition == "text" else "leave it away"
            raise ValueError(
                f"a prior with the condition {config.condition!r} was given the text tokenizer {type(text_tokenizer).__name__}: {remedy}"
            )
        if text_tokenizer is not None and len(text_tokenizer) > config.text_size:
            raise ValueError(
                f"this text tokenizer has {len(text_tokenizer)} tokens, the prior knows {config.text_size}: use the one it was trained with"
            )
        if (config.condition == "features") != (text_encoder is not None):
            remedy = "give the one it was trained with" if text_encoder is None else "leave it away"
            raise ValueError(
                f"a prior with the condition {config.condition!r} was given the text encoder {type(text_encoder).__name__}: {remedy}"
            )
        if text_encoder is not None and text_encoder.size != config.feature_size:
            raise ValueError(
                f"this text encoder's states have the width {text_encoder.size}, the prior takes {config.feature_size}: use the one it "
                "was trained with"
            )
        self.prior, self.vq_tokenizer, self.text_tokenizer = prior, vq_tokenizer, text_tokenizer
        self.text_encoder = text_encoder
        self.text_tokenizer_source: dict[str, str] | None = None
        self.text_ids_seen = None if text_ids_seen is None else sorted(set(text_ids_seen))
        self._home: tuple[Path, Any] | None = None  # the folder that holds it, and what it held

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
    ) -> VQPipeline:
        """The pipeline of a folder or of a repository on the Hub, in eval mode. No code and no pickle is ever loaded.

        Args:
            id_or_folder: a folder that `save_pretrained` wrote, or "owner/name" on the Hub.
            device: where it runs; None means the CPU.
            dtype: of the prior's weights; None means as they were saved. The VQ tokenizer stays float32.
            revision: branch, tag or commit on the Hub.
            token, cache_dir, local_files_only: as everywhere in huggingface_hub.
            subfolder: where in the folder or repository the pipeline lies.

        Raises:
            OSError: no such folder or repository, or a file is missing from it; the sentence says which and what to do.
            ValueError: the parts do not belong together, their files are damaged, or what reads the prompts is not what the pipeline was
                saved with.
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder, commit = fetch_folder(id_or_folder, FILES, revision=revision, subfolder=subfolder, **hub)
        facts = _read_facts(folder)
        vq_tokenizer = _load_vq_tokenizer(folder, facts, hub)
        check_fingerprint(facts["fingerprint"], vq_tokenizer.fingerprint, f"the VQ tokenizer {facts['vq_tokenizer']}")
        stages = [_load_prior(folder / name, dtype) for name in facts["stages"]]
        prior = stages[0] if len(stages) == 1 else CodeCascade(stages)
        text_tokenizer = None
        if prior.config.condition == "text":
            text_tokenizer = load_text_tokenizer(folder)
        text_encoder = None
        if prior.config.condition == "features":
            if not (folder / TEXT_ENCODER).is_dir():
                raise FileNotFoundError(
                    f"{folder} has no folder {TEXT_ENCODER!r} with the text encoder of its prompts: save the pipeline again"
                )
            with quiet():
                text_encoder = TextEncoder.from_pretrained(folder / TEXT_ENCODER)
            text_encoder.source = facts.get("text_encoder_source")
        _check_text_files(folder, facts.get("text_files") or {})
        seen = facts.get("text_ids_seen")
        pipeline = cls(prior, vq_tokenizer, text_tokenizer, None if seen is None else from_ranges(seen), text_encoder)
        pipeline.text_tokenizer_source = facts.get("text_tokenizer_source")
        pipeline = pipeline if device is None else pipeline.to(device)
        pipeline._home = None if commit else (folder, pipeline._stamp())
        return pipeline

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write everything into one folder; other files in it (checkpoints, samples) stay.

        Raises:
            OSError: the disk is full, say. The folder is then as it was before.
        """
        self._write(Path(folder))
        self._home = (Path(folder).resolve(), self._stamp())

    def _write(self, folder: Path) -> None:
        with replace_files(folder, last=PIPELINE_FILE) as staging, quiet():
            stages = list(self.prior.stages) if isinstance(self.prior, CodeCascade) else [self.prior]
            names = _stage_names(len(stages))
            for name, stage in zip(names, stages, strict=True):
                stage.save_pretrained(staging / name)
            if self.text_tokenizer is not None:
                self.text_tokenizer.save_pretrained(staging)
            if self.text_encoder is not None:
                self.text_encoder.save_pretrained(staging / TEXT_ENCODER)
            # Saved through another facade, so that the one in use does not remember the staging folder as its home.
            part = VQTokenizer(self.vq_tokenizer.model, self.vq_tokenizer.processor)
            part.save_pretrained(staging / "vq_tokenizer")
            facts: dict[str, Any] = {
                "format": FORMAT,
                "stages": names,
                "vq_tokenizer": "vq_tokenizer",
                "fingerprint": self.vq_tokenizer.fingerprint,
            }
            if self.text_ids_seen is not None:
                facts["text_ids_seen"] = to_ranges(self.text_ids_seen)
            if self.vq_tokenizer.source is not None:
                facts["vq_tokenizer_source"] = self.vq_tokenizer.source
            if self.text_encoder is not None and self.text_encoder.source is not None:
                facts["text_encoder_source"] = self.text_encoder.source
            if self.text_tokenizer is not None and self.text_tokenizer_source is not None:
                facts["text_tokenizer_source"] = self.text_tokenizer_source
            if text_files := file_digests(staging, _TEXT_FILES):
                facts["text_files"] = text_files
            write_json(staging / PIPELINE_FILE, facts)

    @property
    def home(self) -> Path | None:
        """The folder on this machine that holds this pipeline as it is now; None if it is not saved, or changed since."""
        return self._home[0] if self._home is not None and self._home[1] == self._stamp() else None

    def card_facts(self) -> dict[str, Any]:
        """What `vqtok.hub.card.render` wants to know of it."""
        own = {"kind": "pipeline", "condition": self.prior.config.condition, "class": type(self.prior).__name__}
        stages = getattr(self.prior, "stages", [self.prior])
        own |= {"parameters": sum(parameter.numel() for stage in stages for parameter in stage.parameters())}
        own |= {"stages": len(stages), "masked": isinstance(stages[0], MaskedCodePriorModel)}
        if self.text_encoder is not None:
            own["text_encoder"] = self.text_encoder.source
        if self.text_tokenizer is not None:
            own["prompt"] = _known_prompt(self.text_tokenizer, self.text_ids_seen)
        return {**self.vq_tokenizer.card_facts(), **own, "base_model": self.vq_tokenizer.source}

    def _stamp(self) -> Any:
        """Changes when a part is replaced, when a weight of one is written to, or how it draws by default is changed."""
        stages = getattr(self.prior, "stages", [self.prior])
        drawing = [stage.generation_config.to_dict() for stage in stages]
        encoder = None if self.text_encoder is None else stamp(self.text_encoder.model)
        words = id(self.text_tokenizer), self.text_ids_seen and list(self.text_ids_seen)
        return [stamp(stage) for stage in stages], drawing, self.vq_tokenizer._stamp(), encoder, words

    # -- media

    def __call__(
        self,
        prompts: str | int | Sequence[str | int | None] | None = None,
        num_samples: int = 1,
        seed: int | None = None,
        rerank: Scorer | None = None,
        keep_best: int | None = None,
        media: Any = None,
        keep: Any = None,
        **sampling: Any,
    ) -> list[Any]:
        """Return media, `num_samples` of the first prompt, then of the second, and so on.

        Args:
            prompts: texts, class labels or `Codes`, as the prior's condition is; None, as a whole or as an entry, for media without
                condition.
            num_samples: per prompt.
            seed: the same seed gives the same media, whatever is drawn beside them; None draws one.
            rerank: scorer(prompts, media) that returns a number for each medium, higher is better; each prompt's media come best first.
                `prior_scorer` makes one of the prior itself.
            keep_best: how many media of each prompt are returned; None for all.
            media: what is edited or completed, one item for all prompts or one per prompt, as `VQTokenizer.encode` takes them.
            keep: which part of `media` stays, true or white where it does: a picture, or bool `(*size)` or one for each of the media
                `(B, *size)` in pixels or samples. Codes are drawn anew where any of their cell is not kept. None keeps everything,
                for `sizes` larger than the media.
            sampling: `sizes`, `guidance_scale`, `temperature`, `top_k`, `top_p`, `batch_size` of `CodePriorModel.sample_codes`;
                what is not given comes from `generation_config.json`.

        Raises:
            ValueError: a prompt that is empty, too long, or has a word that the captions never had; a value out of range.
        """
        if media is not None:
            sampling["known"] = self._known(media, keep)
        elif keep is not None:
            raise ValueError("keep says which part of the given media stays: give media too")
        kept, condition = check_keep_best(keep_best, num_samples, rerank), self._condition(prompts)
        codes = self.prior.sample_codes(condition, num_samples=num_samples, seed=seed, **sampling)
        drawn = self.vq_tokenizer.decode(codes)
        return drawn if rerank is None else best_first(rerank, _as_rows(prompts), drawn, kept)

    def _known(self, media: Any, keep: Any) -> Known:
        """Codes of media, and which of them stay."""
        codes = self.vq_tokenizer.encode(media)
        if keep is None:
            return Known(codes)
        if isinstance(keep, Image.Image):
            keep = np.asarray(keep.convert("L")) > 127
        return Known.where(codes, torch.as_tensor(keep))

    def _condition(self, prompts: Any) -> list[Any] | None:
        if prompts is None:
            return None
        rows = _as_rows(prompts)
        config = self.prior.config
        if config.condition == "none":
            raise ValueError(
                f"this prior was made without conditions: call the pipeline with None instead of {rows[:3]!r}"
            )
        if not rows:
            raise ValueError(
                "there are no prompts: give a list of at least one, or None for a sample without condition"
            )
        if config.condition == "codes":
            return rows
        if config.condition in ("text", "features"):
            texts, most = [row for row in rows if row is not None], config.max_text_length
            if self.text_encoder is not None:
                encoded = iter(self.text_encoder.features(texts, most))
            else:
                encoded = iter(encode_prompts(self.text_tokenizer, texts, most, self.text_ids_seen))
            return [None if row is None else next(encoded) for row in rows]
        for row in rows:
            if row is not None and (isinstance(row, str | bool) or not 0 <= int(row) < config.text_size):
                raise ValueError(f"this prior takes class labels from 0 to {config.text_size - 1}, got {row!r}")
        return [None if row is None else int(row) for row in rows]

    @property
    def modality(self) -> str:
        """What it makes: "image", "audio" or "text"."""
        return self.vq_tokenizer.modality

    @property
    def sampling_rate(self) -> int | None:
        """Of audio, in Hz; None for other media."""
        return getattr(self.vq_tokenizer.processor, "sampling_rate", None)

    def to(self, device: torch.device | str) -> VQPipeline:
        """Move prior, VQ tokenizer and text encoder; returns itself."""
        unchanged = self._home is not None and self._home[1] == self._stamp()
        self.prior.to(device)
        self.vq_tokenizer.to(device)
        if self.text_encoder is not None:
            self.text_encoder.to(device)
        if unchanged and self._home is not None:
            self._home = (self._home[0], self._stamp())
        return self

    def __repr__(self) -> str:
        config, count = self.prior.config, sum(parameter.numel() for parameter in self.prior.parameters())
        asked = {"text": f"texts of up to {config.max_text_length} tokens", "class": f"{config.text_size} classes"}
        asked |= {
            "features": f"{asked['text']}, read by a frozen encoder",
            "codes": f"codes of {config.condition_layout}",
        }
        known = "" if self.text_ids_seen is None else f", {len(self.text_ids_seen)} of them seen in training"
        stages = f" of {len(self.prior.stages)} stages" if isinstance(self.prior, CodeCascade) else ""
        lines = [
            f"VQPipeline ({config.backbone_config.model_type} prior{stages}, {count / 1e6:.2f} M parameters)",
            f"  condition: {asked.get(config.condition, 'none')}",
            *(
                [f"  text tokenizer: {len(self.text_tokenizer)} tokens{known}"]
                if self.text_tokenizer is not None
                else []
            ),
            *("  " + line for line in repr(self.vq_tokenizer).splitlines()),
        ]
        return "\n".join(lines)


def prior_scorer(pipe: VQPipeline, batch_size: int = 64) -> Scorer:
    """Return a scorer for `rerank`: how much likelier the prior finds a medium's codes with its prompt than without, in nats.

    ln p(codes | prompt) - ln p(codes) equals ln p(prompt | codes) - ln p(prompt), so among the media of one prompt the order is
    that of the prompt's likelihood, by which CogView ranks its own samples (Ding et al. 2021). Media are encoded again. A prompt of
    None gets 0.

    Raises:
        ValueError: a prior that knows no null condition to compare with.
    """
    config = pipe.prior.config
    if config.condition == "none" or not config.condition_dropout:
        raise ValueError(
            f"this prior (condition {config.condition!r}, condition_dropout {config.condition_dropout}) cannot tell prompts from none: "
            "rerank with another scorer"
        )

    def score(prompts: list[Any], media: list[Any]) -> list[float]:
        codes = pipe.vq_tokenizer.encode(media)
        told, untold = (pipe.prior.score(codes, rows, batch_size).nats for rows in (pipe._condition(prompts), None))
        return (untold - told).tolist()

    return score


def _as_rows(prompts: Any) -> list[Any]:
    if isinstance(prompts, Codes):
        return list(prompts)
    return [prompts] if prompts is None or isinstance(prompts, str | int) else list(prompts)


def _known_prompt(text_tokenizer: PreTrainedTokenizerBase, seen: Sequence[int] | None) -> str:
    """A prompt that the pipeline takes, for an example: the longest word that is one token of the captions."""
    words = sorted((str(text_tokenizer.decode([i])).strip() for i in seen or ()), key=lambda word: (-len(word), word))
    for word in (word for word in words if word.isalpha()):
        with suppress(ValueError):
            encode_prompts(text_tokenizer, [word], 8, seen)
            return word
    return "a picture"


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / PIPELINE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {PIPELINE_FILE} and is no pipeline: a tokenizer alone is loaded with VQTokenizer.from_pretrained"
        )
    try:
        facts = read_json(path)
        version, stages, name = facts["format"], facts["stages"], facts["vq_tokenizer"]
        seen, fingerprint = facts.get("text_ids_seen") or [], facts["fingerprint"]
        pairs = all(len(pair) == 2 and all(type(each) is int for each in pair) for pair in seen)
        pairs = pairs and all(0 <= first <= last < 1 << 22 for first, last in seen)
        pairs = pairs and sum(last - first + 1 for first, last in seen) <= 1 << 22
        named = isinstance(name, str) or _is_source(name, {"repo", "revision"})
        if isinstance(name, dict) and named and Path(name["repo"]).exists():
            raise ValueError(f"{name['repo']} is a repository on the Hub, and a folder of that name is in the way here")
        source = facts.get("vq_tokenizer_source")
        named = named and (source is None or _is_source(source, {"repo", "revision", "fingerprint"}))
        for reader in (facts.get("text_encoder_source"), facts.get("text_tokenizer_source")):
            named = named and (reader is None or _is_source(reader, {"repo", "revision"}))
        named = named and _are_text_files(facts.get("text_files") or {})
        staged = isinstance(stages, list) and 1 <= len(stages) <= 64 and stages == _stage_names(len(stages))
        well_formed = named and pairs and staged and isinstance(version, int) and isinstance(fingerprint, str | None)
        if not well_formed:
            raise ValueError("a field has the wrong form")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} makes no sense ({type(error).__name__}: {error}): save the pipeline again") from None
    if version > FORMAT:
        raise ValueError(f"{path} has format {version}, this vqtok knows {FORMAT}: upgrade vqtok")
    return facts


def _are_text_files(digests: Any) -> bool:
    """Whether these are checksums of files that may read prompts, none of them elsewhere."""
    return isinstance(digests, dict) and all(
        re.fullmatch("[0-9a-f]{64}", digest)
        and ".." not in name
        and any(fnmatch.fnmatch(name, pattern) for pattern in _TEXT_FILES)
        for name, digest in digests.items()
    )


def _check_text_files(folder: Path, digests: dict[str, str]) -> None:
    """Refuse files of the text tokenizer or text encoder that are not those the pipeline was saved with."""
    found = file_digests(folder, list(digests))
    for name, digest in digests.items():
        if found.get(name) != digest:
            state = "not the file that this pipeline was saved with" if name in found else "missing"
            raise ValueError(
                f"{folder / name} is {state}, so its prompts would not be read as in training: get the whole pipeline again, or, if "
                "another one is meant, make a VQPipeline of the parts and save that"
            )


def _stage_names(count: int) -> list[str]:
    """Folders of the stages of a cascade inside a pipeline's; a single prior, or the first, lies at the top."""
    return [".", *(f"stage_{number}" for number in range(1, count))]


def _is_source(value: Any, keys: set[str]) -> bool:
    """Whether it names a repository on the Hub."""
    strings = isinstance(value, dict) and set(value) == keys and all(isinstance(each, str) for each in value.values())
    return strings and HUB_ID.fullmatch(value["repo"]) is not None and is_revision(value["revision"])


def _load_vq_tokenizer(folder: Path, facts: dict[str, Any], hub: dict[str, Any]) -> VQTokenizer:
    name = facts["vq_tokenizer"]
    if isinstance(name, dict):
        return VQTokenizer.from_pretrained(name["repo"], revision=name["revision"], **hub)
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name or ":" in name:
        raise ValueError(f"{folder / PIPELINE_FILE}: vq_tokenizer must be a folder inside the pipeline, got {name!r}")
    if not (folder / name).is_dir():
        raise FileNotFoundError(f"{folder} has no folder {name!r} with the VQ tokenizer: save the pipeline again")
    vq_tokenizer = VQTokenizer.from_pretrained(folder / name, **hub)
    vq_tokenizer.comes_from(facts.get("vq_tokenizer_source"))
    return vq_tokenizer


def _load_prior(folder: Path, dtype: torch.dtype | str | None) -> CodePriorModel:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: save the pipeline again with save_pretrained")
    require_safetensors(folder)
    model_type = read_json(folder / "config.json").get("model_type")
    if not isinstance(model_type, str) or model_type not in PRIORS:
        raise ValueError(
            f"{folder / 'config.json'} is of model_type {model_type!r}, which is no prior ({', '.join(PRIORS)})"
        )
    config_class, model_class = PRIORS[model_type]
    try:
        config = config_class.from_pretrained(folder)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    with quiet():
        return model_class.from_pretrained(folder, config=config, dtype="auto" if dtype is None else dtype)
