"""Draw pictures from words with a trained pipeline.

python examples/generate.py --pipeline out/pipeline --prompts "a red three top left" --output_dir out/pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vqtok import VQPipeline
from vqtok.evaluation.pictures import contact_sheet
from vqtok.files import write_with
from vqtok.training import parse_arguments
from vqtok.training.setup import best_device, run_script


@dataclass
class GenerateArguments:
    """What to draw."""

    pipeline: str = field(metadata={"help": "Folder or Hub id of a pipeline."})
    prompts: list[str] = field(metadata={"help": "What to draw."})
    output_dir: str = field(metadata={"help": "Folder of the pictures."})
    num_samples: int = field(default=4, metadata={"help": "Pictures per prompt."})
    seed: int = field(default=0, metadata={"help": "The same seed draws the same pictures."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "1 switches guidance off; None is the pipeline's own."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Below 1 draws likelier pictures; None is the pipeline's own."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Keep the k likeliest codes."})
    top_p: float | None = field(default=None, metadata={"help": "Keep the likeliest codes up to this probability."})


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw and return the files: one sheet per prompt, one picture per row of `sheet.png`'s prompts."""
    (args,) = parse_arguments([GenerateArguments], argv, description=__doc__)
    pipeline = VQPipeline.from_pretrained(args.pipeline, device=best_device())
    options = {name: getattr(args, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    pictures = pipeline(args.prompts, num_samples=args.num_samples, seed=args.seed, **options)
    rows = [pictures[i : i + args.num_samples] for i in range(0, len(pictures), args.num_samples)]
    folder, written = Path(args.output_dir), []
    for index, picture in enumerate(pictures):
        prompt, sample = divmod(index, args.num_samples)
        written.append(folder / f"{prompt:03d}-{sample}.png")
        write_with(written[-1], lambda path, picture=picture: picture.save(path, format="PNG"))
    written.append(folder / "sheet.png")
    write_with(written[-1], lambda path: contact_sheet(rows).save(path, format="PNG"))
    print(f"wrote {len(pictures)} pictures and sheet.png to {folder}")
    return written


if __name__ == "__main__":
    run_script(main)
