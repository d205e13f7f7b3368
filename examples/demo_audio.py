"""The whole path of sound: recorded words -> codec -> codes -> prior -> phrases spoken from text, judged and reported.

    python examples/demo_audio.py --output_dir demo-audio          (`make demo-audio` sets everything up first)

A stage that is finished is not repeated, so that a stopped demo continues. Remove the folder to start over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from vqtok import VQPipeline, VQTokenizer
from vqtok.audio.files import write_file
from vqtok.audio.phrases import SpokenNumbers
from vqtok.encoding import encode_dataset
from vqtok.evaluation.html import Page
from vqtok.evaluation.plots import curves, usage_bars
from vqtok.evaluation.report import machine
from vqtok.evaluation.spectrograms import spectrograms
from vqtok.evaluation.stages import Stages, launch, record_judged
from vqtok.evaluation.word_judge import judge_speech
from vqtok.files import write_json, write_text, write_with
from vqtok.prior.data import MANIFEST, CodeDataset
from vqtok.quantizers import code_counts
from vqtok.training import parse_arguments
from vqtok.training.setup import best_device, run_script

HERE = Path(__file__).resolve().parent
SEED = 1  # of the judged joins and of what is spoken; training has the recipes' own
GOALS = {"word_accuracy": 0.90}
MOST_MINUTES = 10.0
# What is judged and shown side by side.
KINDS = {
    "real": "the recordings, joined",
    "reconstructed": "the same through the codec",
    "spoken": "spoken by the prior from the text",
}
HONEST = (
    "Nearly every word has one recording of one speaker, and training heard all of them. What is new here are the phrases: none of those "
    "below was in training. So this shows that the prior puts words together from text, and that they can be understood; it says nothing "
    "about new voices, or new ways to say a word."
)
LICENCE = (
    "The recordings are (c) 2003-2010 Allison Smith, funded by Digium, Inc., from the Asterisk core sounds, under CC-BY-SA 3.0; so is "
    "the sound on this page, which is joined from them or made by models of them."
)


@dataclass
class DemoArguments:
    """How much of it."""

    output_dir: str = field(default="demo-audio", metadata={"help": "Folder of everything that is made."})
    tokenizer: str = field(default="audio/spoken-16khz", metadata={"help": "Recipe of the codec."})
    prior: str = field(default="prior/spoken", metadata={"help": "Recipe of the prior."})
    tokenizer_steps: int = field(default=0, metadata={"help": "Steps of the codec; 0 takes the recipe's."})
    prior_steps: int = field(default=0, metadata={"help": "Steps of the prior; 0 takes the recipe's."})
    num_phrases: int = field(default=8000, metadata={"help": "Phrases whose codes the prior is trained on."})
    num_judged: int = field(default=100, metadata={"help": "Phrases never trained on that are spoken and judged."})
    num_threads: int = field(default=0, metadata={"help": "Threads of torch; 0 takes every core."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is not done yet, write the report, and return what metrics.json holds."""
    (args,) = parse_arguments([DemoArguments], argv, description=__doc__)
    folder = Path(args.output_dir)
    torch.set_num_threads(args.num_threads or os.cpu_count() or 1)
    stages = Stages(folder / "progress.json")

    stages.run("train the codec", lambda: launch(HERE / "train_tokenizer.py", folder / "tokenizer", [
        "--config", args.tokenizer,
    ], args.num_threads, args.tokenizer_steps))  # fmt: skip
    tokenizer = VQTokenizer.from_pretrained(folder / "tokenizer", device=best_device())
    for split, number in (("train", args.num_phrases), ("test", max(32, args.num_judged))):
        if not (folder / "codes" / split / MANIFEST).exists():
            phrases = SpokenNumbers(split, number, 0, tokenizer.processor.sampling_rate)
            stages.run(f"encode {split}", lambda s=phrases, p=split: encode_dataset(tokenizer, s, folder / "codes" / p))
    stages.run("train the prior", lambda: launch(HERE / "train_prior.py", folder / "pipeline", [
        "--config", args.prior, "--tokenizer", str(folder / "tokenizer"),
        "--codes", str(folder / "codes" / "train"), "--eval_codes", str(folder / "codes" / "test"),
    ], args.num_threads, args.prior_steps))  # fmt: skip

    stages.forget("speak and judge", "report")
    with stages.timed("speak and judge"):
        pipeline = VQPipeline.from_pretrained(folder / "pipeline", device=best_device())
        judged = judge_speech(pipeline, tokenizer, args.num_judged, SEED)
    trained_on = set(CodeDataset(folder / "codes" / "train").columns["text"])
    if known := trained_on & set(judged["texts"]):
        raise ValueError(f"{sorted(known)[0]!r} was trained on, so that it cannot be judged as unseen: remove {folder}")
    metrics = _metrics(folder, tokenizer, judged, stages)
    metrics["num_phrases"], metrics["num_different_phrases"] = args.num_phrases, len(trained_on)
    with stages.timed("report"):
        page = _report(folder, tokenizer, metrics, judged)
    # The page itself says what everything took, its own making included.
    metrics["seconds_per_stage"] = {name: round(value, 1) for name, value in stages.spent.items()}
    metrics["minutes"] = round(stages.seconds / 60, 2)
    _add_times(page, metrics)
    write_text(folder / "report.html", page.render())
    shown = ("word_accuracy", "words_recognised", "phrase_accuracy", "num_judged", "minutes", "machine", "date")
    card = {name: metrics[name] for name in shown}
    for kind in ("real", "reconstructed"):
        card[f"word_accuracy_{kind}"] = metrics["judged"][kind]["word_accuracy"]
    record_judged(folder / "pipeline", card, judged["texts"][0], "audio")
    write_json(folder / "metrics.json", metrics)
    _say(folder, metrics, judged["texts"][0])
    return metrics


def _metrics(folder: Path, tokenizer: VQTokenizer, judged: dict[str, Any], stages: Stages) -> dict[str, Any]:
    codec = json.loads((folder / "tokenizer" / "metrics.json").read_text())
    prior = json.loads((folder / "pipeline" / "metrics.json").read_text())
    training = {name: _training(folder / name)["arguments"] for name in ("tokenizer", "pipeline")}
    spoken = judged["spoken"]["scores"]
    keys = ("usage", "perplexity", "pesq_wb", "stoi", "si_sdr_db", "mel_distance", "not_measured", "failures")
    return {
        **{name: spoken[name] for name in ("word_accuracy", "words_recognised", "phrase_accuracy")},
        "judged": {kind: judged[kind]["scores"] for kind in KINDS},
        "by_word": {kind: judged[kind]["by_word"] for kind in KINDS},
        "kbps": codec["tokenizer"]["nominal_kbps"],
        "codes_per_second": sum(
            level.num_codebooks * tokenizer.processor.sampling_rate / level.stride for level in tokenizer.layout.levels
        ),
        **{key: codec[key] for key in keys},
        **{key: prior[key] for key in ("nats_per_code", "ln_codebook_size", "prior_bits_per_second")},
        "spoken_seconds_per_second": judged["seconds_per_second"],
        "num_judged": len(judged["texts"]),
        "seeds": {"codec": training["tokenizer"]["seed"], "prior": training["pipeline"]["seed"], "judged": SEED},
        "steps": {"codec": training["tokenizer"]["max_steps"], "prior": training["pipeline"]["max_steps"]},
        "machine": ", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items()),
        "date": date.today().isoformat(),
    }


def _training(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def _report(folder: Path, tokenizer: VQTokenizer, metrics: dict[str, Any], judged: dict[str, Any]) -> Page:
    """The page but for the times; sounds and pictures are also written as files."""
    page = Page("Phrases spoken from text", f"vqtok demo-audio, {metrics['date']}, {metrics['machine']}")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)

    def add(name: str, picture: Any) -> None:
        write_with(pictures / f"{name}.png", lambda path: picture.save(path, format="PNG"))
        page.picture(picture, name)

    page.text(HONEST)
    _figures(page, metrics)
    rate, texts = tokenizer.processor.sampling_rate, judged["texts"]
    page.heading("Beside the originals")
    page.text(
        f"The first phrases of the {len(texts)}, not selected. Gaps, pace and loudness of an original are drawn at random; the prior "
        "draws its own."
    )
    for number, text in enumerate(texts[:5]):
        sounds = {label: judged[kind]["sounds"][number] for kind, label in KINDS.items()}
        heard = {label: " ".join(judged[kind]["heard"][number]) or "nothing" for kind, label in KINDS.items()}
        titles = {label: f"{label}: heard as \u201c{heard[label]}\u201d" for label in sounds}
        page.text(f"\u201c{text}\u201d")
        page.sounds(list(sounds.values()), rate, list(titles.values()))
        marks = {titles[KINDS["real"]]: judged["words"][number]}
        add(f"phrase_{number}", spectrograms({titles[label]: sound for label, sound in sounds.items()}, rate, marks))

    page.heading("All phrases, as the prior speaks them")
    captions = []
    for number, (text, words) in enumerate(zip(texts, judged["spoken"]["heard"], strict=True)):
        write_file(folder / "spoken" / f"{number:03d}.wav", judged["spoken"]["sounds"][number], rate)
        captions.append(text if text.split() == words else f"{text} \u2013 heard: {' '.join(words) or 'nothing'}")
    page.sounds(judged["spoken"]["sounds"], rate, captions)

    page.heading("Codec")
    level = tokenizer.layout.levels[0]
    every = f"every {1000 * level.stride / rate:.3g} ms"
    page.text(f"{metrics['kbps']:.4g} kbps: {level.num_codebooks} codes of {level.codebook_size} {every}.")
    codes = CodeDataset(folder / "codes" / "test")
    items = [codes[i]["codes"][0] for i in range(len(codes))]
    counts = [
        code_counts(torch.cat([each[q] for each in items]), level.codebook_size) for q in range(level.num_codebooks)
    ]
    add("usage", usage_bars(counts, [f"codebook {q}, K = {level.codebook_size}" for q in range(len(counts))]))
    page.heading("Training")
    history = _training(folder / "tokenizer")["history"]
    names = {"reconstruction_loss": "waveform", "mel_loss": "mel", "stft_loss": "STFT", "commitment_loss": "commitment"}
    add("codec_loss", curves(history, names, "loss", True))
    history = _training(folder / "pipeline")["history"]
    label = f"all codebooks, ln K = {metrics['ln_codebook_size'][0]:.2f}"
    add("prior_loss", curves(history, {"nats_level_0": label}, "nats per code"))
    return page


def _figures(page: Page, metrics: dict[str, Any]) -> None:
    page.heading("Figures")
    page.text(
        f"A judge that matches spectrograms against the recordings, and knows no grammar, hears {metrics['num_judged']} phrases of the "
        f"test split. It was never tuned on anything that a model made. None of the phrases is among the "
        f"{metrics['num_different_phrases']} different ones that were trained on. Nothing was drawn twice and selected."
    )
    header = ["", "words right, less insertions", "words recognised", "phrases right", "subst. / del. / ins.", "words"]
    rows = []
    for kind, label in KINDS.items():
        scores = metrics["judged"][kind]
        edits = " / ".join(str(scores[f"num_{name}"]) for name in ("substitutions", "deletions", "insertions"))
        shares = [f"{scores[name]:.1%}" for name in ("word_accuracy", "words_recognised", "phrase_accuracy")]
        rows.append([label, *shares, edits, scores["num_words"]])
    page.table(header, rows)
    page.table(["asked", "reached", "goal", ""], [
        [name, float(metrics[name]), goal, "met" if metrics[name] >= goal else "missed"] for name, goal in GOALS.items()
    ])  # fmt: skip
    missed = [
        [word, asked, metrics["by_word"]["reconstructed"][word][0], right]
        for word, (right, asked) in metrics["by_word"]["spoken"].items()
        if right < asked or metrics["by_word"]["reconstructed"][word][0] < asked
    ]
    number = len(metrics["by_word"]["spoken"])
    if missed:
        page.text(f"Of {number} different words these {len(missed)} were missed at least once.")
        page.table(["word", "asked", "recognised through the codec", "recognised when spoken"], missed)
    else:
        page.text(f"All {number} different words were recognised each time.")
    speech = {"pesq_wb": "PESQ-WB", "stoi": "STOI", "si_sdr_db": "SI-SDR, dB", "mel_distance": "mel distance"}
    rows = [[label, metrics[key]] for key, label in speech.items() if metrics[key] is not None]
    rows += [["kbps", metrics["kbps"]], ["codes per second", metrics["codes_per_second"]]]
    for name in ("usage", "perplexity"):
        rows.append([f"{name} of each codebook", " ".join(f"{value:.3g}" for value in metrics[name][0])])
    nats = f"{metrics['nats_per_code'][0]:.3f} of {metrics['ln_codebook_size'][0]:.3f}"
    rows += [["prior: nats per code, of ln K", nats]]
    rows += [["seconds of speech drawn per second", metrics["spoken_seconds_per_second"]]]
    rows += [[f"seed, {name}", value] for name, value in metrics["seeds"].items()]
    page.table(["codec on held-out joins; prior; seeds", ""], rows)


def _add_times(page: Page, metrics: dict[str, Any]) -> None:
    page.heading("Times")
    rows = [[name, value] for name, value in metrics["seconds_per_stage"].items()]
    page.table(["stage", "seconds"], [*rows, ["in all", float(sum(value for _, value in rows))]])
    verdict = "met" if metrics["minutes"] <= MOST_MINUTES else "missed"
    page.table(["minutes", "at most", ""], [[metrics["minutes"], MOST_MINUTES, verdict]])
    page.text(LICENCE)


def _say(folder: Path, metrics: dict[str, Any], prompt: str) -> None:
    print()
    for kind, label in KINDS.items():
        scores = metrics["judged"][kind]
        print(f"{label:36} {scores['words_recognised']:7.1%} of {scores['num_words']} words recognised, ", end="")
        print(f"{scores['word_accuracy']:.1%} less insertions")
    for name, goal in GOALS.items():
        mark = "" if metrics[name] >= goal else "   below the goal"
        print(f"{name:36} {metrics[name]:7.3f}   goal {goal:g}{mark}")
    late = "" if metrics["minutes"] <= MOST_MINUTES else "   more than the goal"
    print(f"{'minutes':36} {metrics['minutes']:7.2f}   goal {MOST_MINUTES:g}{late}")
    print(f"{'kbps':36} {metrics['kbps']:7.3g}   usage {' '.join(f'{value:.2f}' for value in metrics['usage'][0])}")
    print(f"\nListen to {folder / 'report.html'}, then try:")
    print(f'  .venv/bin/vqtok generate {folder / "pipeline"} "{prompt}" --output_dir {folder / "mine"}')
    print(f"  .venv/bin/vqtok info {folder / 'pipeline'}")
    print(f"  .venv/bin/vqtok evaluate {folder / 'tokenizer'} spoken-numbers")


if __name__ == "__main__":
    run_script(main)
