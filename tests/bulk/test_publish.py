"""A code cache on the Hub: one commit, a card that is true, and nothing unfinished."""

import re

import datasets
import pytest
import yaml

from tests.bulk.making import parquet_shards
from vqtok import VQTokenizer, tokenize_dataset
from vqtok.cli import main
from vqtok.prior.data import CodeDataset


@pytest.fixture
def codes(saved, tmp_path):
    parquet_shards(tmp_path / "in", 2, 3, broken=(1,))
    tok = VQTokenizer.from_pretrained(saved)
    tokenize_dataset(tmp_path / "in", tmp_path / "out", tok)
    return tmp_path / "out"


@pytest.fixture
def logged_in(monkeypatch):
    from tests.hub.loopback import TOKENS

    token = next(iter(TOKENS))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setenv("HF_TOKEN", token)
    return TOKENS[token]


def test_a_code_cache_is_pushed_as_a_data_set_and_its_snippet_works(hub, logged_in, codes, capsys):
    name = f"{logged_in}/codes"
    assert main(["push", str(codes), name, "--license", "mit"]) == 0
    assert f"/datasets/{name}/commit/" in capsys.readouterr().out
    repo = hub.repos[f"datasets/{name}"]
    assert [log for log in repo.commits] and len(repo.commits) == 2  # that which makes it, and ours
    files = repo.commits[repo.branches["main"]]
    shards = {f"codes-0000{i}.parquet" for i in range(2)}
    assert set(files) == {
        *shards,
        "manifest.json",
        "job.json",
        "codes-00000.skipped.jsonl",
        "README.md",
        ".gitattributes",
    }
    assert all(files[shard] == (codes / shard).read_bytes() for shard in shards)
    card = files["README.md"].decode()
    assert CodeDataset(codes).fingerprint in card and "5, 1 left out" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert set(
        datasets.load_dataset("parquet", data_files=str(codes / header["configs"][0]["data_files"]))["train"]["text"]
    ) == {f"number {i}" for i in (0, 2, 3, 4, 5)}
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(snippet, {})
    assert capsys.readouterr().out == "5 [(1, 2, 2), (1, 4, 4)]\n"
    assert main(["push", str(codes), name]) == 0  # a second time nothing changes
    assert len(repo.commits) == 2


def test_an_unfinished_or_damaged_folder_is_refused(hub, logged_in, codes, capsys):
    shard = codes / "codes-00001.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:200] + b"x" + data[201:])
    assert main(["push", str(codes), "codes"]) == 2 and "its checksum differs" in capsys.readouterr().err
    (codes / "manifest.json").unlink()
    assert main(["push", str(codes), "codes"]) == 2 and "is not finished" in capsys.readouterr().err
    assert not hub.repos
