"""The engine ray, on a cluster of this machine."""

import pytest

from tests.bulk.making import contents, parquet_shards
from vqtok import VQTokenizer, tokenize_dataset

pytestmark = pytest.mark.slow  # a cluster takes seconds to start


@pytest.fixture
def cluster(monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


def test_two_actors_of_ray_write_the_bytes_of_one_process(cluster, saved, tmp_path):
    parquet_shards(tmp_path / "in", 16, 1, broken=(5,))  # more than one at once for an actor
    tok = VQTokenizer.from_pretrained(saved)
    one = tokenize_dataset(tmp_path / "in", tmp_path / "one", tok)
    many = tokenize_dataset(tmp_path / "in", tmp_path / "ray", tok, engine="ray", processes=2)
    assert many.num_samples == one.num_samples == 15 and many.manifest == one.manifest
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
