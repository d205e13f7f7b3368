"""The page of `text.py`: its figures in words and tables."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import torch
from measuring import machine_line

from vqtok.evaluation import text_report
from vqtok.files import write_text, write_with

GOALS = {"bytes-4": 0.99, "spans-4": 0.99, "bytes-2.7": 0.95, "spans-2.7": 0.95}
COMMAND = "python benchmarks/text.py --output_dir out/text --report docs/text_codes.md"


def _goals(rows: list[dict[str, Any]]) -> str:
    """What was asked, and what came."""
    told = []
    for row in rows:
        if row["name"] in GOALS:
            goal, got = GOALS[row["name"]], row["report"]["byte_accuracy"]
            told.append(
                f"{100 * goal:.0f} % of `{row['name']}`, {'reached' if got >= goal else 'not reached'} with {100 * got:.2f} %"
            )
    return f"Asked were {'; '.join(told)}." if told else "No rate with a goal was measured."


def _wrong_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Which bytes are lost, and why."""
    kinds = list(rows[0]["wrong"])
    table = {"share of the text": [rows[0]["wrong"][kind][0] for kind in kinds]}
    table |= {row["name"]: [row["wrong"][kind][1] for kind in kinds] for row in rows}
    lines = ["Which bytes come back wrong, in % of each kind:", "", f"| tokenizer | {' | '.join(kinds)} |"]
    lines += [f"| --- |{' ---: |' * len(kinds)}"]
    lines += [f"| {name} | {' | '.join(f'{100 * share:.1f}' for share in row)} |" for name, row in table.items()]
    for row in rows:
        if row["pairs"]:
            pairs = row["pairs"]
            lines += [
                "",
                f"Why `{row['name']}` does not get all: a code of 256 stands for a pair of bytes, of which the held-out text has "
                f"{pairs['different']:,} different ones, with an entropy of {pairs['entropy']:.2f} bits, so that rare pairs share the "
                f"codes of common ones. Given the pair, {pairs['code_given_pair']:.2f} bits of the code depend on what surrounds it; "
                f"given the code, {pairs['pair_given_code']:.2f} bits of the pair are left, which the decoder has to find in what stands "
                "around it. It learns that from the training text, and knows that better than new text.",
            ]
        if row["spans"]:
            spans = row["spans"]
            lines += [
                "",
                f"Why `{row['name']}` loses some: its table is the spans of {spans['bytes']} bytes that are commonest in the training "
                f"text. {spans['new']:.1%} of the held-out spans are none of them, and come back as one that is alike, with "
                f"{spans['wrong_of_new']:.2f} wrong bytes each; of those in the table {spans['wrong_of_known']:.3f} bytes are wrong.",
            ]
    return [*lines, ""]


def write_page(page: Path, drawing: Path, found: dict[str, Any]) -> None:
    """The page of what `text.py` found, and beside it the picture of sentence codes."""
    rows, semantic_, classifier = found["rows"], found["semantic"], found["classifier"]
    picture = page.with_suffix(".png")
    write_with(picture, lambda path: Path(path).write_bytes(drawing.read_bytes()))
    lines = [
        "# Text codes",
        "",
        "Short, fixed-rate, lossy codes of text, for clustering, retrieval, conditioning and study. **They do not replace byte-pair",
        "encoding in a language model**: no public result shows text codes doing so. Compressors that lose nothing stand beside them.",
        "What follows was written by",
        "",
        f"    {COMMAND}",
        "",
        f"on {date.today().isoformat()}, {machine_line(torch.device('cpu'), 'transformers')}.",
        "",
        f"The data are the embedded prose of Python {found['data']['python']}: {found['data']['train_bytes']:,} bytes to train on, "
        f"{found['data']['test_bytes']:,} bytes of other topics to measure with.",
        "",
        "## What comes back",
        "",
        text_report.to_markdown([row["report"] for row in rows]),
        "",
        "Exact chunks are those of 64 bytes without an error. " + _goals(rows),
        "",
        *_wrong_lines(rows),
        "## What the codes cost",
        "",
        "| | bits per byte | |",
        "| --- | ---: | --- |",
    ]
    for row in rows:
        rate = row["report"]["bits_per_byte"]["nominal"]
        lines.append(f"| {row['name']}, fixed rate | {rate:.2f} | lossy |")
        lines.append(f"| {row['name']}, entropy of its codes one by one | {row['entropy_per_byte']:.2f} | lossy |")
        if row["prior"]:
            lines.append(f"| {row['name']}, under its own prior | {row['prior']['bits_per_byte']:.2f} | lossy |")
    lines += [f"| {name} | {bits:.2f} | lossless |" for name, bits in found["lossless"].items()]
    lines += [
        "",
        "Who wants the text itself back takes byte-pair encoding: with entries that may hold several words it loses nothing, at a rate",
        "that depends on the text. Codes of a fixed rate are for what it does not give: as many codes for every so many bytes, and rates",
        "below it.",
    ]
    if not all(row["prior"] for row in rows):
        lines += [
            "",
            f"No prior was trained over codebooks of more than {found['largest_codebook']} codes: in so little text most are rare.",
        ]
    lines += [
        "",
        "## What the codes know",
        "",
        f"The topic of a passage, one of the {len(classifier['classes'])} largest, of {classifier['held_out']} held-out passages, "
        "by logistic regression on words, or on codes and pairs of neighbouring codes (the tokenizers saw most of these passages, without",
        "their topics, when they were trained):",
        "",
        "| | right % |",
        "| --- | ---: |",
        *(f"| {name} | {100 * share:.1f} |" for name, share in classifier["right"].items()),
        "",
        "## Codes of whole passages",
        "",
        "Three levels of 64 codes of vectors of 64 numbers (latent semantic analysis, where a sentence encoder could stand):",
        f"{semantic_['report']['unique_ratio']:.1%} of {semantic_['report']['num_sentences']} passages have a code of their own, "
        f"entropies {', '.join(f'{bits:.2f}' for bits in semantic_['report']['entropy_bits'])} of 6 bits, "
        f"collapsed: {'; '.join(semantic_['report']['collapsed']) or 'nothing'}. "
        f"Two passages are of the same topic in {semantic_['same_topic'][0]:.1%} of all pairs, "
        + ", ".join(f"{share:.1%} of those that share {n}" for n, share in enumerate(semantic_["same_topic"]) if n)
        + " codes.",
        "",
        f"![passages by their codes]({picture.name})",
        "",
    ]
    for example in semantic_["examples"]:
        lines += [
            f"A passage, and its nearest neighbours by prefix ({example['shared']} of 3 codes shared):",
            "",
            *(f"- {text!r}" for text in example["texts"]),
            "",
        ]
    for row in rows:
        lines += [
            f"## {row['name']}",
            "",
            f"{row['steps']} steps in {row['minutes']:.0f} minutes, threads {row['threads']}.",
            "",
            "A held-out passage and what comes back:",
            "",
        ]
        lines += ["```text", row["reconstruction"][0], "```", "", "```text", row["reconstruction"][1], "```", ""]
        if row["prior"]:
            lines += ["Samples of its prior:", "", *(f"```text\n{text}\n```\n" for text in row["prior"]["samples"])]
    write_text(page, "\n".join(lines))
