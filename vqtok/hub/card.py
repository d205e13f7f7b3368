"""Model cards from measured facts. It knows no model: everything comes in as dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

# Everything between these two lines is ours and written anew at each push (see `vqtok.hub.merge`).
BEGIN = "<!-- vqtok writes from here ... -->"
END = "<!-- ... to here. What stands before and after is kept at the next push. -->"

# The Hub has no task of its own for tokenizers. A pair that is not here has no honest tag.
_TASKS = {
    ("image", "tokenizer"): "image-feature-extraction",
    ("audio", "tokenizer"): "feature-extraction",
    ("text", "tokenizer"): "feature-extraction",
    ("image", "text"): "text-to-image",
    ("image", "none"): "unconditional-image-generation",
    ("image", "features"): "text-to-image",
    ("audio", "text"): "text-to-audio",
    ("audio", "features"): "text-to-audio",
}
_MEDIA = {
    "image": ("pictures", "images", "cat.png"),
    "audio": ("sounds", "sounds", "voice.wav"),
    "text": ("texts", "texts", "Once upon a time."),
}
_METRICS = {
    "psnr_db": ("psnr", "PSNR (dB)"),
    "ssim": ("ssim", "SSIM"),
    "pesq_wb": ("pesq", "PESQ-WB"),
    "stoi": ("stoi", "STOI"),
    "si_sdr_db": ("si-sdr", "SI-SDR (dB)"),
    "mel_distance": ("mel_distance", "mel distance"),
    "byte_accuracy": ("accuracy", "bytes right"),
    "exact_chunks": ("exact_match", "exact chunks of 64 bytes"),
}
_ARGUMENTS = (
    *(
        "config",
        "dataset",
        "num_samples",
        "image_size",
        "seconds",
        "text_units",
        "max_steps",
        "batch_size",
        "learning_rate",
        "mixed_precision",
    ),
    "seed",
)


def render(
    name: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    samples: Sequence[str] = (),
) -> str:
    """Return a README.md: a YAML header that the Hub reads, and a text between `BEGIN` and `END`.

    Args:
        name: of the repository or folder, as `from_pretrained` takes it.
        facts: `kind` ("tokenizer", "pipeline" or "model"), `modality`; and where known `condition`, `class`, `parameters`,
            `levels`, `sampling_rate` (Hz), `kbps`, `fingerprint`, `prompt`, `base_model` and `text_encoder` (`{"repo", "revision"}`),
            `stages` of a cascade, `masked`, `datasets`, `license`.
        metrics: the folder's `metrics.json`. What it does not hold is left out, never guessed.
        training: the folder's `training.json`.
        samples: pictures and sounds of the repository to show.
    """
    metrics, training = metrics or {}, training or {}
    body = [
        BEGIN,
        f"# {name}",
        "",
        _about(facts),
        "",
        *_snippet(name, facts),
        *_samples(samples),
        *_measured(metrics),
        *_codes(facts, metrics),
        *_training(training),
        *_limits(facts),
        END,
    ]
    return front(_header(name, facts, metrics, training)) + "\n" + "\n".join(body) + "\n"


def tokenizer_card(name: str, metrics: Mapping[str, Any], training: Mapping[str, Any], modality: str = "image") -> str:
    """Return the README.md of a tokenizer folder.

    Args:
        name: of the folder or repository.
        metrics: what `evaluate` of `vqtok.evaluation.report` or `audio_report` returned (the folder's `metrics.json`).
        training: the folder's `training.json`.
        modality: of the media.
    """
    own = metrics["tokenizer"]
    facts = {"kind": "tokenizer", "modality": modality, "levels": own["layout"]["levels"]}
    facts |= {key: own[key] for key in ("class", "parameters", "fingerprint", "sampling_rate") if key in own}
    if "nominal_kbps" in own:
        facts["kbps"] = own["nominal_kbps"]
    suffix = {"image": ".png", "audio": ".wav"}.get(modality)  # nothing to show of text but a file to read
    return render(name, facts, metrics, training, [f"samples/reconstructions{suffix}"] if suffix else [])


def pipeline_card(
    name: str,
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    condition: str,
    modality: str = "image",
) -> str:
    """Return the README.md of a pipeline folder.

    Args:
        name: of the folder or repository.
        metrics: the folder's `metrics.json`; under `judged` figures of samples that somebody or something judged, by name.
        training: the folder's `training.json`.
        condition: of the prior, as `CodePriorConfig` names it.
        modality: of the media.
    """
    facts = {"kind": "pipeline", "modality": modality, "condition": condition, "prompt": metrics.get("prompt")}
    return render(name, facts, metrics, training, ["samples/samples.png"] if modality == "image" else [])


def front(fields: Mapping[str, Any]) -> str:
    """The YAML header with its two lines of dashes."""
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _header(
    name: str, facts: Mapping[str, Any], metrics: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    kind, modality = facts["kind"], facts["modality"]
    task = _TASKS.get((modality, "tokenizer" if kind == "tokenizer" else facts.get("condition", "")))
    source = facts.get("base_model")
    tags = ["vqtok", "vq-vae", *([f"{modality}-tokenization"] if kind == "tokenizer" else [])]
    fields = {
        "license": facts.get("license"),
        "library_name": "vqtok",
        "pipeline_tag": task,
        "tags": tags,
        "datasets": facts.get("datasets"),
        "base_model": source and source["repo"],
        "model-index": _results(name, facts, metrics, training, task),
    }
    return {key: value for key, value in fields.items() if value}


def _results(
    name: str, facts: Mapping[str, Any], metrics: Mapping[str, Any], training: Mapping[str, Any], task: str | None
) -> Any:
    """The figures for the header. Each says under which protocol it was measured, on how many samples."""
    judged = metrics.get("judged") or {}
    data = metrics.get("data", {})
    number = data.get("num_images", data.get("num_recordings", data.get("num_texts", metrics.get("held_out_samples"))))
    protocol = metrics.get("protocol", "held-out codes of the tokenizer" if "nats_per_code" in metrics else None)
    found = [(kind, label, metrics.get(key)) for key, (kind, label) in _METRICS.items()]
    found += [
        ("nats_per_code", f"nats per code, level {i}", nats) for i, nats in enumerate(metrics.get("nats_per_code", ()))
    ]
    found += [(key, _label(key), value) for key, value in judged.items() if key.endswith("accuracy")]
    results = [
        EvalResult(
            task_type=task or "feature-extraction",
            dataset_type=str(_argument(training, "dataset") or "unknown"),
            dataset_name=f"held-out samples of {_argument(training, 'dataset') or 'the training data'}",
            metric_type=kind,
            metric_name=label,
            metric_value=round(value, 4),
            metric_args={
                "protocol": "samples drawn and judged" if kind in judged else protocol,
                "num_samples": judged.get("num_judged") if kind in judged else number,
            },
        )
        for kind, label, value in found
        if value is not None
    ]
    return eval_results_to_model_index(name, results) if results else None


def _about(facts: Mapping[str, Any]) -> str:
    media = _MEDIA.get(facts["modality"], (f"{facts['modality']}s",))[0]
    size = f" {facts['parameters']:,} parameters." if facts.get("parameters") else ""
    if facts["kind"] == "tokenizer":
        rate = f" {facts['kbps']:.4g} kbps at {facts['sampling_rate']:,} Hz." if facts.get("kbps") else ""
        text = f"A VQ tokenizer of {media}: they become short grids of integers, and these {media} again.{rate}{size}"
        return f"{text}{_wrapped(facts)}" if facts.get("wraps") else text
    if facts["kind"] == "model":
        return f"The weights of a {facts.get('class', 'model')} of vqtok.{size}"
    whose = f"the tokenizer {_place(source)}" if (source := facts.get("base_model")) else "a VQ tokenizer"
    masked, stages = "masked " if facts.get("masked") else "", facts.get("stages", 1)
    what = f"A {masked}prior" if stages == 1 else f"A cascade of {stages} {masked}priors, coarse to fine,"
    reader = ""
    if facts.get("condition") == "features":
        known = facts.get("text_encoder")
        which = (
            f"the text encoder {_place(known)}, under whose licence it stays"
            if known
            else "a text encoder made elsewhere"
        )
        reader = f" Prompts are read by {which}; it is in this repository, too."
    return f"{what} over the codes of {whose}; the tokenizer is in this repository, too.{reader}{size}"


def _wrapped(facts: Mapping[str, Any]) -> str:
    """Whose the codec is, and where its weights lie."""
    source, license = facts.get("base_model"), facts.get("license")
    whose = f"{facts['wraps']}, {_place(source)}" if source else str(facts["wraps"])
    if facts.get("holds_weights"):
        return f"\n\nIt wraps {whose}. The weights in this repository are its authors', under {license}."
    return (
        f"\n\nIt wraps {whose}. No weights are in this repository: they are fetched from there, and stay under the licence of their "
        "authors."
    )


def _place(source: Mapping[str, str]) -> str:
    """A repository on the Hub, as a link to one commit."""
    repo, revision = source["repo"], source["revision"]
    return f"[{repo}](https://huggingface.co/{repo}/tree/{revision}) at revision `{revision}`"


def _snippet(name: str, facts: Mapping[str, Any]) -> list[str]:
    if facts["kind"] == "tokenizer":
        _, plural, file = _MEDIA.get(facts["modality"], ("", "texts", "text.txt"))
        lines = [
            "from vqtok import VQTokenizer",
            "",
            f'tok = VQTokenizer.from_pretrained("{name}")',
            f'codes = tok.encode(["{file}"])',
            f"{plural} = tok.decode(codes)",
        ]
    elif facts["kind"] == "pipeline":
        words = f"[{json.dumps(facts.get('prompt') or '...', ensure_ascii=False)}], "
        given = {"text": words, "features": words, "class": "[0], ", "codes": "codes, "}.get(facts["condition"], "")
        is_codes = facts["condition"] == "codes"
        prompts = (
            ['codes = Codes.load("prompts.vq")  # of the tokenizer whose codes are its prompts'] if is_codes else []
        )
        lines = [
            f"from vqtok import {'Codes, ' if is_codes else ''}VQPipeline",
            "",
            f'pipe = VQPipeline.from_pretrained("{name}")',
            *prompts,
            f"samples = pipe({given}num_samples=4, seed=0)",
        ]
    else:
        lines = [
            "import vqtok.auto",
            "from transformers import AutoModel",
            "",
            f'model = AutoModel.from_pretrained("{name}")',
        ]
    return ["```python", *lines, "```", ""]


def _samples(paths: Sequence[str]) -> list[str]:
    shown = []
    for path in paths:
        label = path.rpartition("/")[2].rpartition(".")[0]
        sound = path.endswith((".wav", ".flac", ".mp3", ".ogg"))
        shown += [f'<audio controls src="{path}"></audio>' if sound else f"![{label}]({path})", ""]
    return shown


def _measured(metrics: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if "psnr_db" in metrics and "data" in metrics:
        quality = "perfect" if metrics["psnr_db"] is None else f"{metrics['psnr_db']:.2f} dB"
        lines += [
            f"PSNR {quality}, SSIM {_number(metrics['ssim'])} at {metrics['bits_per_pixel']:.4g} bits per pixel on "
            f"{metrics['data']['num_images']} held-out pictures "
            f"(protocol {metrics['protocol']}, {metrics['date'][:10]}, {_machine(metrics['machine'])}).",
            "",
        ]
    if "mel_distance" in metrics and "data" in metrics:
        found = [_sound_figure(metrics, key) for key in ("pesq_wb", "stoi", "si_sdr_db", "mel_distance")]
        lines += [
            f"{', '.join(filter(None, found))} at {metrics['kbps']['nominal']:.4g} kbps on {metrics['data']['num_recordings']} "
            f"held-out recordings of {metrics['data']['seconds']:.0f} s "
            f"(protocol {metrics['protocol']}, {metrics['date'][:10]}, {_machine(metrics['machine'])}).",
            "",
        ]
        for key, why in metrics.get("not_measured", {}).items():
            lines += [f"{_METRICS[key][1]} was not measured: {why}.", ""]
    if "unit_accuracy" in metrics and "data" in metrics:
        lines += [
            f"{metrics['byte_accuracy']:.2%} of bytes and {metrics['exact_chunks']:.1%} of chunks of 64 right at "
            f"{metrics['bits_per_byte']['nominal']:.4g} bits per byte on {metrics['data']['bytes']:,} held-out bytes "
            f"(protocol {metrics['protocol']}, {metrics['date'][:10]}, {_machine(metrics['machine'])}).",
            "",
        ]
    for unit in (unit for unit in ("pixel", "second", "byte", "token") if f"prior_bits_per_{unit}" in metrics):
        rows = [
            [i, f"{nats:.3f}", f"{limit:.3f}"]
            for i, (nats, limit) in enumerate(zip(metrics["nats_per_code"], metrics["ln_codebook_size"], strict=True))
        ]
        lines += [
            f"On {metrics['held_out_samples']} held-out samples {metrics[f'prior_bits_per_{unit}']:.4f} bits per {unit}.",
            "",
            table(["level", "nats per code", "ln K"], rows),
            "",
        ]
    if judged := metrics.get("judged"):
        rows = [[_label(key), f"{v:.4g}" if isinstance(v, float) else v] for key, v in judged.items()]
        lines += [table(["figure", "value"], rows), ""]
    return ["## Measured", "", *lines] if lines else []


def _codes(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """The levels, and how well their codes are used where that was measured."""
    if not (levels := facts.get("levels")):
        return []
    health = {key: metrics[key] for key in ("usage", "perplexity", "entropy_bits") if key in metrics}
    forms = {"usage": "{:.1%}", "perplexity": "{:.1f}", "entropy_bits": "{:.2f}"}
    residual = any(level["num_codebooks"] > 1 for level in levels)
    rows = [
        [
            i,
            level["stride"],
            *([level["num_codebooks"]] if residual else []),
            level["codebook_size"],
            *(forms[key].format(_mean(values[i])) for key, values in health.items()),
        ]
        for i, level in enumerate(levels)
    ]
    header = ["level", "stride", *(["codebooks"] if residual else []), "codes", *(_label(key) for key in health)]
    return ["## Codes", "", table(header, rows), ""]


def _sound_figure(metrics: Mapping[str, Any], key: str) -> str | None:
    """ "STOI 0.910 (2 recordings left out)"; None of what was not measured."""
    name, unit = _METRICS[key][1].removesuffix(" (dB)"), " dB" * key.endswith("_db")
    if metrics[key] is None:
        return f"{name} perfect" if key == "si_sdr_db" and metrics.get("si_sdr_perfect") else None
    failed = sum(metrics.get("failures", {}).get(key, {}).values())
    return f"{name} {metrics[key]:.3f}{unit}" + f" ({failed} recordings left out)" * bool(failed)


def _mean(value: float | Sequence[float]) -> float:
    """Of a level's codebooks, where each was measured."""
    return sum(value) / len(value) if isinstance(value, Sequence) else value


def _training(training: Mapping[str, Any]) -> list[str]:
    rows = [[name, value] for name in _ARGUMENTS if (value := _argument(training, name)) is not None]
    return ["## Training", "", table(["argument", "value"], rows), ""] if rows else []


def _limits(facts: Mapping[str, Any]) -> list[str]:
    known = f": the fingerprint of this code space is `{facts['fingerprint']}`" if facts.get("fingerprint") else ""
    text = (
        f"It knows what its training data looked like, and little else. Codes mean nothing to another tokenizer{known}."
    )
    return ["## Limits", "", text, ""]


def _argument(training: Mapping[str, Any], name: str) -> Any:
    return training.get("arguments", {}).get(name)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


def _label(key: str) -> str:
    return key.replace("_", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _machine(machine: Any) -> str:
    return machine if isinstance(machine, str) else ", ".join(f"{key} {value}" for key, value in machine.items())
