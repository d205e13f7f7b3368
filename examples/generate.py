"""Draw pictures from words, or make sound or text, with a trained pipeline.

python examples/generate.py --pipeline out/pipeline --prompts "a red three top left" --output_dir out/pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vqtok import VQPipeline
from vqtok.audio.files import write_file
from vqtok.evaluation.pictures import contact_sheet
from vqtok.files import write_text, write_with
from vqtok.training import parse_arguments
from vqtok.training.setup import best_device, run_script


@dataclass
class GenerateArguments:
    """What to draw."""

    pipeline: str = field(metadata={"help": "Folder or Hub id of a pipeline."})
    output_dir: str = field(metadata={"help": "Folder of the pictures or sounds."})
    prompts: list[str] | None = field(
        default=None, metadata={"help": "What to draw or to say; None for a pipeline without conditions."}
    )
    num_samples: int = field(default=4, metadata={"help": "Pictures or sounds per prompt."})
    seed: int = field(default=0, metadata={"help": "The same seed draws the same media."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "1 switches guidance off; None is the pipeline's own."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Below 1 draws likelier media; None is the pipeline's own."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Keep the k likeliest codes."})
    top_p: float | None = field(default=None, metadata={"help": "Keep the likeliest codes up to this probability."})


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw and return the files: numbered by prompt and sample, and of pictures a `sheet.png` with a row per prompt."""
    (args,) = parse_arguments([GenerateArguments], argv, description=__doc__)
    pipeline = VQPipeline.from_pretrained(args.pipeline, device=best_device())
    options = {name: getattr(args, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    drawn = pipeline(args.prompts, num_samples=args.num_samples, seed=args.seed, **options)
    folder, rate = Path(args.output_dir), pipeline.sampling_rate
    names = [
        f"{prompt:03d}-{sample}" for prompt in range(len(args.prompts or [""])) for sample in range(args.num_samples)
    ]
    if rate:
        written = [folder / f"{name}.wav" for name in names]
        for path, sound in zip(written, drawn, strict=True):
            write_file(path, sound, rate)
        print(f"wrote {len(drawn)} sounds to {folder}")
        return written
    if pipeline.modality == "text":
        written = [folder / f"{name}.txt" for name in names]
        for path, text in zip(written, drawn, strict=True):
            write_text(path, text)
        print(f"wrote {len(drawn)} texts to {folder}")
        return written
    written = [folder / f"{name}.png" for name in names]
    for path, picture in zip(written, drawn, strict=True):
        write_with(path, lambda temporary, picture=picture: picture.save(temporary, format="PNG"))
    rows = [drawn[i : i + args.num_samples] for i in range(0, len(drawn), args.num_samples)]
    written.append(folder / "sheet.png")
    write_with(written[-1], lambda path: contact_sheet(rows).save(path, format="PNG"))
    print(f"wrote {len(drawn)} pictures and sheet.png to {folder}")
    return written


if __name__ == "__main__":
    run_script(main)
