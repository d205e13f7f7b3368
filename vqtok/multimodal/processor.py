"""Text, pictures and sound to the ids that a language model reads, and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from vqtok.auto import VQTokenizer
from vqtok.codes import Codes
from vqtok.fingerprint import check_fingerprint

from .chat import chat_items, is_chat
from .files import load_parts, save_parts
from .items import Piece, as_batch, learned_items, name_of, text_ids
from .reading import Span, spans
from .vocabulary import MultimodalVocabulary

UNFINISHED = ("error", "coarse")


class MultimodalProcessor:
    """Text, pictures and sound to ids and back; `extend` makes it, or `from_pretrained`.

    Args:
        tokenizer: of the text; it knows the names of the codes.
        vq_tokenizers: by the names of the modalities.
        vocabulary: which ids mean what.

    Attributes:
        tokenizer, vq_tokenizers, vocabulary: as given.

    Raises:
        ValueError: they do not belong together; names, fingerprints or layouts are said.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vq_tokenizers: Mapping[str, VQTokenizer],
        vocabulary: MultimodalVocabulary,
    ):
        if set(vq_tokenizers) != set(vocabulary.blocks):
            raise ValueError(
                f"the vocabulary has {sorted(vocabulary.blocks)}, VQ tokenizers are given for {sorted(vq_tokenizers)}"
            )
        for modality in vocabulary.modalities:
            vq = vq_tokenizers[modality.name]
            check_fingerprint(
                modality.fingerprint, vq.fingerprint, f"the codes of the VQ tokenizer for {modality.name!r}"
            )
            if vq.layout != modality.layout:
                raise ValueError(
                    f"the VQ tokenizer for {modality.name!r} makes codes of the layout {vq.layout.to_dict()}, the vocabulary is of "
                    f"{modality.layout.to_dict()}: use the one that the model was extended with"
                )
        known = tokenizer.get_vocab()
        for token, name in enumerate(vocabulary.names(), vocabulary.text_size):
            if known.get(name) != token:
                raise ValueError(
                    f"{name!r} should be id {token}, for this text tokenizer it is {known.get(name)}: use the one that was extended"
                )
        self.tokenizer, self.vq_tokenizers, self.vocabulary = tokenizer, dict(vq_tokenizers), vocabulary
        self._numbers = {name: number for number, name in enumerate(vocabulary.blocks, 1)}
        bare, whole = (list(tokenizer("a", add_special_tokens=special).input_ids) for special in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
        self._start = whole[:at]  # what this tokenizer writes before every text

    # -- from files and to files

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike,
        *,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> MultimodalProcessor:
        """The processor of a folder or of a repository on the Hub. No code and no pickle is ever loaded.

        Args:
            id_or_folder: a folder that `save_pretrained` wrote, or "owner/name" on the Hub.
            device: where the VQ tokenizers run; None means the CPU.
            revision, token, cache_dir, local_files_only, subfolder: as in `VQTokenizer.from_pretrained`.

        Raises:
            OSError: no such folder or repository, or a file is missing from it.
            ValueError: the parts do not belong together (fingerprints are named), or their files are damaged.
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        tokenizer, vqs, vocabulary = load_parts(id_or_folder, revision, subfolder, hub)
        return cls(tokenizer, vqs, vocabulary).to(device or "cpu")

    def save_pretrained(self, folder: str | os.PathLike, copy: bool = True) -> None:
        """Write the text tokenizer, `multimodal.json` and the VQ tokenizers into one folder, which may be the model's.

        Args:
            copy: put the VQ tokenizers into the folder; otherwise only where they are on the Hub is written, with the commit.

        Raises:
            ValueError: without `copy`, a VQ tokenizer that was not loaded from the Hub.
            OSError: the disk is full, say. The folder is then as it was before.
        """
        self.vocabulary = save_parts(Path(folder), self.tokenizer, self.vq_tokenizers, self.vocabulary, copy)

    def to(self, device: torch.device | str) -> MultimodalProcessor:
        """Move the VQ tokenizers; returns itself."""
        for vq in self.vq_tokenizers.values():
            vq.to(device)
        return self

    # -- media to ids

    def __call__(
        self,
        samples: Any,
        *,
        labels: str | Sequence[Iterable[int]] | None = None,
        end: bool | None = None,
        begin: str | None = None,
        sizes: Sequence[int] | None = None,
        sampling_rate: int | None = None,
        parse_tokens: bool = False,
        add_generation_prompt: bool = False,
        padding_side: str | None = None,
        return_modality_ids: bool = False,
        return_tensors: str | None = "pt",
    ) -> BatchEncoding:
        """The ids of samples, as the model reads them.

        Args:
            samples: a batch. Each sample is a list of items in their order, or one item, or a chat (a list of messages, for tokenizers
                with a chat template). An item is a str, which is always text; a picture (PIL, uint8 array); sound (float array, or a dict
                with "audio" and "sampling_rate"); `Codes` of one sample; or `(name, medium)` where the kind does not say which
                modality is meant, or the medium is a path.
            labels: what is learned: "all", "last" (the last item of each sample), "text", "media", "assistant" (of chats), or for each
                sample the numbers of its items. Everything else gets -100. None gives no labels.
            end: whether the tokenizer's end of sequence stands behind each sample, learned with the last item; None means where there
                are labels, but not behind chats.
            begin: a modality that is begun behind each sample, for `generate`.
            sizes: announced behind `begin`, in pixels `(height, width)` or samples `(length,)`; None leaves it to the model.
            sampling_rate: of arrays of sound, in Hz.
            parse_tokens: let names of codes in a text, `<|image_0_0_17|>`, become codes. Otherwise they are text like any other.
            add_generation_prompt: of chats: end with what the template writes before an answer.
            padding_side: "left" or "right"; None means right with labels, left without.
            return_modality_ids: also say of which modality each id is.
            return_tensors: "pt", or None for lists without padding.

        Returns:
            `input_ids` int64 `(B, T)` and `attention_mask`; with labels `labels`; if asked `modality_ids`, 0 for text, then 1 for the
            first modality and so on.

        Raises:
            ValueError: a text that is no Unicode, a sample without any id, codes of another tokenizer, a medium that is too large to be
                announced, a name or an option that does not exist; the sample is said.
            TypeError: an item that is neither text nor a medium.
        """
        if begin is None and sizes is not None:
            raise ValueError("sizes announce a medium that is begun: give begin too")
        if begin is not None and labels is not None:
            raise ValueError("begin is for generate, labels are for training: give one of them")
        rows, answers = self._items(samples, add_generation_prompt)
        pieces = self._pieces(rows, sampling_rate, parse_tokens)
        learned = learned_items(labels, pieces, answers) or [set() for _ in pieces]
        begun = [] if begin is None else [(self._begun(begin, sizes), False)]
        out = []
        for index, (sample, answered) in enumerate(zip(pieces, answers, strict=True)):
            runs = [(piece, i in learned[index]) for i, piece in enumerate(sample)]
            if answered is None:  # the template of a chat writes its own
                runs = [(Piece(0, self._start), labels == "all"), *runs]
            if end or (end is None and labels is not None and answered is None):
                runs.append((self._stop(), len(sample) - 1 in learned[index]))
            out.append(_row(runs + begun, index, labels is not None, return_modality_ids))
        if return_tensors is not None:
            return self.pad(out, padding_side, return_tensors)
        return BatchEncoding({name: [row[name] for row in out] for name in out[0]})

    def pad(
        self, rows: Sequence[Mapping[str, Any]], padding_side: str | None = None, return_tensors: str = "pt"
    ) -> BatchEncoding:
        """One batch of rows of lists, as a `data_collator` of trainers does it: ids with the pad token, labels with -100.

        Args:
            rows: dicts of `input_ids`, and maybe `attention_mask`, `labels` and `modality_ids`, all alike; other keys are left out.
            padding_side: "left" or "right"; None means right with labels, left without.

        Raises:
            ValueError: an unknown side, or no rows.
        """
        if not rows or return_tensors != "pt":
            raise ValueError(
                f"pad makes tensors ('pt') of at least one row, got {len(rows)} rows and {return_tensors!r}"
            )
        side = padding_side or ("right" if "labels" in rows[0] else "left")
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be left or right, got {side!r}")
        pad = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        fill = {"input_ids": pad, "attention_mask": 0, "labels": -100, "modality_ids": 0}
        rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in (name for name in fill if name in rows[0]):
            out = torch.full((len(rows), longest), fill[name])
            for target, row in zip(out, rows, strict=True):
                count = len(row[name])
                target[longest - count if side == "left" else 0 :][:count] = torch.as_tensor(row[name])
            batch[name] = out
        return BatchEncoding(batch)

    def unconditional(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `generate` needs for guidance: of each row only the medium that was begun, as if nothing had been said before.

        Use: `model.generate(**inputs, **processor.unconditional(inputs), guidance_scale=2.0)`. In training, samples that begin with the
        medium teach the model what that means.

        Args:
            inputs: `input_ids` `(B, T)`, every row with a begun medium at its end.

        Returns:
            `negative_prompt_ids` and `negative_prompt_attention_mask`, padded on the left.

        Raises:
            ValueError: a row without a begun medium.
        """
        blocks = self.vocabulary.blocks.values()
        begins, ends = ({block.special_id(special) for block in blocks} for special in ("begin", "end"))
        rows = []
        for index, ids in enumerate(inputs["input_ids"].tolist()):
            begun, ended = (
                max((i for i, token in enumerate(ids) if token in those), default=-1) for those in (begins, ends)
            )
            if begun <= ended:
                raise ValueError(
                    f"row {index} does not end inside a medium, so there is nothing to guide: give begin to the processor"
                )
            rows.append({"input_ids": [*self._start, *ids[begun:]]})
        batch = self.pad(rows, "left").to(inputs["input_ids"].device)
        return {"negative_prompt_ids": batch["input_ids"], "negative_prompt_attention_mask": batch["attention_mask"]}

    # -- ids to media

    def decode(self, ids: Any, unfinished: str = "error", skip_special_tokens: bool = True) -> list[Any]:
        """What one row of ids says: a list of str, pictures and sound in their order. See `batch_decode`."""
        return self.batch_decode([ids.tolist() if isinstance(ids, Tensor) else ids], unfinished, skip_special_tokens)[0]

    def batch_decode(self, ids: Any, unfinished: str = "error", skip_special_tokens: bool = True) -> list[list[Any]]:
        """What rows of ids say, each a list of str, pictures and sound in their order.

        A medium comes back with the size that was announced, in whole cells of the coarsest grid.

        Args:
            ids: `(B, T)`, or lists of ids.
            unfinished: of a medium that ends early, or holds an id where it cannot stand: "error" refuses it; "coarse" gives what its
                finished levels show, None in its place where not even the coarsest is finished, and leaves out ids of media that stand
                in the middle of text.
            skip_special_tokens: leave out the special tokens of the text, padding among them.

        Raises:
            ValueError: see `unfinished`; the row and the column are said.
        """
        if unfinished not in UNFINISHED:
            raise ValueError(f"unfinished must be one of {', '.join(UNFINISHED)}, got {unfinished!r}")
        found: list[list[Span]] = []
        for index, row in enumerate(ids.tolist() if isinstance(ids, Tensor) else ids):
            try:
                found.append(list(spans(self.vocabulary, [int(token) for token in row], unfinished == "error")))
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from None
        media = self._media(found)
        out: list[list[Any]] = []
        for index, row in enumerate(found):
            out.append([])
            for number, span in enumerate(row):
                if span.name is not None:
                    out[-1].append(media.get((index, number)))
                elif text := self.tokenizer.decode(span.ids, skip_special_tokens=skip_special_tokens):
                    out[-1].append(text)
        return out

    def _media(self, found: list[list[Span]]) -> dict[tuple[int, int], Any]:
        """The media of all rows, those of one modality decoded together, by row and place."""
        groups: dict[tuple[str, int], list[tuple[tuple[int, int], Codes]]] = {}
        for index, row in enumerate(found):
            for number, span in enumerate(row):
                if span.name is None or span.grid is None:
                    continue
                levels = self.vocabulary.read(span.name, span.grid, span.ids)
                if levels:
                    modality = self.vocabulary.modality(span.name)
                    size = torch.tensor([[extent * modality.layout.stride for extent in span.grid]])
                    codes = Codes(levels, size, modality.layout, self.vq_tokenizers[span.name].fingerprint)
                    groups.setdefault((span.name, len(levels)), []).append(((index, number), codes))
        media = {}
        for (name, _), members in groups.items():
            decoded = self.vq_tokenizers[name].decode(Codes.cat(codes for _, codes in members))
            media.update(zip((place for place, _ in members), decoded, strict=True))
        return media

    # -- helpers

    def _begun(self, name: str, sizes: Sequence[int] | None) -> Piece:
        begin = [self.vocabulary.special_id(name, "begin")]
        return Piece(self._numbers[name], begin if sizes is None else self.vocabulary.header(name, sizes))

    def _stop(self) -> Piece:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("this text tokenizer has no eos_token: set one, or give end=False")
        return Piece(0, [self.tokenizer.eos_token_id])

    def _items(self, samples: Any, add_generation_prompt: bool) -> tuple[list[list[Any]], list[set[int] | None]]:
        """Items of each sample, and of a chat which of them are answers."""
        rows: list[list[Any]] = []
        answers: list[set[int] | None] = []
        for sample in as_batch(samples):
            chat = is_chat(sample)
            items, own = chat_items(self.tokenizer, sample, add_generation_prompt) if chat else (sample, None)
            rows.append(items)
            answers.append(own)
        if not rows:
            raise ValueError("there are no samples: give at least one")
        return rows, answers

    def _pieces(self, rows: list[list[Any]], sampling_rate: int | None, parse_tokens: bool) -> list[list[Piece]]:
        """The ids of every item; all texts are encoded together, and all media of a modality."""
        pieces = [[Piece(0, [])] * len(row) for row in rows]
        groups: dict[str | None, list[tuple[int, int, Any]]] = {}
        for index, row in enumerate(rows):
            for number, item in enumerate(row):
                try:
                    name, medium = name_of(item, self.vq_tokenizers)
                except (ValueError, TypeError) as error:
                    raise _placed(error, f"sample {index}, item {number}") from error
                groups.setdefault(name, []).append((index, number, medium))
        for name, members in groups.items():
            if name is None:
                texts = [text for _, _, text in members]
                ids = text_ids(self.tokenizer, texts, self.vocabulary.text_size, parse_tokens)
            else:
                ids = self._written(name, members, sampling_rate)
            for (index, number, _), own in zip(members, ids, strict=True):
                pieces[index][number] = Piece(0 if name is None else self._numbers[name], own)
        return pieces

    def _written(self, name: str, members: list[tuple[int, int, Any]], sampling_rate: int | None) -> list[list[int]]:
        """The ids of media of one modality, of which some may be codes already."""
        vq = self.vq_tokenizers[name]
        raw = [medium for _, _, medium in members if not isinstance(medium, Codes)]
        rate = {} if sampling_rate is None or vq.modality != "audio" else {"sampling_rate": sampling_rate}
        try:
            encoded = iter(vq.encode(raw, **rate) if raw else ())
        except (ValueError, TypeError) as error:
            raise _placed(error, f"the media of {name!r}, counted over all samples") from error
        rows = []
        for index, number, medium in members:
            codes = medium if isinstance(medium, Codes) else next(encoded)
            try:
                rows += self.vocabulary.write(name, codes)
            except ValueError as error:
                raise _placed(error, f"sample {index}, item {number}") from error
        return rows


def _placed(error: Exception, where: str) -> Exception:
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}: {error}")


def _row(runs: list[tuple[Piece, bool]], index: int, labelled: bool, with_modalities: bool) -> dict[str, list[int]]:
    """One sample as lists: its pieces one after another, each learned or not."""
    ids = [token for piece, _ in runs for token in piece.ids]
    if not ids:
        raise ValueError(f"sample {index} has no ids: an empty text says nothing, give a text or a medium")
    row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if labelled:
        row["labels"] = [token if learned else -100 for piece, learned in runs for token in piece.ids]
    if with_modalities:
        row["modality_ids"] = [piece.modality for piece, _ in runs for _ in piece.ids]
    return row
