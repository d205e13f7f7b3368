"""Make `vqtok/audio/spoken_numbers/`: 138 recorded words, lossless, in one FLAC file with a table beside it.

    python benchmarks/bundle_spoken_numbers.py FOLDER

FOLDER holds the recordings and `words.csv` with the columns `file` and `transcript`. The samples of all recordings stand in
`words.flac` one after another, in the order of the table `words.csv`, which says of each word its file, its transcript there,
how many samples it has and the sha256 of them (16-bit little-endian). The texts of licence and attribution are not touched.
"""

import argparse
import csv
import hashlib
from pathlib import Path

import numpy as np
import soundfile

SAMPLING_RATE = 16_000
OUT = Path(__file__).resolve().parents[1] / "vqtok" / "audio" / "spoken_numbers"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the recordings with their words.csv")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write words.flac and words.csv")
    arguments = parser.parse_args(argv)
    with (arguments.folder / "words.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    parts, table = [], []
    for row in rows:
        path = arguments.folder / row["file"]
        samples, rate = soundfile.read(path, dtype="int16", always_2d=True)
        if rate != SAMPLING_RATE or samples.shape[1] != 1 or soundfile.info(path).subtype != "PCM_16":
            raise ValueError(f"{path} is not 16-bit mono at {SAMPLING_RATE} Hz: bundling it would change it")
        word = row["transcript"].removeprefix("letter ")  # the recording of "letter a" says "a"
        digest = hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()
        parts.append(samples[:, 0])
        table.append((word, row["file"], row["transcript"], len(samples), digest))
    arguments.out.mkdir(parents=True, exist_ok=True)
    soundfile.write(
        arguments.out / "words.flac", np.concatenate(parts), SAMPLING_RATE, subtype="PCM_16", compression_level=1.0
    )
    with (arguments.out / "words.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("word", "file", "transcript", "num_samples", "sha256"))
        writer.writerows(table)
    size = (arguments.out / "words.flac").stat().st_size
    print(f"wrote {len(table)} words, {sum(map(len, parts)) / SAMPLING_RATE:.1f} s, {size:,} bytes to {arguments.out}")


if __name__ == "__main__":
    main()
