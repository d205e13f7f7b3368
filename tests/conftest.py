"""What every test runs under: one torch thread, fixed seeds, no network, an empty Hugging Face cache."""

import os
import shutil
import socket
import tempfile

# Before torch and huggingface_hub are imported: both read these once. Processes started by tests inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="vqtok-tests-")  # so that no test depends on what a machine has cached
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests marked `network` need it to be 0
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import random

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("tests.common")  # its assertions then show their values

torch.set_num_threads(1)

LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}


class NetworkBlockedError(RuntimeError):
    """Not an OSError on purpose: libraries swallow those and fall back to a cache, and the test would pass."""


def _guarded(connect):
    def connect_to_loopback_only(self, address):
        is_internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if is_internet and address[0] not in LOOPBACK and address[0] != socket.gethostname():
            raise NetworkBlockedError(f"a test tried to reach {address[0]}:{address[1]}; mark it `network` if it must")
        return connect(self, address)

    return connect_to_loopback_only


_CONNECT, _CONNECT_EX = socket.socket.connect, socket.socket.connect_ex


def _block_network(blocked: bool) -> None:
    socket.socket.connect = _guarded(_CONNECT) if blocked else _CONNECT
    socket.socket.connect_ex = _guarded(_CONNECT_EX) if blocked else _CONNECT_EX


def pytest_configure(config):
    _block_network(True)


def pytest_unconfigure(config):
    _block_network(False)
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def network_only_where_marked(request):
    """Opens the network for tests marked `network`; it is closed for all others, fixtures and collection included."""
    if request.node.get_closest_marker("network") is None:
        yield
        return
    _block_network(False)
    yield
    _block_network(True)


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Gives every test the same random state, so that it does not depend on which tests ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny image tokenizer."""
    from tests.tiny import make_tokenizer  # not above: it loads vqtok, which tests of imports want to do themselves

    folder = tmp_path_factory.mktemp("saved")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """The same folder, to spoil."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path
