"""The command `vqtok`. Everything heavy is imported inside the commands, so that `vqtok --help` answers at once."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

app = typer.Typer(
    help="Pictures, sound and text to discrete codes and back, and new ones from words.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_debug = False

Tokenizer = Annotated[str, typer.Option("--tokenizer", "-t", help="Folder of the tokenizer, or its name on the Hub.")]
Device = Annotated[
    str | None, typer.Option(help="Where to compute, such as cpu or cuda. Default: cuda where there is one.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists already.")]
Data = "'digits', 'spoken-numbers' or 'python-prose' (embedded), a folder of pictures, recordings or texts, or a data set on the Hub."
Split = Annotated[str, typer.Option(help="Which part of the data.")]
NumSamples = Annotated[
    int | None, typer.Option("--num_samples", min=1, help="At most this many pictures, recordings or texts.")
]
ImageColumn = Annotated[
    str | None, typer.Option("--image_column", help="Of a data set with several columns of pictures.")
]
AudioColumn = Annotated[
    str | None, typer.Option("--audio_column", help="Of a data set with several columns of recordings.")
]
TextColumn = Annotated[str | None, typer.Option("--text_column", help="Of a data set, the column of texts.")]
Resample = Annotated[bool, typer.Option("--resample", help="Bring recordings of other rates to the tokenizer's.")]
BatchSize = Annotated[int | None, typer.Option("--batch_size", min=1, help="Pictures, recordings or texts at once.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all results to this .json file.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 after one line about what was wrong."""
    global _debug
    _debug = False
    try:
        return app(args=None if argv is None else list(argv), prog_name="vqtok", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped", 130)
    except Exception as error:
        message = _one_line(error)
        if _debug or message is None:
            raise
        return _complain(message, 2)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    global _debug
    _debug = debug
    if version:
        from vqtok import __version__

        print(f"vqtok {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def encode(
    media: Annotated[Path, typer.Argument(metavar="MEDIA", help="A picture, a sound file or a text file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.vq", help="The file of codes to write.")],
    tokenizer: Tokenizer,
    num_levels: Annotated[
        int | None, typer.Option("--num_levels", min=1, help="Keep only the coarsest levels.")
    ] = None,
    num_codebooks: Annotated[
        int | None, typer.Option("--num_codebooks", min=1, help="Keep only the first codebooks of each level.")
    ] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring sound of another rate to the tokenizer's.")
    ] = False,
    mix: Annotated[bool, typer.Option("--mix", help="Mix the channels of sound to those of the tokenizer.")] = False,
    max_seconds: Annotated[
        int | None,
        typer.Option("--max_seconds", min=1, help="Longest sound to encode. Default: the tokenizer's, 4 hours."),
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the codes of a picture, of a sound file or of a text file to a file."""
    _check_input(media, "media")
    if out.suffix.lower() in (*_picture_suffixes(), *_sound_suffixes(), *_text_suffixes()):
        raise ValueError(
            f"{out} is named like a picture, a sound or a text, but codes are written to it: name a file such as {out.with_suffix('.vq')}"
        )
    _check_output(out, media, overwrite)
    tok = _load_tokenizer(tokenizer, device)
    for name, wanted in (("resample", resample), ("mix", mix), ("max_seconds", max_seconds)):
        if wanted and tok.modality != "audio":
            raise ValueError(f"--{name} is for sound, {tokenizer} is a tokenizer of {tok.modality}s: leave it out")
        if wanted:
            setattr(tok.processor, name, wanted)
    codes = tok.encode(media, num_levels=num_levels, num_codebooks=num_codebooks)
    codes.save(out)
    rate, unit = getattr(tok.processor, "sampling_rate", None), getattr(tok.processor, "unit", "sample")
    print(f"wrote {out}: {_describe_codes(codes, out, rate, unit)}")


@app.command()
def decode(
    codes: Annotated[Path, typer.Argument(metavar="CODES.vq", help="A file of codes.")],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The .png, .wav, .flac, .txt, ... to write; of several samples OUT-0000.png and so on."
        ),
    ],
    tokenizer: Tokenizer,
    num_levels: Annotated[int | None, typer.Option("--num_levels", min=1, help="Use only the coarsest levels.")] = None,
    num_codebooks: Annotated[
        int | None, typer.Option("--num_codebooks", min=1, help="Use only the first codebooks of each level.")
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the pictures, the sound or the text of a file of codes."""
    from vqtok.codes import Codes

    _check_input(codes, "codes")
    loaded = Codes.load(codes).prefix(num_levels, num_codebooks)
    if not len(loaded):
        raise ValueError(f"{codes} holds no sample: encode something first")
    paths = [out] if len(loaded) == 1 else [out.with_stem(f"{out.stem}-{i:04d}") for i in range(len(loaded))]
    tok = _load_tokenizer(tokenizer, device)
    tok.check_codes(loaded)
    check_format = {"audio": _sound_format, "image": _picture_format, "text": _text_format}[tok.modality]
    for path in paths:
        check_format(path)
        _check_output(path, codes, overwrite)
    if tok.modality == "audio":
        _write_sounds(tok, loaded, paths)
        return
    if tok.modality == "text":
        for text, path in zip(tok.decode(loaded), paths, strict=True):
            _save_text(text, path)
            print(f"wrote {path}: {len(text)} characters, {len(text.encode())} bytes")
        return
    for picture, path in zip(tok.decode(loaded), paths, strict=True):
        _save_picture(picture, path)
        print(f"wrote {path}: {picture.width}x{picture.height} pixels")


@app.command()
def generate(
    pipeline: Annotated[
        str, typer.Argument(metavar="PIPELINE", help="Folder of the pipeline, or its name on the Hub.")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw or to say; quote each one.")
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for the pictures or sounds.")] = Path(
        "generated"
    ),
    num_samples: Annotated[int, typer.Option("--num_samples", min=1, help="Pictures or sounds of each prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same media.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance_scale", help="How strictly to follow the prompt.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1: surer; above 1: wilder.")] = None,
    top_k: Annotated[int | None, typer.Option("--top_k", help="Sample from the k likeliest codes only.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top_p", help="Sample from the likeliest codes of this total mass only.")
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw pictures of prompts, or make sound or text."""
    from vqtok import VQPipeline

    _quiet()
    texts: list[Any] = prompts or []
    names = [f"{i:03d}-{_slug(text)}" for i, text in enumerate(texts)] or ["sample"]
    options = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    pipe = VQPipeline.from_pretrained(pipeline, device=_device(device))
    suffix = {"image": ".png", "audio": ".wav", "text": ".txt"}[pipe.modality]
    paths = [output_dir / f"{name}-{sample:03d}{suffix}" for name in names for sample in range(num_samples)]
    for path in paths:
        _check_output(path, None, overwrite)
    if pipe.prior.config.condition == "class":
        if wrong := [text for text in texts if not text.isdecimal()]:
            raise ValueError(f"{pipeline} draws classes by number, got {wrong[0]!r}: give labels such as 0 or 7")
        texts = [int(text) for text in texts]
    given = {name: value for name, value in options.items() if value is not None}
    for medium, path in zip(pipe(texts or None, num_samples=num_samples, seed=seed, **given), paths, strict=True):
        if pipe.sampling_rate:
            _save_sound(medium, path, pipe.sampling_rate)
        elif suffix == ".txt":
            _save_text(medium, path)
        else:
            _save_picture(medium, path)
        print(f"wrote {path}")


@app.command()
def info(
    target: Annotated[
        str,
        typer.Argument(metavar="TOKENIZER|PIPELINE|CODES.vq", help="A folder, a name on the Hub, or a file of codes."),
    ],
) -> None:
    """Say what a tokenizer, a pipeline or a file of codes is."""
    path = Path(target).expanduser()
    if path.is_file():
        from vqtok.codes import Codes

        _check_input(path, "codes")
        codes = Codes.load(path)
        print(f"{path}: {_describe_codes(codes, path)}")
        sizes = sorted({tuple(size) for size in codes.sizes.tolist()})
        print(f"  sizes {', '.join('x'.join(map(str, size)) for size in sizes[:8])}{', ...' if len(sizes) > 8 else ''}")
        for index, (level, values) in enumerate(zip(codes.layout.levels, codes.levels, strict=False)):
            each = f"{values.shape[1]} code{'s' * (values.shape[1] > 1)} of {level.codebook_size}"
            print(f"  level {index}: {each} per {'x'.join([str(level.stride)] * codes.layout.ndim)}")
        print(f"  fingerprint {codes.fingerprint or 'none: of a tokenizer that was never saved'}")
        return
    from vqtok.hub.folders import fetch_folder

    _quiet()
    if (fetch_folder(target, ["pipeline.json"])[0] / "pipeline.json").is_file():
        from vqtok import VQPipeline

        print(VQPipeline.from_pretrained(target))
    else:
        print(_load_tokenizer(target, "cpu"))


@app.command()
def tokenize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder of media, of .parquet or of .tar shards, one such file, or a data set on the Hub.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the codes; an unfinished one goes on.")],
    tokenizer: Tokenizer,
    revision: Annotated[str | None, typer.Option(help="Of the tokenizer on the Hub.")] = None,
    media_column: Annotated[str | None, typer.Option("--media_column", help="Where several hold media.")] = None,
    caption_column: Annotated[str | None, typer.Option("--caption_column", help="Kept as text.")] = None,
    label_column: Annotated[str | None, typer.Option("--label_column", help="Kept as label.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="One more column to keep; may be repeated.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a folder of media (default: all) or a data set (train).")
    ] = None,
    data_revision: Annotated[str | None, typer.Option("--data_revision", help="Of the data set on the Hub.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read the data set from the Hub as it comes.")] = False,
    resample: Resample = False,
    image_size: Annotated[
        int | None, typer.Option("--image_size", min=1, help="Side of the square cut out of the middle.")
    ] = None,
    batch_size: BatchSize = None,
    rows_per_shard: Annotated[
        int, typer.Option("--rows_per_shard", min=1, help="Where there are no input shards.")
    ] = 4096,
    processes: Annotated[int, typer.Option(min=1, help="On this machine; with GPUs one for each.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of the model in each process.")] = 1,
    readers: Annotated[int, typer.Option(min=1, help="Threads that decode in each process.")] = 2,
    worker: Annotated[int | None, typer.Option(help="Number of this machine or task, from 0.")] = None,
    num_workers: Annotated[int | None, typer.Option("--num_workers", help="How many there are.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster of Ray.")] = "local",
    device: Device = None,
) -> None:
    """Encode a whole data set into a code cache that a prior trains on; stopped anywhere, the same command goes on.

    Without --worker and --num_workers the shares come from accelerate launch, srun or a SLURM array.
    """
    import os

    from vqtok.bulk import tokenize_dataset
    from vqtok.bulk.share import chosen_share

    share = chosen_share(os.environ, worker, num_workers)
    _quiet()
    result = tokenize_dataset(
        source, output, tokenizer, revision=revision, media_column=media_column, caption_column=caption_column,
        label_column=label_column, keep=tuple(keep or ()), split=split, data_revision=data_revision, streaming=streaming,
        resample=resample, image_size=image_size, batch_size=batch_size, rows_per_shard=rows_per_shard, processes=processes,
        threads=threads, readers=readers, worker=share[0], num_workers=share[1], engine=engine, device=device and _device(device),
    )  # fmt: skip
    print(result.summary(*share))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a tokenizer, a pipeline or codes.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub, or a name of your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; made if it is not there.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload with vqtok",
    license: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
    create_pr: Annotated[bool, typer.Option("--create_pr", help="Open a pull request instead.")] = False,
) -> None:
    """Publish a tokenizer or a pipeline on the Hub, or a code cache as a data set, with a card. Log in with `hf auth login` first."""
    if not folder.expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: check the path")
    path, loaded = folder.expanduser(), None
    if (path / "pipeline.json").is_file():
        from vqtok import VQPipeline

        _quiet()
        loaded = VQPipeline.from_pretrained(path)
    elif (path / "manifest.json").is_file() or (path / "job.json").is_file():
        from vqtok.bulk.publish import PublishedCodes

        loaded = PublishedCodes(path)
    options = {"private": private or None, "revision": revision, "commit_message": message}
    options |= {"license": license, "create_pr": create_pr}
    print((loaded or _load_tokenizer(str(path), "cpu")).push_to_hub(repo, **options))


@app.command()
def evaluate(
    tokenizer: Annotated[
        str, typer.Argument(metavar="TOKENIZER", help="Folder of the tokenizer, or its name on the Hub.")
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help=Data)],
    split: Split = "test",
    num_samples: NumSamples = None,
    image_column: ImageColumn = None,
    audio_column: AudioColumn = None,
    text_column: TextColumn = None,
    resample: Resample = False,
    batch_size: BatchSize = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Measure a tokenizer: PSNR and SSIM, or PESQ, STOI, SI-SDR and mel distance, or bytes right; use of the codes, rate, speed."""
    given = {
        "image_column": image_column,
        "audio_column": audio_column,
        "text_column": text_column,
        "resample": resample,
    }
    _evaluate([tokenizer], data, split, num_samples, given, batch_size, json, device)


@app.command()
def compare(
    tokenizers: Annotated[list[str], typer.Argument(metavar="TOKENIZER", help="Folders, or names on the Hub.")],
    data: Annotated[str, typer.Option(help=Data)],
    split: Split = "test",
    num_samples: NumSamples = None,
    image_column: ImageColumn = None,
    audio_column: AudioColumn = None,
    text_column: TextColumn = None,
    resample: Resample = False,
    batch_size: BatchSize = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Measure several tokenizers on the same pictures or recordings."""
    given = {
        "image_column": image_column,
        "audio_column": audio_column,
        "text_column": text_column,
        "resample": resample,
    }
    _evaluate(tokenizers, data, split, num_samples, given, batch_size, json, device)


def _evaluate(
    names: list[str],
    data: str,
    split: str,
    num_samples: int | None,
    given: dict[str, Any],
    batch_size: int | None,
    json: Path | None,
    device: str | None,
) -> None:
    if json is not None and (json.suffix.lower() != ".json" or json.is_dir()):
        raise ValueError(f"results are written as JSON, not to {json}: name a file such as {json.with_suffix('.json')}")
    if len(set(names)) < len(names):
        raise ValueError(f"the tokenizers {', '.join(names)} are not all different: name each once")
    from vqtok.encoding import load_media
    from vqtok.evaluation import audio_report, report, text_report
    from vqtok.files import write_json
    from vqtok.sources.dataset import skipped_summary

    loaded = {name: _load_tokenizer(name, device) for name in names}
    own = {"image": (), "audio": ("sampling_rate", "num_channels"), "text": ()}
    kinds = {(tok.modality, *(getattr(tok.processor, field) for field in own[tok.modality])) for tok in loaded.values()}
    if len(kinds) > 1:
        raise ValueError("the tokenizers are of different media, sampling rates or channels: measure each alone")
    tok = next(iter(loaded.values()))
    media = load_media(tok, data, split, num_samples=num_samples, **given)
    room: Any = {"image": report, "audio": audio_report, "text": text_report}[tok.modality]
    results = room.compare(loaded, media, batch_size=batch_size)
    print(room.to_markdown(results))
    print(f"{len(media)} {media.medium.many} of {data} ({split}), {results[0]['protocol']}")
    if json is not None:
        write_json(json, results[0] if len(names) == 1 else results)
        print(f"wrote {json}")
    if summary := skipped_summary(media):
        print(summary, file=sys.stderr)


# -- helpers


def _load_tokenizer(name: str, device: str | None) -> Any:
    from vqtok import VQTokenizer

    _quiet()
    return VQTokenizer.from_pretrained(name, device=_device(device))


def _device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}): try cpu") from None
    return device


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _write_sounds(tok: Any, codes: Any, paths: list[Path]) -> None:
    from vqtok.audio.long import decode_to_file

    rate = tok.processor.sampling_rate
    for each, path in zip(codes, paths, strict=True):
        samples = decode_to_file(tok.model, each, path)
        print(f"wrote {path}: {samples} samples at {rate} Hz, {samples / rate:.2f} s")


def _kind(path: Path) -> str:
    """What a file or folder is, by its content."""
    if path.is_dir():
        return "folder"
    with path.open("rb") as stream:
        if stream.read(4) == b"VQTC":
            return "codes"
    from PIL import Image

    try:
        with Image.open(path):
            return "picture"
    except Exception:  # readers raise whatever a text leads to that begins like a picture, such as "P3 "
        return "sound" if path.suffix.lower() in _sound_suffixes() else "file"


def _check_input(path: Path, wanted: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: check the path")
    kind = _kind(path)
    if kind == "folder":
        raise ValueError(f"{path} is a folder: name one file in it (examples/encode_dataset.py encodes whole folders)")
    if (kind, wanted) == ("codes", "media"):
        raise ValueError(f"{path} is a file of codes already: vqtok decode makes a picture, a sound or a text of it")
    if kind in ("picture", "sound") and wanted == "codes":
        raise ValueError(f"{path} is a {kind}, not a file of codes: vqtok encode makes codes of it")


def _check_output(path: Path, source: Path | None, overwrite: bool) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file to write")
    if not path.exists():
        return
    if source is not None and path.samefile(source):
        raise ValueError(f"{path} is the input: name another file to write")
    if not overwrite:
        raise ValueError(f"{path} exists already: name another file, or add --overwrite")


def _sound_suffixes() -> frozenset[str]:
    from vqtok.audio.files import RECORDINGS

    return RECORDINGS.suffixes


def _sound_format(path: Path) -> str:
    from vqtok.audio.files import file_format

    return file_format(path)


def _picture_suffixes() -> dict[str, str]:
    from PIL import Image

    return Image.registered_extensions()


def _picture_format(path: Path) -> str:
    from PIL import Image

    name = _picture_suffixes().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(
            f"{path} has no suffix of a picture format that can be written: name a file such as {path.with_suffix('.png')}"
        )
    return name


def _save_picture(picture: Image.Image, path: Path) -> None:
    from vqtok.files import write_with

    name = _picture_format(path)
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(name, {})
    write_with(path, lambda temporary: picture.save(temporary, format=name, **options))


def _text_suffixes() -> frozenset[str]:
    from vqtok.text.medium import TEXTS

    return TEXTS.suffixes


def _text_format(path: Path) -> None:
    if path.suffix.lower() not in _text_suffixes():
        raise ValueError(f"{path} has no suffix of a text file: name a file such as {path.with_suffix('.txt')}")


def _save_text(text: str, path: Path) -> None:
    from vqtok.files import write_bytes

    write_bytes(path, text.encode())


def _save_sound(sound: Any, path: Path, sampling_rate: int) -> None:
    from vqtok.audio.files import write_file

    write_file(path, sound, sampling_rate)


def _describe_codes(codes: Any, path: Path, sampling_rate: int | None = None, unit: str = "sample or byte") -> str:
    units = int(codes.sizes.prod(1).sum())
    depths = [values.shape[1] for values in codes.levels]
    grids = [codes.layout.grids(size) for size in codes.sizes.tolist()]
    count = sum(q * math.prod(grid) for own in grids for q, grid in zip(depths, own, strict=False))
    whole = [level.num_codebooks for level in codes.layout.levels]
    cut = f", at most {max(depths)} of {max(whole)} codebooks" * any(map(int.__lt__, depths, whole))
    partial = cut + f", the coarsest {len(codes.levels)} of {len(codes.layout.levels)} levels" * (
        len(codes.levels) < len(codes.layout.levels)
    )
    unit = "pixel" if codes.layout.ndim == 2 else unit
    rate = f", {8 * path.stat().st_size / units:.4g} bits per {unit} with its header" if units else ""
    if sampling_rate and units:
        rate = f", {8 * path.stat().st_size / units * sampling_rate / 1000:.4g} kbps with its header"
    samples = f"{len(codes)} sample{'s' * (len(codes) != 1)}"
    return f"{samples}, {count} codes{partial}, {path.stat().st_size} bytes{rate}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].rstrip("-") or "prompt"


def _one_line(error: Exception) -> str | None:
    """The sentence for an error of the user's or of the machine's; None for one of ours."""
    if hasattr(error, "format_message"):  # of the command line itself
        context = getattr(error, "ctx", None)
        return f"{error.format_message()} (see {context.command_path if context else 'vqtok'} --help)"
    from huggingface_hub.errors import StrictDataclassError

    if not isinstance(error, (ValueError, OSError, ImportError, StrictDataclassError)):
        return None
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def _complain(message: str, status: int) -> int:
    print(f"vqtok: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
