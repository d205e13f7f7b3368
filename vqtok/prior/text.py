"""Words as conditions: a byte-pair tokenizer of one's own captions, and prompts that are checked against what was seen."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vqtok.files import read_json
from vqtok.hub.folders import fetch_folder

# What a text tokenizer's folder consists of, for downloads.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The text tokenizer of a folder that a stranger may have written. No code of it is run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files are damaged.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer_config.json: save it again with save_pretrained")
    for path in sorted(folder.glob("*token*.json")):
        if path.name in TOKENIZER_FILES:
            read_json(path)
    files = read_json(folder / "tokenizer_config.json").get("fast_tokenizer_files") or []
    if not isinstance(files, list) or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: fast_tokenizer_files must name files beside it, got {files!r}: remove it"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever wrong values lead to; the parser of tokenizers raises bare exceptions
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: the text tokenizer is damaged ({type(error).__name__}: {reason}): save or download it again"
        ) from error


def open_text_tokenizer(
    id_or_folder: str | os.PathLike,
) -> tuple[PreTrainedTokenizerBase, dict[str, str] | None]:
    """A text tokenizer of a folder or of a repository on the Hub, and the `{"repo", "revision"}` it comes from, None for a folder.

    Raises:
        OSError: there is no such tokenizer.
        ValueError: its files are damaged.
    """
    folder, commit = fetch_folder(id_or_folder, (*TOKENIZER_FILES, "config.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer, None if commit is None else {"repo": str(id_or_folder), "revision": commit}


def train_text_tokenizer(captions: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Return a byte-level byte-pair tokenizer (as GPT-2's) of these captions.

    Runs of white space count as one space; case is kept. Any text can be encoded, so nothing is unknown, and there are no special
    tokens: the prior brings its own. Words become single tokens as long as `vocab_size` allows, the frequent ones first.

    Args:
        captions: texts to learn from.
        vocab_size: at most so many tokens, at least 257 (every byte has one).

    Example:
        >>> tokenizer = train_text_tokenizer(["a red three", "a blue seven"])
        >>> len(tokenizer("a blue three").input_ids), tokenizer.decode(tokenizer("a  blue three").input_ids)
        (3, ' a blue three')

    Raises:
        ValueError: no captions, or a vocabulary too small for the bytes.
    """
    captions = [_text(caption, f"caption {index}") for index, caption in enumerate(captions)]
    if not captions:
        raise ValueError("there are no captions to learn a text tokenizer from: give at least one")
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and one merge), got {vocab_size}")
    tokenizer = Tokenizer(BPE())
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip(), spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        captions, BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_length: int,
    seen_ids: Iterable[int] | None = None,
    special_tokens: bool = False,
) -> list[list[int]]:
    """Return the token ids of each prompt; training captions go through the same function.

    Args:
        tokenizer: any text tokenizer of transformers.
        prompts: texts.
        max_length: the most tokens the prior takes.
        seen_ids: tokens that occurred in the training captions; None asks for nothing.
        special_tokens: whether to add those of the tokenizer; text encoders want them, a prior has its own.

    Raises:
        ValueError: a prompt that is empty, too long, or has a word that the captions never had; the nearest known words are named.
    """
    seen = None if seen_ids is None else frozenset(seen_ids)
    texts = [_text(prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
    encoded = tokenizer(texts, add_special_tokens=special_tokens).input_ids if texts else []
    for index, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        if seen is not None and not seen.issuperset(ids):
            words = [word for word in text.split() if not seen.issuperset(_ids(tokenizer, word))]
            word = words[0] if words else text
            near = ", ".join(map(repr, _nearest(word, _words(tokenizer, seen))))
            raise ValueError(
                f"prompt {index}: the training captions never had the word {_short(word)!r}; the nearest known words are {near}"
            )
        if len(ids) > max_length:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, this prior takes at most {max_length}: shorten {_short(text)!r}"
            )
    return encoded


def seen_token_ids(encoded: Iterable[Iterable[int]]) -> list[int]:
    """The sorted ids that occur in encoded captions."""
    return sorted({token for ids in encoded for token in ids})


def to_ranges(ids: Iterable[int]) -> list[list[int]]:
    """Sorted ids as inclusive ranges, for JSON.

    Example:
        >>> to_ranges([3, 4, 5, 9])
        [[3, 5], [9, 9]]
    """
    ranges: list[list[int]] = []
    for value in sorted(ids):
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return ranges


def from_ranges(ranges: Iterable[Sequence[int]]) -> list[int]:
    """The exact inverse of `to_ranges`."""
    return [value for first, last in ranges for value in range(first, last + 1)]


def _text(value: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text, got {value!r}")
    if not value.strip():
        raise ValueError(f"{where} is empty: write what is wanted, or give None for a sample without condition")
    return value


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _words(tokenizer: PreTrainedTokenizerBase, seen: Iterable[int]) -> list[str]:
    decoded = (str(tokenizer.decode([token])).strip() for token in sorted(seen))
    return [word for word in decoded if re.search(r"\w", word)]


def _nearest(word: str, known: list[str]) -> list[str]:
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.0)]


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
