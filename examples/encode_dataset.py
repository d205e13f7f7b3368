"""Turn a data set into codes: Parquet shards with a manifest that names the tokenizer, for training priors without the pictures.

python examples/encode_dataset.py --tokenizer out/vq --dataset digits --output_dir out/codes
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vqtok import VQTokenizer
from vqtok.encoding import encode_dataset
from vqtok.image.data import load_images, skipped_summary
from vqtok.training import parse_arguments
from vqtok.training.setup import best_device, run_script


@dataclass
class EncodeArguments:
    """What to encode, with what."""

    tokenizer: str = field(metadata={"help": "Folder or Hub id of a trained tokenizer."})
    output_dir: str = field(metadata={"help": "Folder of the code cache."})
    dataset: str = field(
        default="digits", metadata={"help": "digits, a folder of pictures, or a data set of `datasets`."}
    )
    split: str = field(default="train", metadata={"help": "Split of the data set."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of captions, which every picture must have."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of class labels."})
    image_column: str | None = field(default=None, metadata={"help": "Column of pictures, if there are several."})
    num_samples: int | None = field(
        default=None, metadata={"help": "How many pictures at most (digits: how many scenes)."}
    )
    batch_size: int = field(default=256, metadata={"help": "Pictures per pass."})
    num_threads: int = field(default=0, metadata={"help": "Threads of torch; 0 leaves torch's choice."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Encode and return the manifest."""
    (args,) = parse_arguments([EncodeArguments], argv, description=__doc__)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    images = load_images(
        args.dataset,
        args.split,
        caption_column=args.caption_column,
        image_column=args.image_column,
        label_column=args.label_column,
        num_samples=args.num_samples,
    )
    facts = {"tokenizer": Path(args.tokenizer).name, "dataset": Path(args.dataset).name, "split": args.split}
    manifest = encode_dataset(
        VQTokenizer.from_pretrained(args.tokenizer, device=best_device()),
        images,
        args.output_dir,
        args.batch_size,
        facts,
    )
    if summary := skipped_summary(images):
        print(summary, file=sys.stderr)
    return manifest


if __name__ == "__main__":
    run_script(main)
