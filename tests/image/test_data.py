"""Pictures from folders, data sets and the embedded digits; every kind of bad input."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqtok.image.data import ImageDataset, load_images, skipped_summary
from vqtok.image.digits import CaptionedDigits


def _picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def _folder(root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        _picture(seed).save(root / name)
    return root


def _names(dataset: ImageDataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


def test_a_folder_without_captions_gives_its_pictures_in_order(tmp_path):
    _folder(tmp_path, ["b.png", "a.png", "deep/er/c.PNG", ".hidden/x.png", "__MACOSX/y.png"])
    (tmp_path / "notes.txt").write_text("not a picture")
    dataset = load_images(tmp_path, "all")
    assert _names(dataset) == ["a.png", "b.png", "deep/er/c.PNG"]
    assert [set(item) for item in dataset] == [{"image", "text"}] * 3
    assert dataset[0]["text"] is None and dataset[0]["image"].mode == "RGB"
    assert np.array_equal(dataset[0]["image"], _picture(1)) and np.array_equal(dataset[1]["image"], _picture(0))
    assert dataset.skipped == [] and skipped_summary(dataset) == ""
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again[2]["image"], _picture(2))
    assert _names(load_images(str(tmp_path / "deep" / ".."), "all")) == _names(dataset)


def test_captions_come_from_csv_and_jsonl_at_any_depth(tmp_path):
    _folder(tmp_path, ["a.png", "b.png", "in/c.png", "in/d.png"])
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"one, with a comma"\n./in/../b.png,two\n')
    lines = [{"file_name": "c.png", "text": "three"}, {"file_name": "d.png", "text": ""}]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    texts = [item["text"] for item in load_images(tmp_path, "all")]
    assert texts == ["one, with a comma", "two", "three", None]


def test_another_caption_column(tmp_path):
    _folder(tmp_path, ["a.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text,titre\na.png,a cat,un chat\n", encoding="utf-8-sig")
    assert load_images(tmp_path, "all", caption_column="titre")[0]["text"] == "un chat"
    assert load_images(tmp_path, "all")[0]["text"] == "a cat"


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        (
            "metadata.csv",
            "file_name,text\na.png,x\nz.png,y\n",
            None,
            ["metadata.csv line 3", "'z.png'", "take the line out"],
        ),
        ("metadata.csv", "file_name,text\n../a.png,x\n", None, ["line 2", "'../a.png'", "take the line out"]),
        ("metadata.csv", "file,text\na.png,x\n", None, ["line 2", "'file_name'"]),
        ("metadata.csv", "file_name,text\na.png,x\na.png,y\n", None, ["line 3", "a second time"]),
        ("metadata.csv", "file_name,text\na.png,x, y\n", None, ["line 2", "double quotes"]),
        ("metadata.csv", "file_name,text\na.png,\n", "text", ["line 2", "no caption", "'text'", "'a.png'"]),
        ("metadata.csv", "file_name,text\na.png,x\n", "caption", ["'caption'", "['file_name', 'text']"]),
        ("metadata.csv", "file_name,text\na.png,x\n", "text", ["1 of 2 pictures", "b.png", "metadata.csv", "'text'"]),
        ("other.csv", "", "text", ["2 of 2 pictures", "a.png", "metadata.csv", "'file_name'", "'text'"]),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", None, ["UTF-8"]),
        ("metadata.csv", "file_name,text\n" + "a" * 200_000 + ",x\n", None, ["CSV"]),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{oops\n', None, ["metadata.jsonl line 2", "not JSON"]),
        ("metadata.jsonl", '["a.png"]\n', None, ["line 1", "object"]),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 7}\n', None, ["line 1", "caption 7", "quotes"]),
    ],
)
def test_bad_metadata_is_one_sentence_with_value_and_remedy(tmp_path, name, content, column, words):
    _folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        load_images(tmp_path, "all", caption_column=column)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and not message.endswith(".")


def test_two_metadata_files_in_one_folder_are_refused(tmp_path):
    _folder(tmp_path, ["a.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="both metadata.csv and metadata.jsonl"):
        load_images(tmp_path)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="no folder .*/nowhere: check the path"):
        load_images(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no picture: put files"):
        load_images(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(ValueError, match="holds no picture: put files"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="readme.txt is a file: name the folder"):
        load_images(tmp_path / "readme.txt")
    _folder(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="num_samples is 0"):
        load_images(tmp_path, num_samples=0)
    with pytest.raises(ValueError, match="cannot use image_column='x': leave it out"):
        load_images(tmp_path, image_column="x")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        load_images(tmp_path, "dev")


def _shear(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10])


def test_unreadable_pictures_are_skipped_counted_and_listed(tmp_path):
    _folder(tmp_path, ["good.png", "shorn.png"])
    for name, options in {"good.jpg": {}, "shorn.jpg": {}, "shorn-progressive.jpg": {"progressive": True}}.items():
        _picture(9, (200, 120)).save(tmp_path / name, quality=90, **options)
    for name in ("shorn.jpg", "shorn-progressive.jpg", "shorn.png"):
        _shear(tmp_path / name)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("F", (4, 4)).save(tmp_path / "floats.tiff")
    dataset = load_images(tmp_path, "all")
    reasons = dict(dataset.skipped)
    assert _names(dataset) == ["good.jpg", "good.png"]
    assert list(reasons) == ["empty.png", "floats.tiff", "shorn-progressive.jpg", "shorn.jpg", "shorn.png", "text.jpg"]
    assert (
        all("truncated" in reasons[name] for name in reasons if "shorn" in name) and "mode F" in reasons["floats.tiff"]
    )
    assert reasons["empty.png"] == reasons["text.jpg"] == "it is not a picture, or of a format that PIL does not read"
    summary = skipped_summary(dataset).splitlines()
    assert summary[0] == "6 pictures were skipped:" and len(summary) == 7 and "text.jpg: it is not" in summary[-1]


def test_too_many_pixels_are_a_sentence_and_not_a_warning(tmp_path, monkeypatch, recwarn):
    _folder(tmp_path, ["good.png"])
    _picture(3, (60, 50)).save(tmp_path / "large.png")  # PIL warns
    _picture(3, (90, 90)).save(tmp_path / "larger.jpg")  # PIL raises
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_900)
    dataset = load_images(tmp_path, "all")
    why = "it has more pixels than the limit of 2,900; make it smaller"
    assert _names(dataset) == ["good.png"] and dataset.skipped == [("large.png", why), ("larger.jpg", why)]
    assert not recwarn.list


def test_unverified_pictures_fail_when_reached(tmp_path):
    _folder(tmp_path, ["a.png"])
    (tmp_path / "b.png").write_bytes(b"no")
    dataset = load_images(tmp_path, "all", verify=False)
    assert len(dataset) == 2 and dataset.skipped == [] and dataset[0]["image"].size == (24, 16)
    with pytest.raises(ValueError, match=r"cannot read the picture b.png \(it is not a picture.*verify=True"):
        dataset[1]


def test_a_folder_with_nothing_readable_says_so(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    (tmp_path / "b.png").write_bytes(b"no")
    with pytest.raises(
        ValueError, match="none of the 2 pictures of .* can be read, the first, a.png, because: it is not"
    ):
        load_images(tmp_path, "all")


def test_held_out_names_are_the_test_split(tmp_path):
    _folder(tmp_path, ["a.png", "b.png", "in/c.png", "d.png"])
    assert _names(load_images(tmp_path, "test", holdout=["a", "c.png"])) == ["a.png", "in/c.png"]
    assert _names(load_images(tmp_path, "train", holdout=["a", "c.png"])) == ["b.png", "d.png"]
    assert _names(load_images(tmp_path, "test", holdout="d")) == ["d.png"]
    with pytest.raises(ValueError, match="held-out file 'e' is not in"):
        load_images(tmp_path, "train", holdout=["a", "e"])
    with pytest.raises(ValueError, match="split 'train' of .* with its 4 pictures is empty"):
        load_images(tmp_path, "train", holdout=list("abcd"))


def test_the_hashed_split_is_disjoint_complete_and_stable_when_files_are_added(tmp_path):
    names = [f"{i:03d}.png" for i in range(150)]
    _folder(tmp_path, names[:100])
    train, test = (_names(load_images(tmp_path, split)) for split in ("train", "test"))
    assert sorted(train + test) == names[:100] and 4 <= len(test) <= 20
    _folder(tmp_path, names)
    more = _names(load_images(tmp_path, "test"))
    assert set(test) <= set(more) and not set(train) & set(more)


def test_a_small_folder_still_has_a_test_picture(tmp_path):
    _folder(tmp_path, ["a.png"])
    assert _names(load_images(tmp_path, "train")) == ["a.png"]
    with pytest.raises(ValueError, match="split 'test' of .* with its 1 pictures is empty.*holdout"):
        load_images(tmp_path, "test")
    _folder(tmp_path, ["a.png", "b.png"])
    assert len(load_images(tmp_path, "train")) == len(load_images(tmp_path, "test")) == 1


def test_own_split_folders_are_used(tmp_path):
    _folder(tmp_path, ["train/x/a.png", "train/b.png", "validation/c.png", "stray.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/b.png,bee\nvalidation/c.png,sea\n")
    assert _names(load_images(tmp_path, "train")) == ["train/b.png", "train/x/a.png"]
    assert [item["text"] for item in load_images(tmp_path, "test", caption_column="text")] == ["sea"]
    assert len(load_images(tmp_path, "all")) == 4 and len(load_images(tmp_path, "all", num_samples=3)) == 3
    with pytest.raises(ValueError, match="own train and test folders: leave out holdout"):
        load_images(tmp_path, "train", holdout=["a"])
    (tmp_path / "validation" / "c.png").unlink()
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="/validation holds no picture"):
        load_images(tmp_path, "test")


def _table(num_rows: int, **columns: list):
    import datasets

    features = {"picture": datasets.Image(), **{name: datasets.Value("string") for name in columns}}
    rows = {"picture": [np.full((8, 8, 3), i, np.uint8) for i in range(num_rows)], **columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_a_data_set_object_a_saved_one_and_a_parquet_folder_are_the_same(tmp_path):
    table = _table(20, text=[f"number {i}" for i in range(20)])
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    seen = []
    for source in (table, tmp_path / "saved", str(tmp_path / "parquet")):
        parts = [load_images(source, split) for split in ("train", "test")]
        seen.append([[(item["image"].getpixel((0, 0))[0], item["text"]) for item in part] for part in parts])
        assert parts[0][0]["image"].mode == "RGB"
    assert seen[0] == seen[1] == seen[2]
    assert sorted(seen[0][0] + seen[0][1]) == [(i, f"number {i}") for i in range(20)] and seen[0][1]
    assert len(load_images(table, "all", num_samples=7)) == 7


def test_splits_of_a_data_set(tmp_path):
    import datasets

    part = {"train": _table(4), "validation": _table(3)}
    both = datasets.DatasetDict(part)
    both.save_to_disk(tmp_path / "both")
    assert [len(load_images(tmp_path / "both", split)) for split in ("train", "test", "validation")] == [4, 3, 3]
    assert load_images(both, "train")[0]["text"] is None
    with pytest.raises(ValueError, match="no split 'all': its splits are train, validation"):
        load_images(both, "all")


def test_broken_cells_of_a_data_set_are_skipped():
    import datasets

    good = _table(1)[:]["picture"][0]
    features = datasets.Features({"picture": datasets.Image()})
    cells = [{"bytes": b"no", "path": None}, None, good]
    dataset = load_images(datasets.Dataset.from_dict({"picture": cells}, features=features), "all")
    assert len(dataset) == 1 and dataset.name(0) == "row 2"
    assert dataset.skipped == [
        ("row 0", "it is not a picture, or of a format that PIL does not read"),
        ("row 1", "the row has no picture"),
    ]


def test_bad_columns_of_a_data_set_are_named():
    table = _table(3, words=["a", None, " "])
    two = table.add_column("second", [None] * 3).cast_column("second", table.features["picture"])
    assert [item["text"] for item in load_images(two, "all", image_column="picture")] == [None] * 3
    for source, options, words in [
        (table, {"caption_column": "text"}, "no column 'text' for the captions: its columns are .'picture', 'words'"),
        (table, {"caption_column": "words"}, "no caption in column 'words' of 2 rows, first row 1"),
        (table, {"image_column": "words"}, "no column of pictures 'words'.*'picture'"),
        (table, {"config_name": "x"}, "no configuration 'x'"),
        (table, {"holdout": ["x"]}, "cannot use holdout"),
        (table.remove_columns("picture"), {}, "no column of pictures among .'words'"),
        (two, {}, "columns of pictures .'picture', 'second'.*image_column"),
        (table.add_column("n", [1, 2, 3]), {"caption_column": "n"}, "caption 1 in column 'n'"),
        (table.to_iterable_dataset(), {}, "IterableDataset is not supported.*without streaming"),
        (7, {}, "type int is not supported"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_images(source, "all", **options)


def test_a_data_set_that_cannot_be_loaded_is_one_sentence(monkeypatch):
    import datasets

    def fail(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(ValueError, match=r"cannot load the data set me/nothing \(no route\): check the name"):
        load_images("me/nothing")


def test_the_embedded_digits_by_name():
    dataset = load_images("digits", "test", num_samples=5, seed=3, caption_column="text")
    assert isinstance(dataset, CaptionedDigits) and len(dataset) == 5
    assert dataset[4]["text"] == CaptionedDigits("test", 5, seed=3)[4]["text"]
    with pytest.raises(ValueError, match="no column 'caption': their captions are in 'text'"):
        load_images("digits", caption_column="caption")
    with pytest.raises(ValueError, match="digits cannot use holdout"):
        load_images("digits", holdout=["a"])
