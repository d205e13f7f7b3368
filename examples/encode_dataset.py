"""Turn a data set into codes: Parquet shards with a manifest that names the tokenizer, for training priors without the media.

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
from vqtok.encoding import encode_dataset, load_media
from vqtok.sources.dataset import skipped_summary
from vqtok.training import parse_arguments
from vqtok.training.setup import best_device, run_script


@dataclass
class EncodeArguments:
    """What to encode, with what."""

    tokenizer: str = field(metadata={"help": "Folder or Hub id of a trained tokenizer."})
    output_dir: str = field(metadata={"help": "Folder of the code cache."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "digits, spoken-numbers or python-prose (embedded, the defaults), a folder, or a data set of `datasets`."
        },
    )
    split: str = field(default="train", metadata={"help": "Split of the data set."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of captions, which every sample must have."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of class labels."})
    image_column: str | None = field(default=None, metadata={"help": "Column of pictures, if there are several."})
    audio_column: str | None = field(default=None, metadata={"help": "Column of recordings, if there are several."})
    resample: bool = field(default=False, metadata={"help": "Bring sound of other rates to the tokenizer's."})
    num_samples: int | None = field(
        default=None, metadata={"help": "How many pictures or recordings at most (digits: how many scenes)."}
    )
    batch_size: int = field(default=256, metadata={"help": "Pictures or recordings per pass."})
    num_threads: int = field(default=0, metadata={"help": "Threads of torch; 0 leaves torch's choice."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Encode and return the manifest."""
    (args,) = parse_arguments([EncodeArguments], argv, description=__doc__)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    tokenizer = VQTokenizer.from_pretrained(args.tokenizer, device=best_device())
    media = load_media(
        tokenizer,
        args.dataset,
        args.split,
        caption_column=args.caption_column,
        label_column=args.label_column,
        image_column=args.image_column,
        audio_column=args.audio_column,
        num_samples=args.num_samples,
        resample=args.resample,
    )
    source = Path(args.dataset).name if args.dataset else media.medium.embedded
    facts = {"tokenizer": Path(args.tokenizer).name, "dataset": source, "split": args.split}
    manifest = encode_dataset(tokenizer, media, args.output_dir, args.batch_size, facts)
    if summary := skipped_summary(media):
        print(summary, file=sys.stderr)
    return manifest


if __name__ == "__main__":
    run_script(main)
