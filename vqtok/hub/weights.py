"""What the headers of weight files say, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a model's folder consists of, for downloads.
MODEL_FILES = ("config.json", "generation_config.json", WEIGHTS, "model-*.safetensors", INDEX)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ADAPTER = (
    "adapter_config.json"  # transformers finds it by itself, loads its weights over the model's, and the base it names
)


def require_safetensors(folder: Path) -> None:
    """Refuse a folder without safetensors, or with an adapter that would change what they say.

    Raises:
        FileNotFoundError: naming the folder, a pickle that lies there instead, and what to do.
        ValueError: there is an adapter.
    """
    if (folder / _ADAPTER).exists():
        raise ValueError(
            f"{folder} has an {_ADAPTER}, and adapters are never loaded: merge it into the weights, and remove it"
        )
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    found = f" (only {pickles[0]}, a pickle, which vqtok never loads)" if pickles else ""
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}{found}: save it again with save_pretrained")


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a folder's safetensors files, by name; the tensors themselves are not read.

    Raises:
        ValueError: the index names a file outside the folder, or one that is not there.
        SafetensorError: a file is truncated or damaged.
    """
    files = [WEIGHTS] if (folder / WEIGHTS).is_file() else _indexed_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as weights:
            shapes.update({name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()})  # noqa: SIM118
    return shapes


def _indexed_files(folder: Path) -> list[str]:
    path = folder / INDEX
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        good = all(Path(file).name == file and "\\" not in file and file.endswith(".safetensors") for file in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} makes no sense ({type(error).__name__}): save the weights again") from None
    if not files or not good:
        raise ValueError(f"{path} must name safetensors files beside it, got {files[:3]}: save the weights again")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{path} names {missing[0]}, which is not there: download it again")
    return files
