"""Codes of text at 1, 2, 2.7 and 4 bits per byte beside lossless compressors, their priors, a classifier and sentence codes.

    python benchmarks/text.py --output_dir out/text --report docs/text_codes.md
    python benchmarks/text.py --output_dir out/text --only bytes-4                           # one part of it
    python benchmarks/text.py --output_dir out/trial --only bytes-4 --max_steps 50 --prior_steps 10

Trains what is missing in the folder, measures on held-out topics of the embedded prose, and writes the page.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from text_page import write_page
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vqtok import VQPipeline, VQTokenizer
from vqtok.encoding import encode_dataset
from vqtok.evaluation import text_report
from vqtok.evaluation.plots import save_figure
from vqtok.files import write_json, write_with
from vqtok.prior.data import MANIFEST
from vqtok.text.prose import PythonProse
from vqtok.text.semantic import SentenceCodes, prefix_neighbours, sentence_code_report
from vqtok.training import parse_arguments

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NUM_PAIRS = 8192  # entries of the byte-pair encoding
NUM_PHRASES = 65_536  # of one whose entries may hold several words, as large as the tables of spans
RECIPES = ("bytes-4", "spans-4", "levels-4", "bytes-2.7", "spans-2.7", "bytes-2", "bytes-1")
NUM_CLASSES = 12
PICTURE = "sentence_codes.png"
LARGEST_CODEBOOK = 4096  # of which a prior is trained; the embedded prose shows most codes of a larger one a few times


@dataclass
class TextArguments:
    """What to measure."""

    output_dir: str = field(metadata={"help": "Folder for what is trained; what is there is not trained again."})
    only: list[str] | None = field(default=None, metadata={"help": "Some of the recipes, by name."})
    max_steps: int = field(default=0, metadata={"help": "Steps of every tokenizer; 0 takes those of its recipe."})
    prior_steps: int = field(default=0, metadata={"help": "The same of the priors."})
    num_threads: int = field(default=2, metadata={"help": "Threads of torch."})
    report: str | None = field(default=None, metadata={"help": "Markdown file to write, with a picture beside it."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train what is missing, measure, write the page; returns all figures."""
    (args,) = parse_arguments([TextArguments], argv, description=__doc__)
    torch.set_num_threads(args.num_threads)
    folder, train, test = Path(args.output_dir), PythonProse("train"), PythonProse("test")
    texts = [passage.text for passage in train.passages]
    pairs, phrases = learn_pairs(texts, NUM_PAIRS), learn_pairs(texts, NUM_PHRASES, across_words=True)
    rows = []
    for name in args.only or RECIPES:
        rows.append(_measure(folder, name, test, args))
        print(text_report.to_markdown([rows[-1]["report"]]), flush=True)
        write_json(folder / "text.json", {"rows": rows})
    found = {
        "rows": rows,
        "largest_codebook": LARGEST_CODEBOOK,
        "lossless": lossless(pairs, phrases, [p.text for p in test.passages]),
        "classifier": classify({row["name"]: VQTokenizer.from_pretrained(folder / row["name"]) for row in rows}),
        "semantic": semantic(folder),
        "data": {"train_bytes": _size(train), "test_bytes": _size(test), "python": sys.version.split()[0]},
    }
    write_json(folder / "text.json", found)
    if args.report:
        write_page(Path(args.report), folder / PICTURE, found)
    return found


def _size(data: PythonProse) -> int:
    return sum(len(passage.text.encode()) for passage in data.passages)


def learn_pairs(train: list[str], entries: int, across_words: bool = False) -> Tokenizer:
    """Byte-pair encoding of these texts, which spells any text; usually no entry reaches beyond a word."""
    pairs, by_word = Tokenizer(models.BPE()), not across_words
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_word)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=entries, initial_alphabet=alphabet, show_progress=False)
    pairs.train_from_iterator(train, trainer)
    return pairs


def _measure(folder: Path, name: str, test: PythonProse, args: TextArguments) -> dict[str, Any]:
    """Train a tokenizer and a prior over its codes, unless they are there, and measure both on the held-out topics."""
    place = folder / name
    if not (place / "metrics.json").exists():
        flags = ["--config", f"text/{name}", "--output_dir", str(place)]
        _run("train_tokenizer.py", flags, args.max_steps, args.num_threads)
    tokenizer = VQTokenizer.from_pretrained(place)
    training = json.loads((place / "training.json").read_text(encoding="utf-8"))
    report = text_report.evaluate(tokenizer, test, name=name)
    bits = zip(report["entropy_bits"], tokenizer.layout.levels, strict=True)
    return {
        "name": name,
        "report": report,
        "steps": training["arguments"]["max_steps"],
        "minutes": training["seconds"] / 60,
        "threads": training["arguments"]["num_threads"],
        "entropy_per_byte": sum(sum(codebooks) / level.stride for codebooks, level in bits),
        "prior": _prior(folder, name, tokenizer, args),
        "wrong": wrong_by_kind(tokenizer, test),
        "pairs": pair_entropies(tokenizer, test) if name == "bytes-4" else None,
        "spans": known_spans(tokenizer, test) if name.startswith("spans") else None,
        "reconstruction": [test[3]["text"], tokenizer.reconstruct(test[3]["text"])[0]],
    }


def _prior(folder: Path, name: str, tokenizer: VQTokenizer, args: TextArguments) -> dict[str, Any] | None:
    """Bits per byte of the codes under a prior of their own, and samples of it; None where a codebook is too large for one."""
    if any(level.codebook_size > LARGEST_CODEBOOK for level in tokenizer.layout.levels):
        return None
    place, caches = folder / f"{name}-prior", [folder / f"{name}-{split}" for split in ("train", "test")]
    if not (place / "metrics.json").exists():
        for split, cache in zip(("train", "test"), caches, strict=True):
            if not (cache / MANIFEST).exists():
                encode_dataset(tokenizer, PythonProse(split), cache)
        flags = ["--config", "prior/prose", "--tokenizer", str(folder / name), "--output_dir", str(place)]
        flags += ["--codes", str(caches[0]), "--eval_codes", str(caches[1])]
        _run("train_prior.py", flags, args.prior_steps, args.num_threads)
    metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    samples = VQPipeline.from_pretrained(place)(num_samples=2, seed=0)
    return {"bits_per_byte": metrics["prior_bits_per_byte"], "samples": samples}


def _run(script: str, flags: list[str], max_steps: int, num_threads: int) -> None:
    """Run an example; 0 steps are those of its recipe."""
    steps = ["--max_steps", str(max_steps)] if max_steps else []
    command = [sys.executable, str(EXAMPLES / script), *flags, *steps, "--num_threads", str(num_threads)]
    subprocess.run(command, check=True)


def wrong_by_kind(tokenizer: VQTokenizer, test: PythonProse) -> dict[str, tuple[float, float]]:
    """Kind of byte -> its share of the text, and the share of these bytes that come back wrong."""
    kinds = {
        "lower case": range(97, 123),
        "spaces and line ends": (10, 32),
        "capitals": range(65, 91),
        "digits": range(48, 58),
    }
    kind_of = np.full(256, len(kinds))
    for place, members in enumerate(kinds.values()):
        kind_of[list(members)] = place
    counts = np.zeros((2, len(kinds) + 1))
    for passage in test.passages:
        ids, (size,) = tokenizer.processor.prepare(passage.text)
        back = tokenizer.model.decode_long(tokenizer.encode(passage.text).levels)[0, :size]
        counts[0] += np.bincount(kind_of[ids[:size]], minlength=len(kinds) + 1)
        counts[1] += np.bincount(kind_of[ids[:size]], (back != ids[:size]).numpy(), minlength=len(kinds) + 1)
    shares, wrong = counts[0] / counts[0].sum(), counts[1] / counts[0].clip(1)
    return dict(zip([*kinds, "all others"], zip(shares.tolist(), wrong.tolist(), strict=True), strict=True))


def pair_entropies(tokenizer: VQTokenizer, test: PythonProse) -> dict[str, float]:
    """Of a tokenizer with one code per two bytes: what pairs and codes tell of each other, in bits."""
    pairs, codes = [], []
    for passage in test.passages:
        ids, (size,) = tokenizer.processor.prepare(passage.text)
        pairs.append((ids[0::2].long() * 512 + ids[1::2].long()).numpy())
        codes.append(tokenizer.encode(passage.text).levels[0][0, 0].numpy())

    def entropy(values: np.ndarray) -> float:
        share = np.unique(values, return_counts=True)[1] / len(values)
        return float(-(share * np.log2(share)).sum())

    pair, code = np.concatenate(pairs), np.concatenate(codes)
    joint = entropy(pair * 256 + code)
    return {
        "different": len(np.unique(pair)),
        "entropy": entropy(pair),
        "code_given_pair": joint - entropy(pair),
        "pair_given_code": joint - entropy(code),
    }


@torch.no_grad()
def known_spans(tokenizer: VQTokenizer, test: PythonProse) -> dict[str, float]:
    """Of a codebook of spans: how many held-out spans are none of it, and the wrong bytes of a span that is, and of one that is not."""
    model, counts, wrong = tokenizer.model, np.zeros(2), np.zeros(2)
    stride = model.layout.stride
    for passage in test.passages:
        ids, (size,) = tokenizer.processor.prepare(passage.text)
        media = torch.as_tensor(ids)[None]
        output = model.encode(media)
        (latents,), (quantized,) = output.latents, output.quantized
        is_new = ((latents - quantized).norm(dim=-1) > 1e-3 * latents.norm(dim=-1))[0, : size // stride].long().numpy()
        back = model.decode_long(output.codes)
        errors = (back != media)[0].view(-1, stride).sum(1)[: size // stride].numpy()
        counts += np.bincount(is_new, minlength=2)
        wrong += np.bincount(is_new, errors, minlength=2)
    known, new = (wrong / counts.clip(1)).tolist()
    return {"new": float(counts[1] / counts.sum()), "wrong_of_known": known, "wrong_of_new": new, "bytes": stride}


def lossless(pairs: Tokenizer, phrases: Tokenizer, test: list[str]) -> dict[str, float]:
    """Bits per byte of what loses nothing: of each passage alone, and of all of them in one file."""
    for each in (pairs, phrases):
        assert all(each.decode(each.encode(text).ids) == text for text in test[:20]), (
            "byte-pair encoding loses something"
        )
    zstd = pyarrow.Codec("zstd", 19)
    packers = {
        "gzip": lambda data: gzip.compress(data, 9, mtime=0),
        "zstd": lambda data: zstd.compress(data, asbytes=True),
    }
    total = sum(len(text.encode()) for text in test)
    name = f"byte-pair ({pairs.get_vocab_size()})"
    found, ids = {}, {}
    for title, each in ((name, pairs), (f"byte-pair across words ({phrases.get_vocab_size()})", phrases)):
        bits = (each.get_vocab_size() - 1).bit_length()
        ids[title] = [each.encode(text).ids for text in test]
        found[f"{title}, {bits} bits each"] = bits * sum(map(len, ids[title])) / total
    pieces = {
        "": [text.encode() for text in test],
        f"{name} + ": [np.asarray(row, "<u2").tobytes() for row in ids[name]],
    }
    for before, parts in pieces.items():
        for packer, pack in packers.items():
            found[f"{before}{packer}, each passage alone"] = 8 * sum(len(pack(part)) for part in parts) / total
            found[f"{before}{packer}, all in one"] = 8 * len(pack(b"".join(parts))) / total
    return found


def classify(tokenizers: dict[str, VQTokenizer]) -> dict[str, Any]:
    """The topic of a passage, of the largest topics: from its words, and from each tokenizer's codes and pairs of neighbouring codes."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    passages = PythonProse("all").passages
    topics = [passage.topic for passage in passages]
    largest = sorted(set(topics), key=lambda topic: (-topics.count(topic), topic))[:NUM_CLASSES]
    chosen = [passage for passage in passages if passage.topic in largest]
    texts, labels = [p.text for p in chosen], np.array([largest.index(p.topic) for p in chosen])
    held_out = np.arange(len(chosen)) % 3 == 2
    counters = {"words": (texts, TfidfVectorizer(sublinear_tf=True))}
    for name, tokenizer in tokenizers.items():
        # All codebooks of a step are one word.
        steps = [one.levels[-1][0].T.tolist() for one in tokenizer.encode(texts)]
        codes = [" ".join("c" + "x".join(map(str, step)) for step in row) for row in steps]
        counters[name] = (codes, TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True))
    right = {}
    for name, (documents, counter) in counters.items():
        documents = np.array(documents, dtype=object)
        model = make_pipeline(counter, LogisticRegression(C=30, max_iter=1000))
        model.fit(documents[~held_out], labels[~held_out])
        right[name] = float(model.score(documents[held_out], labels[held_out]))
    right["the commonest topic, always"] = float(np.bincount(labels[held_out]).max() / held_out.sum())
    return {"classes": largest, "held_out": int(held_out.sum()), "right": right}


def semantic(folder: Path) -> dict[str, Any]:
    """Codes of passages from vectors of latent semantic analysis, in the place of a sentence encoder; a picture of them."""
    from sklearn.decomposition import PCA, TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    passages = PythonProse("all").passages
    counted = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english").fit_transform(
        [p.text for p in passages]
    )
    vectors = TruncatedSVD(64, random_state=0).fit_transform(counted).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-6)
    codes = SentenceCodes(64, num_levels=3, codebook_size=64).fit(vectors).encode(vectors)
    topics = np.array([p.topic for p in passages])
    examples = []
    for query in range(0, len(passages), 701):
        others = np.delete(np.arange(len(passages)), query)
        nearest = others[prefix_neighbours(codes[others], codes[query], at_least=0)]
        shared = int((codes[nearest[0]] == codes[query]).cumprod().sum())
        examples.append({"shared": shared, "texts": [passages[i].text[:100] for i in (query, *nearest[:3])]})
    same = [_same_topic(codes[:, :length], topics) for length in range(4)]
    _draw(folder / PICTURE, PCA(2, random_state=0).fit_transform(vectors), codes, same)
    return {"report": sentence_code_report(codes, 64), "same_topic": same, "examples": examples}


def _same_topic(prefixes: np.ndarray, topics: np.ndarray) -> float:
    """The chance that two passages of one prefix are of one topic."""
    both = alike = 0
    _, group_of = np.unique(prefixes, axis=0, return_inverse=True)
    for group in range(int(group_of.max()) + 1):
        _, sizes = np.unique(topics[group_of.reshape(-1) == group], return_counts=True)
        both += int(sizes.sum()) * (int(sizes.sum()) - 1)
        alike += int((sizes * (sizes - 1)).sum())
    return alike / max(1, both)


def _draw(path: Path, flat: np.ndarray, codes: np.ndarray, same: list[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(*flat.T, c="0.85", s=3)
    for code in np.bincount(codes[:, 0]).argsort()[::-1][:8]:
        left.scatter(*flat[codes[:, 0] == code].T, s=6, label=str(code))
    left.legend(title="first code", fontsize=7, markerscale=2)
    left.set(title="passages, by their first code (eight commonest)", xticks=[], yticks=[])
    right.bar(["none", "1", "2", "3"], [100 * share for share in same])
    right.set(title="pairs of passages of one topic", xlabel="codes that the two share", ylabel="%")
    picture = save_figure(figure)
    write_with(path, lambda temporary: picture.save(temporary, format="PNG"))


if __name__ == "__main__":
    main()
