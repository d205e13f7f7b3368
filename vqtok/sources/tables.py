"""A data set of the package `datasets` as rows with one column of media, a list of captions and one of labels."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .folder import SPLIT_FOLDERS, Labels, hashed_test, number_names
from .medium import Medium


class Table(NamedTuple):
    """Rows of media.

    Args:
        rows: a `datasets.Dataset` with the single column `media_column`, whose cells are dicts of `bytes` and `path`,
            not decoded: media of all sources are read in one way.
        media_column: its name.
        texts: one caption, or None, per row.
        title: what to call it in messages.
        labels: one per row, or None.
    """

    rows: Any
    media_column: str
    texts: list[str | None]
    title: str
    labels: Labels | None


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_table(
    medium: Medium,
    source: Any,
    split: str,
    caption_column: str | None,
    label_column: str | None,
    media_column: str | None,
    config_name: str | None,
) -> Table:
    """Return one split of a data set; the arguments are those of `open_source`.

    Raises:
        ValueError: if the data set cannot be loaded, has not the split or column asked for, no or several columns of
            the medium, or rows without the caption or the label asked for.
    """
    import datasets  # here, because it takes a second to import

    kind = getattr(datasets, medium.feature)
    rows, title, whole = _open_split(medium, source, split, config_name)
    columns = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if media_column is None:
        if len(columns) != 1:
            found = f"has the columns of {medium.many} {columns}" if columns else f"has no column of {medium.many}"
            raise ValueError(f"{title} {found} among {list(rows.features)}: name one with {medium.column_option}")
        media_column = columns[0]
    elif media_column not in columns:
        raise ValueError(
            f"{title} has no column of {medium.many} {media_column!r}: its columns of {medium.many} are {columns}"
        )
    texts = _texts(rows, title, caption_column)
    labels = _labels(rows, title, label_column, whole)
    rows = rows.with_format(None).select_columns([media_column]).cast_column(media_column, kind(decode=False))
    return Table(rows, media_column, texts, title, labels)


def _texts(rows: Any, title: str, caption_column: str | None) -> list[str | None]:
    column = "text" if caption_column is None else caption_column
    if column not in rows.features:
        if caption_column is not None:
            raise ValueError(
                f"{title} has no column {column!r} for the captions: its columns are {list(rows.features)}"
            )
        return [None] * len(rows)
    cells = _cells(rows, column)
    wrong = next((cell for cell in cells if cell is not None and not isinstance(cell, str)), None)
    if wrong is not None:
        raise ValueError(
            f"{title} has the caption {wrong!r} in column {column!r}: name a column of texts as caption_column"
        )
    texts = [cell if cell and cell.strip() else None for cell in cells]
    if caption_column is not None and None in texts:
        raise ValueError(
            f"{title} has no caption in column {column!r} of {texts.count(None)} rows, first row {texts.index(None)}: "
            "filter them out"
        )
    return texts


def _cells(rows: Any, column: str) -> list[Any]:
    return list(rows.with_format(None).select_columns([column])[column])


def _labels(rows: Any, title: str, label_column: str | None, whole: Callable[[], Iterable[Any]]) -> Labels | None:
    """The labels of the rows; `whole` gives the rows of all splits, which must number alike."""
    import datasets

    classes = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if label_column is None and len(classes) != 1:
        return None
    column = classes[0] if label_column is None else label_column
    if column not in rows.features:
        raise ValueError(f"{title} has no column {column!r} for the labels: its columns are {list(rows.features)}")
    feature, names = rows.features[column], None
    kind = str(getattr(feature, "dtype", type(feature).__name__))  # of a list of values it is "list"
    cells = _cells(rows, column)
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif isinstance(feature, datasets.Value) and kind in ("string", "large_string"):
        found = (cell for part in whole() if column in part.features for cell in _cells(part, column))
        label_of, names = number_names(str(cell) for cell in found if cell and str(cell).strip())
        cells = [label_of.get(cell) for cell in cells]  # None for the missing and the blank
    elif not (isinstance(feature, datasets.Value) and kind.startswith(("int", "uint"))):
        raise ValueError(
            f"{title} has values of type {kind} in column {column!r}: "
            "name a column of class labels, whole numbers or names as label_column"
        )
    missing = [row for row, cell in enumerate(cells) if cell is None or cell < 0]
    if not missing:
        return Labels(cells, names)
    if label_column is None:
        return None  # nobody asked; test splits often hide their labels as -1
    raise ValueError(
        f"{title} has no label, or one below 0, in column {column!r} of {len(missing)} rows, first row {missing[0]}: "
        "filter them out, or leave out label_column"
    )


def _open_split(
    medium: Medium, source: Any, split: str, config_name: str | None
) -> tuple[Any, str, Callable[[], Iterable[Any]]]:
    """The rows of one split, all columns; what to call them in messages; what gives the rows of every split."""
    import datasets

    if isinstance(source, (str, os.PathLike)):
        title, name = f"the data set {source}", str(Path(source).expanduser())
        if not is_saved_dataset(Path(name)):
            names = _load(title, datasets.get_dataset_split_names, name, config_name)
            part, share = _part(title, names, split)
            rows = _load(title, datasets.load_dataset, name, config_name, split=part)
            return _share(rows, share), title, lambda: _load(title, datasets.load_dataset, name, config_name).values()
        source = _load(title, datasets.load_from_disk, name)
    else:
        title = "the data set"
    if config_name is not None:
        raise ValueError(f"{title} has no configuration {config_name!r}: leave out config_name")
    if isinstance(source, datasets.Dataset):
        source = {"train": source}
    elif not isinstance(source, datasets.DatasetDict):
        raise ValueError(
            f"a source of type {type(source).__name__} is not supported: give {medium.embedded!r}, a folder, "
            "the name of a data set, or a datasets.Dataset loaded without streaming"
        )
    part, share = _part(title, list(source), split)
    return _share(source[part], share), title, source.values


def _load(title: str, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return load(*args, **options)
    except Exception as error:  # whatever the network, the Hub and the readers of many formats raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load {title} ({why}): check the name, or name an existing folder") from error


def _part(title: str, names: Sequence[str], split: str) -> tuple[str, str | None]:
    """Which split to load, and, where "train" has to serve for "test" too, which share of its rows to take."""
    test = next((name for name in SPLIT_FOLDERS["test"] if name in names), None)
    if split in ("train", "test") and test is None and "train" in names:
        return "train", split
    if split in names:
        return split, None
    if split == "test" and test is not None:
        return test, None
    if split == "all" and len(names) == 1:
        return names[0], None
    raise ValueError(f"{title} has no split {split!r}: its splits are {', '.join(names)}")


def _share(rows: Any, share: str | None) -> Any:
    """The "train" or "test" share of the rows of a data set with one split; None means all."""
    if share is None:
        return rows
    test = set(hashed_test(str(i) for i in range(len(rows))))
    chosen = rows.select([i for i in range(len(rows)) if (i in test) == (share == "test")])
    if not len(chosen):
        raise ValueError(f"split {share!r} of a data set with {len(rows)} rows is empty: add rows, or use split='all'")
    return chosen


class TextTable(NamedTuple):
    """Rows of text.

    Args:
        texts: one per row, "" where there is none.
        title: what to call it in messages.
        labels: one per row, or None.
    """

    texts: list[str]
    title: str
    labels: Labels | None


def open_text_table(
    medium: Medium, source: Any, split: str, label_column: str | None, text_column: str | None, config_name: str | None
) -> TextTable:
    """Return one split of a data set with a column of text; the arguments are those of `open_table`.

    Raises:
        ValueError: see `open_table`; or the column is not of text.
    """
    rows, title, whole = _open_split(medium, source, split, config_name)
    column = text_column or "text"
    if column not in rows.features:
        raise ValueError(
            f"{title} has no column {column!r} of texts: its columns are {list(rows.features)}, name one with {medium.column_option}"
        )
    if str(getattr(rows.features[column], "dtype", "")) not in ("string", "large_string"):
        raise ValueError(
            f"{title} has no texts in column {column!r}: name a column of strings with {medium.column_option}"
        )
    return TextTable([cell or "" for cell in _cells(rows, column)], title, _labels(rows, title, label_column, whole))
