"""Data sets and tokenizers on a Hub of the loopback interface, as inputs of bulk encoding."""

import json

import datasets
import pytest
import torch

from tests.bulk.making import contents, parquet_shards, skipped
from tests.hub.loopback import MINE
from tests.tiny import make_tokenizer, picture
from vqtok import VQTokenizer, tokenize_dataset
from vqtok.prior.data import CodeDataset

NAME = "me/pictures"


@pytest.fixture
def data(hub, monkeypatch, tmp_path):
    """The Hub with a data set of two shards, of which one row is broken."""
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_DATASETS_CACHE", str(tmp_path / "datasets"))):
        monkeypatch.setattr(datasets.config, name, value)
    parquet_shards(tmp_path / "in", 2, 3, broken=(4,))
    shards = {f"train-{i}.parquet": (tmp_path / "in" / f"part-{i}.parquet").read_bytes() for i in range(2)}
    card = b"---\nconfigs:\n- config_name: default\n  data_files: train-*.parquet\n---\n"
    hub.add(f"datasets/{NAME}", {"README.md": card, **shards})
    return hub


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_on_the_hub(data, saved, tmp_path, streaming):
    tok = VQTokenizer.from_pretrained(saved)
    result = tokenize_dataset(NAME, tmp_path / "out", tok, streaming=streaming, rows_per_shard=4)
    assert result.num_units == 2 and result.manifest["source"]["name"] == NAME
    codes = CodeDataset(tmp_path / "out")
    good = [i for i in range(6) if i != 4]
    assert codes.columns["text"] == [f"number {i}" for i in good]
    for index, i in enumerate(good):
        wanted = tok.encode([picture(16, 16, i)])
        assert all(torch.equal(a, b[0]) for a, b in zip(codes[index]["codes"], wanted.levels, strict=True))
    assert len(skipped(tmp_path / "out")) == 1


def test_another_revision_of_a_tokenizer_is_refused_though_its_codes_are_the_same(hub, tmp_path):
    parquet_shards(tmp_path / "in", 2, 2)
    make_tokenizer().push_to_hub("me/vq", token=MINE)
    revisions = [hub.repos["me/vq"].branches["main"]]
    done = tokenize_dataset(tmp_path / "in", tmp_path / "out", "me/vq", worker=0, num_workers=2)
    assert done.manifest is None
    known = json.loads((tmp_path / "out" / "job.json").read_text())["tokenizer"]
    assert (known["repo"], known["revision"]) == ("me/vq", revisions[0])
    before = contents(tmp_path / "out")
    other = make_tokenizer()
    with torch.no_grad():
        other.model.decoder.null.add_(1)  # it draws otherwise and reads alike
    other.push_to_hub("me/vq", token=MINE)
    revisions.append(hub.repos["me/vq"].branches["main"])
    with pytest.raises(
        ValueError, match=f"another tokenizer: revision was '{revisions[0]}' and is now '{revisions[1]}'"
    ):
        tokenize_dataset(tmp_path / "in", tmp_path / "out", "me/vq")
    assert contents(tmp_path / "out") == before
    assert tokenize_dataset(tmp_path / "in", tmp_path / "out", "me/vq", revision=revisions[0]).manifest is not None
