"""Model cards from measured facts. It knows no model: everything comes in as dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def tokenizer_card(name: str, metrics: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Return the README.md of a tokenizer folder.

    Args:
        name: of the folder or repository.
        metrics: what `vqtok.evaluation.evaluate` returned (the folder's `metrics.json`).
        training: the folder's `training.json`.
    """
    layout = metrics["tokenizer"]["layout"]["levels"]
    levels = [
        [i, level["stride"], level["codebook_size"], f"{used:.1%}", f"{perplexity:.1f}"]
        for i, (level, used, perplexity) in enumerate(zip(layout, metrics["usage"], metrics["perplexity"], strict=True))
    ]
    quality = "perfect" if metrics["psnr_db"] is None else f"{metrics['psnr_db']:.2f} dB"
    return "\n".join(
        [
            _front(
                {
                    "library_name": "vqtok",
                    "pipeline_tag": "image-feature-extraction",
                    "tags": ["vqtok", "image-tokenization", "vq-vae"],
                }
            ),
            f"# {name}",
            "",
            f"A VQ tokenizer of pictures: {metrics['bits_per_pixel']:.4g} bits per pixel, "
            f"{metrics['tokenizer']['parameters']:,} parameters.",
            "",
            "```python",
            "from vqtok import VQTokenizer",
            "",
            f'tok = VQTokenizer.from_pretrained("{name}")',
            'codes = tok.encode(["cat.png"])',
            "images = tok.decode(codes)",
            "```",
            "",
            "## Measured",
            "",
            f"PSNR {quality}, SSIM {_number(metrics['ssim'])} on {metrics['data']['num_images']} held-out pictures "
            f"(protocol {metrics['protocol']}, {metrics['date'][:10]}, {_machine(metrics['machine'])}).",
            "",
            _table(["level", "stride", "codes", "usage", "perplexity"], levels),
            "",
            *_training(training),
            "## Limits",
            "",
            "It knows what its training pictures looked like; elsewhere expect softer pictures. Codes mean nothing to another "
            f"tokenizer: the fingerprint of this code space is `{metrics['tokenizer']['fingerprint']}`.",
            "",
        ]
    )


def pipeline_card(
    name: str,
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    condition: str,
    judged: Mapping[str, Any] | None = None,
) -> str:
    """Return the README.md of a pipeline folder.

    Args:
        name: of the folder or repository.
        metrics: the folder's `metrics.json`.
        training: the folder's `training.json`.
        condition: of the prior, as `CodePriorConfig` names it.
        judged: figures of samples that somebody or something judged, by name; a row each.
    """
    prompts = {"text": '["..."]', "features": '["..."]', "class": "[0]", "codes": "codes", "none": "None"}
    prompt = prompts[condition]
    tag = "text-to-image" if condition in ("text", "features") else "unconditional-image-generation"
    rows = [
        [i, f"{nats:.3f}", f"{limit:.3f}"]
        for i, (nats, limit) in enumerate(zip(metrics["nats_per_code"], metrics["ln_codebook_size"], strict=True))
    ]
    return "\n".join(
        [
            _front({"library_name": "vqtok", "pipeline_tag": tag, "tags": ["vqtok", "vq-vae"]}),
            f"# {name}",
            "",
            "A prior over the codes of a VQ tokenizer, with the tokenizer.",
            "",
            "```python",
            "from vqtok import VQPipeline",
            "",
            f'pipe = VQPipeline.from_pretrained("{name}")',
            f"pictures = pipe({prompt}, num_samples=4, seed=0)",
            "```",
            "",
            "![samples](samples/samples.png)",
            "",
            "## Measured",
            "",
            f"On {metrics['held_out_samples']} held-out samples {metrics['prior_bits_per_pixel']:.4f} bits per pixel.",
            "",
            _table(["level", "nats per code", "ln K"], rows),
            "",
            *_judged(judged or {}),
            *_training(training),
        ]
    )


def _judged(figures: Mapping[str, Any]) -> list[str]:
    rows = [[key.replace("_", " "), f"{v:.4g}" if isinstance(v, float) else v] for key, v in figures.items()]
    return [_table(["figure", "value"], rows), ""] if rows else []


def _training(training: Mapping[str, Any]) -> list[str]:
    names = ("config", "dataset", "max_steps", "batch_size", "learning_rate", "mixed_precision", "seed")
    arguments = training["arguments"]
    rows = [[name, arguments[name]] for name in names if arguments.get(name) is not None]
    return ["## Training", "", _table(["argument", "value"], rows), ""]


def _front(fields: Mapping[str, Any]) -> str:
    lines = [
        f"{key}:\n" + "\n".join(f"- {item}" for item in value) if isinstance(value, list) else f"{key}: {value}"
        for key, value in fields.items()
    ]
    return "\n".join(["---", *lines, "---", ""])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _machine(machine: Any) -> str:
    return machine if isinstance(machine, str) else ", ".join(f"{key} {value}" for key, value in machine.items())
