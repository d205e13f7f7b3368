"""Codes of text at 1, 2, 2.7 and 4 bits per byte beside lossless compressors, their priors, a classifier and sentence codes.

    python benchmarks/text.py --output_dir out/text --report docs/text_codes.md
    python benchmarks/text.py --output_dir out/text --only bytes-4 --max_steps 50    # a trial

Trains what is missing in the folder, measures on held-out topics of the embedded prose, and writes the page.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine_line
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vqtok import VQPipeline, VQTokenizer
from vqtok.encoding import encode_dataset
from vqtok.evaluation import text_report
from vqtok.evaluation.plots import save_figure
from vqtok.files import write_json, write_text, write_with
from vqtok.prior.data import MANIFEST
from vqtok.text.prose import PythonProse
from vqtok.text.semantic import SentenceCodes, prefix_neighbours, sentence_code_report
from vqtok.training import parse_arguments

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECIPES = ("bytes-4", "levels-4", "bytes-2.7", "bytes-2", "bytes-1")
GOALS = {"bytes-4": 0.99, "bytes-2.7": 0.95}
NUM_CLASSES = 12
COMMAND = "python benchmarks/text.py --output_dir out/text --report docs/text_codes.md"


@dataclass
class TextArguments:
    """What to measure."""

    output_dir: str = field(metadata={"help": "Folder for what is trained; what is there is not trained again."})
    only: list[str] | None = field(default=None, metadata={"help": "Some of the recipes, by name."})
    max_steps: int = field(default=0, metadata={"help": "Steps of every tokenizer; 0 takes those of its recipe."})
    prior_steps: int = field(default=0, metadata={"help": "The same of the priors."})
    num_threads: int = field(default=2, metadata={"help": "Threads of torch."})
    report: str | None = field(default=None, metadata={"help": "Markdown file to write, with a picture beside it."})
    remark: str = field(default="", metadata={"help": "What a reader of the report must know about this run."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train what is missing, measure, write the page; returns all figures."""
    (args,) = parse_arguments([TextArguments], argv, description=__doc__)
    torch.set_num_threads(args.num_threads)
    folder, train, test = Path(args.output_dir), PythonProse("train"), PythonProse("test")
    rows = []
    for name in args.only or RECIPES:
        rows.append(_measure(folder, name, test, args))
        print(text_report.to_markdown([rows[-1]["report"]]), flush=True)
        write_json(folder / "text.json", {"rows": rows})
    found = {
        "rows": rows,
        "lossless": lossless([p.text for p in train.passages], [p.text for p in test.passages]),
        "classifier": classify(VQTokenizer.from_pretrained(folder / rows[-1]["name"])),
        "semantic": semantic(folder),
        "data": {"train_bytes": _size(train), "test_bytes": _size(test), "python": sys.version.split()[0]},
    }
    write_json(folder / "text.json", found)
    if args.report:
        _write_page(Path(args.report), folder, found, args)
    return found


def _size(data: PythonProse) -> int:
    return sum(len(passage.text.encode()) for passage in data.passages)


def _measure(folder: Path, name: str, test: PythonProse, args: TextArguments) -> dict[str, Any]:
    """Train a tokenizer and a prior over its codes, unless they are there, and measure both on the held-out topics."""
    place, prior = folder / name, folder / f"{name}-prior"
    steps = ["--max_steps", str(args.max_steps)] if args.max_steps else []
    if not (place / "metrics.json").exists():
        _run("train_tokenizer.py", ["--config", f"text/{name}", "--output_dir", str(place), *steps], args)
    tokenizer = VQTokenizer.from_pretrained(place)
    caches = {split: folder / f"{name}-{split}" for split in ("train", "test")}
    for split, cache in caches.items():
        if not (cache / MANIFEST).exists():
            encode_dataset(tokenizer, PythonProse(split), cache)
    if not (prior / "metrics.json").exists():
        flags = ["--config", "prior/prose", "--tokenizer", str(place), "--output_dir", str(prior)]
        flags += ["--codes", str(caches["train"]), "--eval_codes", str(caches["test"])]
        _run("train_prior.py", [*flags, *(["--max_steps", str(args.prior_steps)] if args.prior_steps else [])], args)
    training = json.loads((place / "training.json").read_text(encoding="utf-8"))["arguments"]
    metrics = json.loads((prior / "metrics.json").read_text(encoding="utf-8"))
    return {
        "name": name,
        "report": text_report.evaluate(tokenizer, test, name=name),
        "steps": training["max_steps"],
        "prior_bits_per_byte": metrics["prior_bits_per_byte"],
        "samples": VQPipeline.from_pretrained(prior)(num_samples=2, seed=0),
        "reconstruction": [test[3]["text"], tokenizer.reconstruct(test[3]["text"])[0]],
    }


def _run(script: str, flags: list[str], args: TextArguments) -> None:
    command = [sys.executable, str(EXAMPLES / script), *flags, "--num_threads", str(args.num_threads)]
    subprocess.run(command, check=True)


def lossless(train: list[str], test: list[str]) -> dict[str, float]:
    """Bits per byte of what loses nothing: of each passage alone, and of all of them in one file."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(train, trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False))
    assert all(bpe.decode(bpe.encode(text).ids) == text for text in test[:20]), "byte-pair encoding loses something"
    packers = {"gzip": lambda data: gzip.compress(data, 9, mtime=0)}
    if zstd := _zstd():
        packers["zstd"] = zstd
    total = sum(len(text.encode()) for text in test)
    pieces = {
        "": [text.encode() for text in test],
        "byte-pair (4096) + ": [np.asarray(bpe.encode(text).ids, "<u2").tobytes() for text in test],
    }
    found = {
        "byte-pair (4096), 12 bits each": 12 * sum(len(piece) // 2 for piece in pieces["byte-pair (4096) + "]) / total
    }
    for before, parts in pieces.items():
        for name, pack in packers.items():
            found[f"{before}{name}, each passage alone"] = 8 * sum(len(pack(part)) for part in parts) / total
            found[f"{before}{name}, all in one"] = 8 * len(pack(b"".join(parts))) / total
    return found


def _zstd() -> Any:
    """Zstandard at its highest usual level: of Python 3.14, or of the package `zstandard`; None without either."""
    if find_spec("compression") and find_spec("compression.zstd"):
        from compression import zstd

        return lambda data: zstd.compress(data, 19)
    if find_spec("zstandard"):
        import zstandard

        return zstandard.ZstdCompressor(level=19).compress
    return None


def classify(tokenizer: VQTokenizer) -> dict[str, Any]:
    """The topic of a passage, of the largest topics: from its words, and from its codes and pairs of neighbouring codes."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    passages = PythonProse("all").passages
    topics = [passage.topic for passage in passages]
    largest = sorted(set(topics), key=lambda topic: (-topics.count(topic), topic))[:NUM_CLASSES]
    chosen = [passage for passage in passages if passage.topic in largest]
    texts, labels = [p.text for p in chosen], np.array([largest.index(p.topic) for p in chosen])
    codes = [" ".join(f"c{code}" for code in one.levels[-1][0, 0].tolist()) for one in tokenizer.encode(texts)]
    held_out = np.arange(len(chosen)) % 3 == 2
    counters = {
        "words": (texts, TfidfVectorizer(sublinear_tf=True)),
        "codes": (codes, TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
    }
    found: dict[str, Any] = {
        "classes": largest,
        "held_out": int(held_out.sum()),
    }
    for name, (documents, counter) in counters.items():
        documents = np.array(documents, dtype=object)
        model = make_pipeline(counter, LogisticRegression(C=30, max_iter=1000))
        model.fit(documents[~held_out], labels[~held_out])
        found[name] = float(model.score(documents[held_out], labels[held_out]))
    found["commonest"] = float(np.bincount(labels[held_out]).max() / held_out.sum())
    return found


def semantic(folder: Path) -> dict[str, Any]:
    """Codes of passages from vectors of latent semantic analysis, in the place of a sentence encoder; a picture of them."""
    from matplotlib.figure import Figure
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
    same, chance, examples = [], [], []
    for query in range(0, len(passages), 7):
        others = [i for i in prefix_neighbours(codes, codes[query]) if i != query]
        others = others or [i for i in np.flatnonzero(codes[:, 0] == codes[query, 0]) if i != query]
        if others:
            same.append(float(np.mean(topics[others] == topics[query])))
            chance.append(float(np.mean(topics == topics[query])))
        if others and len(examples) < 4 and query % 5 == 0:
            shown = [passages[i].text[:100] for i in (query, *others[:2])]
            examples.append({"code": codes[query].tolist(), "texts": shown})
    figure = Figure(figsize=(8, 4), layout="constrained")
    flat = PCA(2, random_state=0).fit_transform(vectors)
    for axes, level in zip(figure.subplots(1, 2), (0, 1), strict=True):
        axes.scatter(*flat.T, c=codes[:, level], cmap="turbo", s=4)
        axes.set(title=f"passages, coloured by the code of level {level}", xticks=[], yticks=[])
    picture = save_figure(figure)
    write_with(folder / "sentence_codes.png", lambda path: picture.save(path, format="PNG"))
    return {
        "report": sentence_code_report(codes, 64),
        "neighbours_of_the_same_topic": float(np.mean(same)),
        "chance": float(np.mean(chance)),
        "examples": examples,
    }


def _when(args: TextArguments) -> str:
    where = machine_line(torch.device("cpu"), "transformers")
    return f"on {date.today().isoformat()}, {where}, {args.num_threads} threads. {args.remark}".rstrip()


def _write_page(page: Path, folder: Path, found: dict[str, Any], args: TextArguments) -> None:
    rows, semantic_, classifier = found["rows"], found["semantic"], found["classifier"]
    picture = page.with_suffix(".png")
    write_with(picture, lambda path: Path(path).write_bytes((folder / "sentence_codes.png").read_bytes()))
    lines = [
        "# Text codes",
        "",
        "Short, fixed-rate, lossy codes of text, for clustering, retrieval, conditioning and study. **They do not replace byte-pair",
        "encoding in a language model**: no public result shows text codes doing so. Compressors that lose nothing stand beside them.",
        "What follows was written by",
        "",
        f"    {COMMAND}",
        "",
        _when(args),
        "",
        f"The data are the embedded prose of Python {found['data']['python']}: {found['data']['train_bytes']:,} bytes to train on, "
        f"{found['data']['test_bytes']:,} bytes of other topics to measure with.",
        "",
        "## What comes back",
        "",
        text_report.to_markdown([row["report"] for row in rows]),
        "",
        "Exact chunks are those of 64 bytes without an error. Asked were "
        + " and ".join(f"{100 * goal:.0f} % of bytes with `text/{name}`" for name, goal in GOALS.items())
        + ": "
        + "; ".join(
            f"{row['name']} {'reaches' if row['report']['unit_accuracy'] >= GOALS[row['name']] else 'does not reach'} it "
            f"({100 * row['report']['unit_accuracy']:.2f} %)"
            for row in rows
            if row["name"] in GOALS
        )
        + ".",
        "",
        "## What the codes cost",
        "",
        "| | bits per byte | |",
        "| --- | ---: | --- |",
    ]
    for row in rows:
        rate = row["report"]["bits_per_byte"]["nominal"]
        lines.append(f"| {row['name']}, fixed rate | {rate:.2f} | lossy |")
        lines.append(f"| {row['name']}, under its own prior | {row['prior_bits_per_byte']:.2f} | lossy |")
    lines += [f"| {name} | {bits:.2f} | lossless |" for name, bits in found["lossless"].items()]
    if _zstd() is None:
        lines += ["", "Zstandard was not there: Python 3.14 brings it, before that the package `zstandard`."]
    lines += [
        "",
        "## What the codes know",
        "",
        f"The topic of a passage, one of the {len(classifier['classes'])} largest, of {classifier['held_out']} held-out passages: "
        f"{100 * classifier['words']:.1f} % right from its words, {100 * classifier['codes']:.1f} % from codes and pairs of codes of "
        f"`text/{rows[-1]['name']}`, {100 * classifier['commonest']:.1f} % by always saying the commonest. "
        "The tokenizer saw most of these passages, without their topics, when it was trained.",
        "",
        "## Codes of whole passages",
        "",
        "Three levels of 64 codes of vectors of 64 numbers (latent semantic analysis, where a sentence encoder could stand):",
        f"{semantic_['report']['unique_ratio']:.1%} of {semantic_['report']['num_sentences']} passages have a code of their own, "
        f"entropies {', '.join(f'{bits:.2f}' for bits in semantic_['report']['entropy_bits'])} of 6 bits, "
        f"collapsed: {'; '.join(semantic_['report']['collapsed']) or 'nothing'}. "
        f"Of the neighbours by the longest common prefix {semantic_['neighbours_of_the_same_topic']:.1%} are of the same topic, "
        f"{semantic_['chance']:.1%} by chance.",
        "",
        f"![passages by their codes]({picture.name})",
        "",
    ]
    for example in semantic_["examples"]:
        lines += [f"Passages near the code {example['code']}:", "", *(f"- {text!r}" for text in example["texts"]), ""]
    for row in rows:
        lines += [f"## {row['name']}", "", f"{row['steps']} steps. A held-out passage and what comes back:", ""]
        lines += ["```text", row["reconstruction"][0], "```", "", "```text", row["reconstruction"][1], "```", ""]
        lines += ["Samples of its prior:", "", *(f"```text\n{text}\n```\n" for text in row["samples"])]
    write_text(page, "\n".join(lines))


if __name__ == "__main__":
    main()
