"""Class labels: columns of data sets and of metadata, class subfolders; one numbering for all splits of a source."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqtok.image.data import load_images


def _folder(root: Path, names: list[str], metadata: str = "") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    if metadata:
        (root / "metadata.csv").write_text(metadata)
    return root


def _labels(dataset) -> dict[str, int]:
    return {dataset.name(i): dataset[i]["label"] for i in range(len(dataset))}


def _has_no_labels(dataset) -> bool:
    return dataset.label_names is None and all(set(item) == {"image", "text"} for item in dataset)


def _table(**columns):
    """Column name -> (feature, cells), with a column of pictures beside them."""
    import datasets

    num_rows = len(next(iter(columns.values()))[1])
    features = {"image": datasets.Image(), **{name: feature for name, (feature, _) in columns.items()}}
    cells = {name: cells for name, (_, cells) in columns.items()}
    pictures = [np.full((4, 4, 3), i, np.uint8) for i in range(num_rows)]
    return datasets.Dataset.from_dict({"image": pictures, **cells}, features=datasets.Features(features))


def _column(kind: str, cells: list):
    import datasets

    return datasets.Value(kind), cells


def _classes(names: list[str], cells: list):
    import datasets

    return datasets.ClassLabel(names=names), cells


# -- folders


def test_class_subfolders_are_numbered_in_sorted_order(tmp_path):
    _folder(tmp_path, ["dog/a.png", "cat/b.png", "Eel/c.png", "cat/a.png"])
    dataset = load_images(tmp_path, "all")
    assert dataset.label_names == ["Eel", "cat", "dog"]
    assert _labels(dataset) == {"Eel/c.png": 0, "cat/a.png": 1, "cat/b.png": 1, "dog/a.png": 2}
    assert all(item["text"] is None for item in dataset)


def test_labels_stay_with_their_pictures_when_others_are_left_out(tmp_path):
    _folder(tmp_path, ["a/1.png", "b/1.png", "c/1.png"])
    (tmp_path / "a" / "1.png").write_bytes(b"no")
    dataset = load_images(tmp_path, "all")
    assert _labels(dataset) == {"b/1.png": 1, "c/1.png": 2} and dataset.label_names == ["a", "b", "c"]


@pytest.mark.parametrize("folders", [("train", "test"), ("training", "val")])
def test_classes_below_split_folders_have_the_same_numbers_in_both_splits(tmp_path, folders):
    train, test = folders
    _folder(tmp_path, [f"{train}/{name}/1.png" for name in "abd"] + [f"{test}/{name}/2.png" for name in "cd"])
    parts = [load_images(tmp_path, split) for split in ("train", "test", "all")]
    assert [part.label_names for part in parts] == [["a", "b", "c", "d"]] * 3
    assert _labels(parts[0]) == {f"{train}/a/1.png": 0, f"{train}/b/1.png": 1, f"{train}/d/1.png": 3}
    assert _labels(parts[1]) == {f"{test}/c/2.png": 2, f"{test}/d/2.png": 3}
    assert _labels(parts[2]) == _labels(parts[0]) | _labels(parts[1])


def test_a_held_out_class_keeps_its_number(tmp_path):
    _folder(tmp_path, ["a/1.png", "b/2.png", "c/3.png"])
    train, test = (load_images(tmp_path, split, holdout=["1", "3"]) for split in ("train", "test"))
    assert _labels(train) == {"b/2.png": 1} and _labels(test) == {"a/1.png": 0, "c/3.png": 2}
    assert train.label_names == test.label_names == ["a", "b", "c"]


def test_a_class_may_be_called_like_a_split(tmp_path):
    _folder(tmp_path, ["bus/1.png", "train/2.png"])
    assert _labels(load_images(tmp_path, "all")) == {"bus/1.png": 0, "train/2.png": 1}


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png"],  # flat
        ["a.png", "x/b.png", "y/c.png"],  # one lies outside
        ["x/a.png", "y/z/b.png"],  # two levels
        ["x/z/a.png", "y/z/b.png"],
        ["x/a.png", "x/b.png"],  # one subfolder is not a class
        ["train/a.png", "test/b.png"],  # flat splits
        ["train/x/a.png", "test/y/b.png", "c.png"],
        ["train/a.png", "test/b.png", "x/c.png"],  # a split is not a class
        ["train/x/a.png", "test/x/b.png"],
    ],
)
def test_other_folders_have_no_labels(tmp_path, names):
    assert _has_no_labels(load_images(_folder(tmp_path, names), "all"))


def test_captions_come_before_subfolders_but_empty_metadata_does_not(tmp_path):
    _folder(tmp_path, ["a/1.png", "b/1.png"], "file_name,text\na/1.png,an a\n")
    assert _has_no_labels(load_images(tmp_path, "all"))
    (tmp_path / "metadata.csv").write_text("file_name,width\na/1.png,4\n")
    assert _labels(load_images(tmp_path, "all")) == {"a/1.png": 0, "b/1.png": 1}


def test_a_metadata_column_of_names_is_numbered_over_all_splits_beside_captions(tmp_path):
    _folder(tmp_path, ["train/1.png", "train/2.png", "test/3.png"])
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text,kind\n1.png,one,dog\n2.png,two,ant\n")
    line = {"file_name": "3.png", "text": "three", "kind": "cat"}
    (tmp_path / "test" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    train, test = (load_images(tmp_path, split, label_column="kind") for split in ("train", "test"))
    assert train.label_names == test.label_names == ["ant", "cat", "dog"]
    assert [(item["text"], item["label"]) for item in train] == [("one", 2), ("two", 0)]
    assert [(item["text"], item["label"]) for item in test] == [("three", 1)]
    assert _has_no_labels(load_images(tmp_path, "train"))


def test_a_metadata_column_comes_before_subfolders(tmp_path):
    _folder(tmp_path, ["a/1.png", "b/2.png"], "file_name,kind\na/1.png,y\nb/2.png,x\n")
    assert _labels(load_images(tmp_path, "all", label_column="kind")) == {"a/1.png": 1, "b/2.png": 0}


def test_numbers_in_metadata_stay_what_they_are_unless_a_name_is_among_them(tmp_path):
    _folder(tmp_path, ["1.png", "2.png", "3.png"])
    for written, labels, names in [
        (["10", "2", "0"], [10, 2, 0], None),
        (["10", "2", "x"], [0, 1, 2], ["10", "2", "x"]),
        (["007", "7", "07"], [0, 2, 1], ["007", "07", "7"]),
    ]:
        rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(written, start=1))
        (tmp_path / "metadata.csv").write_text(f"file_name,n\n{rows}")
        dataset = load_images(tmp_path, "all", label_column="n")
        assert [item["label"] for item in dataset] == labels and dataset.label_names == names
    (tmp_path / "metadata.csv").unlink()
    lines = [{"file_name": f"{i}.png", "n": n} for i, n in enumerate((10, 2, 0), start=1)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = load_images(tmp_path, "all", label_column="n")
    assert [item["label"] for item in dataset] == [10, 2, 0] and dataset.label_names is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.csv", "file_name,n\na.png,1\nb.png,\n", ["csv line 3", "no label", "'n'", "'b.png'", "write one"]),
        ("metadata.csv", "file_name,n\na.png,1\nb.png\n", ["csv line 3", "no label", "'n'", "'b.png'"]),
        ("metadata.csv", "file_name,n\na.png, \n", ["csv line 2", "no label", "'n'", "'a.png'"]),
        ("metadata.csv", "file_name,n\na.png,-1\n", ["csv line 2", "label -1", "'n'", "'a.png'", "from 0"]),
        ("metadata.csv", "file_name,kind\na.png,1\n", ["line 2", "no column 'n'", "['file_name', 'kind']"]),
        ("metadata.csv", "file_name,n\na.png,1\n", ["labels", "1 of 2 pictures", "b.png", "metadata.csv", "'n'"]),
        ("notes.txt", "", ["labels were asked for", "2 of 2 pictures", "a.png", "metadata.csv", "'file_name'", "'n'"]),
        ("metadata.jsonl", '{"file_name": "a.png", "n": null}', ["jsonl line 1", "no label", "'n'"]),
        ("metadata.jsonl", '{"file_name": "a.png", "n": -2}', ["jsonl line 1", "label -2", "from 0"]),
        ("metadata.jsonl", '{"file_name": "a.png", "n": 1.5}', ["jsonl line 1", "label 1.5", "whole number"]),
        ("metadata.jsonl", '{"file_name": "a.png", "n": true}', ["jsonl line 1", "label True", "whole number"]),
        ("metadata.jsonl", '{"file_name": "a.png", "n": [1]}', ["jsonl line 1", "label [1]", "whole number"]),
    ],
)
def test_bad_labels_in_metadata_are_one_sentence_with_value_and_remedy(tmp_path, name, content, words):
    _folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        load_images(tmp_path, "all", label_column="n")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and not message.endswith(".")


# -- data sets


def test_a_single_column_of_classes_is_taken_by_itself_and_keeps_its_names():
    table = _table(kind=_classes(["dog", "cat"], [1, 0, 1]), text=_column("string", ["x", None, "y"]))
    for options in ({}, {"label_column": "kind"}):
        dataset = load_images(table, "all", **options)
        assert dataset.label_names == ["dog", "cat"]
        assert [(item["label"], item["text"]) for item in dataset] == [(1, "x"), (0, None), (1, "y")]
        assert all(type(item["label"]) is int for item in dataset)


def test_nothing_but_a_single_complete_column_of_classes_is_taken_unasked():
    assert _has_no_labels(load_images(_table(label=_column("int64", [0, 1])), "all"))
    assert _has_no_labels(load_images(_table(label=_column("string", ["a", "b"])), "all"))
    two = _table(a=_classes(["x", "y"], [0, 1]), b=_classes(["u", "v"], [1, 1]))
    assert _has_no_labels(load_images(two, "all"))
    assert [item["label"] for item in load_images(two, "all", label_column="b")] == [1, 1]
    for hidden in (-1, None):
        assert _has_no_labels(load_images(_table(a=_classes(["x", "y"], [0, hidden])), "all"))


def test_columns_of_numbers_stay_what_they_are():
    dataset = load_images(_table(n=_column("uint8", [7, 0, 7])), "all", label_column="n")
    assert [item["label"] for item in dataset] == [7, 0, 7] and dataset.label_names is None


def test_names_are_numbered_over_all_splits_of_a_data_set(tmp_path):
    import datasets

    cells = {"train": ["d", "b", "d"], "validation": ["c", "a"]}
    both = datasets.DatasetDict({part: _table(kind=_column("string", names)) for part, names in cells.items()})
    both.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    for part, table in both.items():
        table.to_parquet(tmp_path / "parquet" / f"{part}-00000-of-00001.parquet")
    for source in (both, tmp_path / "saved", tmp_path / "parquet"):
        train, test = (load_images(source, split, label_column="kind") for split in ("train", "test"))
        assert train.label_names == test.label_names == ["a", "b", "c", "d"]
        assert [item["label"] for item in train] == [3, 1, 3] and [item["label"] for item in test] == [2, 0]


def test_shares_of_one_split_are_numbered_alike():
    names = [f"{i:02d}" for i in range(30)]  # each share lacks most names of the other
    table = _table(kind=_column("string", names))
    parts = [load_images(table, split, label_column="kind") for split in ("train", "test")]
    assert all(part.label_names == names for part in parts) and len(parts[1]) > 0
    for part in parts:
        assert [item["label"] for item in part] == [np.asarray(item["image"])[0, 0, 0] for item in part]


def test_bad_label_columns_of_a_data_set_are_one_sentence_with_column_and_remedy():
    for column, words in [
        (_classes(["x", "y"], [0, -1, -1]), "no label, or one below 0, in column 'n' of 2 rows, first row 1: filter"),
        (_classes(["x", "y"], [None, 0, 1]), "in column 'n' of 1 rows, first row 0: filter them out, or leave out"),
        (_column("int32", [0, 1, -5]), "in column 'n' of 1 rows, first row 2: filter"),
        (_column("int32", [0, None, 2]), "in column 'n' of 1 rows, first row 1: filter"),
        (_column("string", ["a", " ", None]), "in column 'n' of 2 rows, first row 1: filter"),
        (_column("float32", [0, 1, 2]), "type float32 in column 'n': name a column of class labels"),
        (_column("bool", [True, False, True]), "type bool in column 'n': name a column"),
        (([_column("int64", [])[0]], [[0], [1], [2]]), "in column 'n': name a column"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            load_images(_table(n=column), "all", label_column="n")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no column 'm' for the labels: its columns are .'image', 'n'"):
        load_images(_table(n=_column("int64", [0])), "all", label_column="m")
    with pytest.raises(ValueError, match="type PIL.Image.Image in column 'image': name a column"):
        load_images(_table(n=_column("int64", [0])), "all", label_column="image")


def test_blank_names_of_another_split_are_no_class():
    import datasets

    cells = {"train": ["b", "a"], "test": [" ", "", None]}
    both = datasets.DatasetDict({part: _table(kind=_column("string", names)) for part, names in cells.items()})
    assert load_images(both, "train", label_column="kind").label_names == ["a", "b"]


# -- the embedded digits


def test_the_embedded_digits_have_no_labels():
    dataset = load_images("digits", num_samples=2)
    assert dataset.label_names is None and "label" not in dataset[0]
    with pytest.raises(ValueError, match="embedded digits cannot use label_column='digit': leave it out"):
        load_images("digits", label_column="digit")
