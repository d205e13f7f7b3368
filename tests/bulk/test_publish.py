"""A code cache on the Hub: one commit, a card that is true, and nothing unfinished."""

import re

import datasets
import pytest
import yaml

from tests.bulk.making import parquet_shards
from tests.hub.loopback import MINE, OTHERS
from vqtok import VQTokenizer, tokenize_dataset
from vqtok.bulk.publish import PublishedCodes
from vqtok.cli import main
from vqtok.prior.data import CodeDataset

NAME, KEY = "me/codes", "datasets/me/codes"


@pytest.fixture
def codes(saved, tmp_path):
    parquet_shards(tmp_path / "in", 2, 3, broken=(1,))
    tokenize_dataset(tmp_path / "in", tmp_path / "out", VQTokenizer.from_pretrained(saved))
    return tmp_path / "out"


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", MINE)


def test_a_code_cache_is_pushed_as_a_data_set_and_its_snippet_works(hub, logged_in, codes, capsys):
    assert main(["push", str(codes), NAME, "--license", "mit"]) == 0
    assert f"/{KEY}/commit/" in capsys.readouterr().out
    repo = hub.repos[KEY]
    assert repo.messages == ["initial commit", "Upload with vqtok"]
    files = repo.files()
    shards = {f"codes-0000{i}.parquet" for i in range(2)}
    others = {"manifest.json", "job.json", "codes-00000.skipped.jsonl", "README.md", ".gitattributes"}
    assert set(files) == shards | others
    assert all(files[name] == (codes / name).read_bytes() for name in set(files) - {"README.md", ".gitattributes"})
    card = files["README.md"].decode()
    assert CodeDataset(codes).fingerprint in card and "5, 1 left out" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit" and "vqtok" in header["tags"]
    rows = datasets.load_dataset("parquet", data_files=str(codes / header["configs"][0]["data_files"]))["train"]
    assert set(rows["text"]) == {f"number {i}" for i in (0, 2, 3, 4, 5)}
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(snippet, {})
    assert capsys.readouterr().out == "5 [(1, 2, 2), (1, 4, 4)]\n"
    assert main(["push", str(codes), NAME]) == 0  # a second time nothing changes
    assert len(repo.messages) == 2


def test_what_a_person_wrote_stays_and_shards_that_are_no_more_go(hub, codes):
    stale = {"codes-00007.parquet": b"PAR1", "codes-00007.skipped.jsonl": b"{}", "paper.md": b"mine"}
    hub.add(KEY, {**stale, "README.md": b"---\nlicense: mit\n---\nFrom my camera.\n"})
    PublishedCodes(codes).push_to_hub(NAME, token=MINE)
    files = hub.repos[KEY].files()
    assert len(hub.repos[KEY].messages) == 2 and not {name for name in files if "00007" in name}
    card = files["README.md"].decode()
    assert files["paper.md"] == b"mine" and card.endswith("From my camera.\n") and "license: mit" in card


def test_private_and_failed_pushes(hub, codes):
    published = PublishedCodes(codes)
    hub.fail("POST", "/commit/", 500)
    with pytest.raises(OSError, match="^me/codes was not pushed: the Hub answered 500"):
        published.push_to_hub(NAME, token=MINE, private=True)
    assert hub.repos[KEY].private and len(hub.repos[KEY].messages) == 1
    hub.failures.clear()
    with pytest.raises(OSError, match="the Hub answered 403.*hf auth login"):
        published.push_to_hub(NAME, token=OTHERS)
    with pytest.raises(ValueError, match="no option 'public'"):
        published.push_to_hub(NAME, public=True)
    published.push_to_hub(NAME, token=MINE, revision="v1")
    assert "manifest.json" in hub.repos[KEY].files("v1") and "manifest.json" not in hub.repos[KEY].files()
    storage = [seen for seen in hub.seen if seen.host == hub.storage_url.removeprefix("http://")]
    assert storage and not [seen for seen in storage if seen.token]


def test_an_unfinished_or_damaged_folder_is_refused(hub, logged_in, codes, capsys):
    def refused(words):
        return main(["push", str(codes), NAME]) == 2 and words in capsys.readouterr().err

    notes = codes / "codes-00000.skipped.jsonl"
    lines = notes.read_text()
    notes.write_text(lines + MINE)
    assert refused("codes-00000.skipped.jsonl holds the token that you push with")
    notes.write_text(lines)
    shard = codes / "codes-00001.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:200] + b"x" + data[201:])
    assert refused("its checksum differs")
    shard.rename(codes / "elsewhere")
    shard.symlink_to(codes / "elsewhere")
    assert refused("is missing, or a link")
    (codes / "manifest.json").unlink()
    assert refused("is not finished")
    assert not hub.repos
