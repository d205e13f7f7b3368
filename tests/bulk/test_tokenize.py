"""`tokenize_dataset`: the codes are those of the tokenizer, whoever encodes, and whatever the input looks like."""

import json
import resource
import subprocess
import sys

import datasets
import pytest
import torch

from tests.bulk.making import BROKEN, contents, loose_files, parquet_shards, png, skipped, tar_shard
from tests.tiny import make_audio_tokenizer, make_text_tokenizer, make_tokenizer, picture, sound
from vqtok import VQTokenizer, tokenize_dataset
from vqtok.bulk.share import share_of
from vqtok.bulk.tables import Columns
from vqtok.cli import main
from vqtok.prior.data import CodeDataset


@pytest.fixture(scope="module")
def tok(saved):
    return VQTokenizer.from_pretrained(saved)


def assert_codes(folder, tokenizer, media):
    data = CodeDataset(folder)
    assert len(data) == len(media) and data.fingerprint == tokenizer.fingerprint
    for item, medium in zip((data[i] for i in range(len(data))), media, strict=True):
        wanted = tokenizer.encode([medium])
        assert item["size"] == wanted.sizes[0].tolist()
        for mine, theirs in zip(item["codes"], wanted.levels, strict=True):
            assert torch.equal(mine, theirs[0])
    return data


def size(i):
    return (16 + 4 * (i % 3), 16)


def test_parquet_shards_become_shards_of_codes(tok, tmp_path):
    parquet_shards(tmp_path / "in", size=size, broken=(6,))
    result = tokenize_dataset(tmp_path / "in", tmp_path / "out", tok, batch_size=4, keep=("id",))
    data = assert_codes(tmp_path / "out", tok, [picture(*size(i), i) for i in range(15) if i != 6])
    assert (result.num_samples, result.num_skipped, result.num_shards) == (14, 1, 3)
    assert data.columns["text"] == [f"number {i}" for i in range(15) if i != 6]
    assert (data[3]["label"], data[3]["id"]) == (0, "x3")
    ((name, reason),) = skipped(tmp_path / "out")
    assert name == "row 1" and reason
    manifest = data.manifest
    assert [shard["source"] for shard in manifest["shards"]] == [f"part-{i}.parquet" for i in range(3)]
    assert manifest["preprocessing"]["stride"] == 8 and manifest["dtype"] == "float32" and manifest["num_skipped"] == 1
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_webdataset_shards_are_streamed_and_bounded(tok, tmp_path, monkeypatch):
    monkeypatch.setattr("vqtok.bulk.inputs.MAX_MEDIUM_BYTES", 5000)
    members = [
        ("a/0.png", png(seed=0)), ("a/0.txt", b"zero\n"), ("a/0.cls", b"4"),
        ("../../evil.png", png(seed=1)), ("../../evil.json", b'{"text": "evil", "n": 1}'),
        ("large.png", b"\0" * 6000),
        ("none.txt", b"no picture"),
        ("two.png", png()), ("two.jpg", png()),
        ("bad.png", BROKEN),
        ("cap.png", png()), ("cap.txt", b"\xff\xfe"),
        ("b.png", png(seed=2)),
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    path = tar_shard(tmp_path / "in" / "0.tar", members)
    whole = path.read_bytes()
    tar_shard(tmp_path / "in" / "1.tar", [("c.png", png(seed=3)), ("d.png", png(40, 40, 4))])
    cut = (tmp_path / "in" / "1.tar").read_bytes()[:2100]
    (tmp_path / "in" / "1.tar").write_bytes(cut)
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    data = assert_codes(tmp_path / "out", tok, [picture(16, 16, i) for i in range(4)])
    assert data.columns["text"] == ["zero", "evil", None, None] and data.columns["label"] == [4, None, None, None]
    reasons = dict(skipped(tmp_path / "out"))
    assert "6,000 bytes" in reasons["large"] and "no picture" in reasons["none"] and "2 pictures" in reasons["two"]
    assert "beside it" in reasons["cap"] and reasons["bad"] and "damaged or cut off" in reasons["1.tar"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"] and path.read_bytes() == whole


def test_loose_files_and_rows_are_cut_into_units(tok, tmp_path):
    folder = loose_files(tmp_path / "in")
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i:02d}.png,t{i}\n" for i in range(7)))
    result = tokenize_dataset(folder, tmp_path / "files", tok, rows_per_shard=3)
    assert result.num_units == 3
    data = assert_codes(tmp_path / "files", tok, [picture(16, 16, i) for i in range(7)])
    assert data.columns["text"][5] == "t5"
    rows = [{"image": picture(16, 16, i), "label": i % 2} for i in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    table = datasets.Dataset.from_list(rows, features)
    tokenize_dataset(table, tmp_path / "rows", tok, rows_per_shard=2)
    data = assert_codes(tmp_path / "rows", tok, [row["image"] for row in rows])
    assert data.manifest["label_names"] == ["even", "odd"] and data.columns["label"] == [0, 1, 0, 1, 0]
    stream = table.to_iterable_dataset(num_shards=3)
    assert tokenize_dataset(stream, tmp_path / "stream", tok).num_units == 3
    assert_codes(tmp_path / "stream", tok, [row["image"] for row in rows])


def test_pictures_are_cut_to_squares(tok, tmp_path):
    parquet_shards(tmp_path / "in", 1, 3, lambda i: (30, 50))
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok, image_size=24)
    wanted = [picture(30, 50, i).crop((10, 0, 40, 30)).resize((24, 24), 3) for i in range(3)]
    assert_codes(tmp_path / "out", tok, wanted)


def test_sounds_of_many_lengths_share_batches(tmp_path):
    import soundfile

    make_audio_tokenizer().save_pretrained(tmp_path / "tok")
    tok = VQTokenizer.from_pretrained(tmp_path / "tok")
    (tmp_path / "in").mkdir()
    sounds = [sound(900 + 170 * i, i) for i in range(6)]
    for i, each in enumerate(sounds):
        soundfile.write(tmp_path / "in" / f"{i}.wav", each, 8000, subtype="FLOAT")
    (tmp_path / "in" / "9.wav").write_bytes(b"RIFF")
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok, batch_size=4)
    assert_codes(tmp_path / "out", tok, [{"audio": each, "sampling_rate": 8000} for each in sounds])
    ((name, reason),) = skipped(tmp_path / "out")
    assert name == "9.wav" and "no sound" in reason and str(tmp_path) not in reason


def test_texts_of_many_lengths_share_batches(tmp_path):
    make_text_tokenizer().save_pretrained(tmp_path / "tok")
    tok = VQTokenizer.from_pretrained(tmp_path / "tok")
    (tmp_path / "in").mkdir()
    texts = ["a" * n + "é" for n in (3, 40, 41, 9)]
    for i, each in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_text(each)
    (tmp_path / "in" / "9.txt").write_bytes(b"\xff\xfe\xff")
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok, batch_size=4)
    assert_codes(tmp_path / "out", tok, texts)
    ((name, reason),) = skipped(tmp_path / "out")
    assert name == "9.txt" and "UTF-8" in reason and str(tmp_path) not in reason


def test_shares_of_workers_together_give_the_bytes_of_one(tok, tmp_path):
    parquet_shards(tmp_path / "in", 5, 3, broken=(4,))
    whole = tokenize_dataset(tmp_path / "in", tmp_path / "one", tok)
    for worker in (2, 0, 1):
        part = tokenize_dataset(tmp_path / "in", tmp_path / "three", tok, worker=worker, num_workers=3)
        assert (part.manifest is None) == (worker != 1)
    assert part.manifest == whole.manifest and contents(tmp_path / "one") == contents(tmp_path / "three")


def test_what_is_finished_is_not_written_again_and_what_is_damaged_is(tok, tmp_path):
    parquet_shards(tmp_path / "in", 3, 2)
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    whole = contents(tmp_path / "out")
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("codes-*")}
    shard = tmp_path / "out" / "codes-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))  # as long as before: only its checksum tells
    (tmp_path / "out" / "codes-00002.json").unlink()
    (tmp_path / "out" / ".codes-00002.parquet.x.tmp").write_bytes(b"of a process that was killed")
    (tmp_path / "out" / "manifest.json").unlink()
    assert tokenize_dataset(tmp_path / "in", tmp_path / "out", tok).num_samples == 4
    assert contents(tmp_path / "out") == whole
    assert (tmp_path / "out" / "codes-00000.parquet").stat().st_ino == inodes["codes-00000.parquet"]


HOLD = """
import fcntl, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / "job.json").open("r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)
    print("held", flush=True)
    while not (folder / "codes-00002.json").exists():
        time.sleep(0.01)
"""


def test_a_shard_that_another_process_has_is_left_to_it_and_taken_over_when_that_ends(tok, tmp_path):
    parquet_shards(tmp_path / "in", 3, 2)
    tokenize_dataset(tmp_path / "in", tmp_path / "whole", tok)
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok, worker=0, num_workers=3)
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    assert other.wait(10) == 0
    written = [(tmp_path / "out" / f"codes-0000{i}.json").stat().st_mtime_ns for i in range(3)]
    assert written[0] < written[2] < written[1]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"num_bytes": "many"}, {"num_samples": -1}, {"file": "../x"}, {"sha256": None}])
def test_a_damaged_record_is_no_record(tok, tmp_path, change):
    parquet_shards(tmp_path / "in", 1, 2)
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    whole, path = contents(tmp_path / "out"), tmp_path / "out" / "codes-00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert tokenize_dataset(tmp_path / "in", tmp_path / "out", tok).num_samples == 2
    assert contents(tmp_path / "out") == whole


def test_another_tokenizer_or_preprocessing_in_the_folder_is_refused(tok, tmp_path):
    parquet_shards(tmp_path / "in", 2, 2)
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok, worker=0, num_workers=2)
    before = contents(tmp_path / "out")
    make_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    other = VQTokenizer.from_pretrained(tmp_path / "other")
    for words, options in (
        (f"(?s){tok.fingerprint}.*{other.fingerprint}|{other.fingerprint}.*{tok.fingerprint}", {"tokenizer": other}),
        ("another preprocessing: image_size was None and is now 16", {"image_size": 16}),
        ("another batch_size: was None and is now 3", {"batch_size": 3}),
    ):
        with pytest.raises(ValueError, match=words):
            tokenize_dataset(tmp_path / "in", tmp_path / "out", **{"tokenizer": tok, **options})
    parquet_shards(tmp_path / "in", 3, 2)
    with pytest.raises(ValueError, match="another source: units 2 was None and is now"):
        tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    with pytest.raises(ValueError, match="not empty"):
        tokenize_dataset(tmp_path / "in", tmp_path / "other", tok)
    assert contents(tmp_path / "out") == before


def test_a_full_disk_stops_the_run_and_the_rest_is_made_later(tok, tmp_path):
    parquet_shards(tmp_path / "in", 1, 2)
    parquet_shards(tmp_path / "in", 3, 2)
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    many = [{"bytes": png(seed=i), "path": None} for i in range(200)]
    parquet.write_table(arrow.table({"image": many}), tmp_path / "in" / "part-1.parquet")
    tokenize_dataset(tmp_path / "in", tmp_path / "whole", tok)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = (tmp_path / "whole" / "codes-00001.parquet").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 100, limits[1]))  # the system refuses to write more
    try:
        with pytest.raises(OSError, match="codes-00001.parquet.*1 shards were finished and are kept: start again"):
            tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(contents(tmp_path / "out")) == ["codes-00000.json", "codes-00000.parquet", "job.json"]
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nothing_readable_and_nothing_fitting_is_said(tok, tmp_path):
    parquet_shards(tmp_path / "in", 1, 2, broken=(0, 1))
    with pytest.raises(ValueError, match="none of 2 samples could be read"):
        tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    (tmp_path / "in" / "x.png").write_bytes(png())
    with pytest.raises(ValueError, match="1 parquet, 1 loose files"):
        tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    for words, source, options in (
        ("no folder and no file", tmp_path / "nowhere", {}),
        ("digits comes with vqtok", "digits", {}),
        ("image_size must be at least 1", tmp_path / "in", {"image_size": 0}),
        ("worker 2 of num_workers 2", tmp_path / "in", {"worker": 2, "num_workers": 2}),
        ("resample is for sound", tmp_path / "in", {"resample": True}),
        ("streaming is for a data set on the Hub", tmp_path / "in", {"streaming": True}),
        ("engine must be one of", tmp_path / "in", {"engine": "spark"}),
        ("no column 'nothing'", tmp_path / "in" / "part-0.parquet", {"keep": ("nothing",)}),
    ):
        with pytest.raises(ValueError, match=words):
            tokenize_dataset(source, tmp_path / "new", tok, **options)
    assert not (tmp_path / "new").exists()


def test_resampling_is_asked_for_each_time(tmp_path):
    import soundfile

    make_audio_tokenizer().save_pretrained(tmp_path / "tok")
    tok = VQTokenizer.from_pretrained(tmp_path / "tok")
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "0.wav", sound(4000), 16000, subtype="FLOAT")
    result = tokenize_dataset(tmp_path / "in", tmp_path / "yes", tok, resample=True)
    assert result.num_samples == 1 and result.manifest["preprocessing"]["resample"] is True
    assert not tok.processor.resample
    with pytest.raises(ValueError, match="none of 1 samples could be read"):
        tokenize_dataset(tmp_path / "in", tmp_path / "no", tok)


def test_without_ray_its_engine_says_what_to_install(tok, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    parquet_shards(tmp_path / "in", 1, 2)
    with pytest.raises(ImportError, match=r"pip install 'vqtok\[ray\]'"):
        tokenize_dataset(tmp_path / "in", tmp_path / "out", tok, engine="ray")


def test_shares_come_from_launchers():
    assert share_of({}) == (0, 1)
    assert share_of({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == (3, 8)
    assert share_of({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}) == (1, 4)
    array = {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "2"}
    assert share_of({**array, "SLURM_ARRAY_TASK_STEP": "2"}) == (2, 3)
    every = {
        share_of({**array, "SLURM_ARRAY_TASK_ID": str(i), "RANK": str(r), "WORLD_SIZE": "4"})
        for i in (2, 3, 4)
        for r in range(4)
    }
    assert every == {(n, 12) for n in range(12)}
    with pytest.raises(ValueError, match="RANK='x' is no number"):
        share_of({"RANK": "x", "WORLD_SIZE": "2"})


def test_the_command_says_what_it_did(saved, tmp_path, capsys):
    parquet_shards(tmp_path / "in", 2, 2, broken=(1,))
    arguments = ["tokenize", str(tmp_path / "in"), str(tmp_path / "out"), "-t", str(saved), "--device", "cpu"]
    assert main([*arguments, "--worker", "1", "--num_workers", "2"]) == 0
    assert "1 of 2 shards are there" in capsys.readouterr().out
    assert main(arguments) == 0
    out = capsys.readouterr()
    assert "is complete: 3 samples in 2 shards, 1 left out" in out.out and "1 of 2 shards are there already" in out.err
    assert main([*arguments, "--worker", "1"]) == 2
    assert json.loads((tmp_path / "out" / "job.json").read_text())["device"] == "cpu"


def test_kept_columns_have_a_type():
    columns = Columns(keep=("n", "tree"))
    assert columns.of({"n": 3, "tree": [1, {"a": 2}], "text": 7, "label": "x"}) == {"n": 3, "tree": '[1, {"a": 2}]'}
    with pytest.raises(ValueError, match="the label 'kind' is 'x', not a whole number"):
        Columns(label="kind").of({"kind": "x"})
