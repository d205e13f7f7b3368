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
os.environ["HF_HUB_DISABLE_XET"] = "1"  # it speaks to servers of its own
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_TOKEN"] = os.environ["HUGGING_FACE_HUB_TOKEN"] = ""  # no test knows a real one
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

import random
import time

import numpy as np
import pytest
import torch

from tests.hub.loopback import shared

if os.environ["HF_HUB_OFFLINE"] != "0":
    # The only Hub there is: closed, until a test asks for the fixture `hub`. The client is imported later, and reads this then.
    os.environ["HF_ENDPOINT"] = shared().endpoint

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


@pytest.fixture(scope="session")
def _hub_server():
    hub = shared()
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def hub(_hub_server, monkeypatch, tmp_path):
    """An empty Hub on the loopback interface, with the real client set to it, a cache of its own, and quick retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    _hub_server.clear()
    sleep = time.sleep
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    close_session()
    yield _hub_server
    close_session()


@pytest.fixture
def copied(saved, tmp_path):
    """The same folder, to spoil."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def loader_is_not_reached(monkeypatch):
    """Fails the test when weights would be allocated."""
    from transformers import PreTrainedModel  # not before the environment is set

    def reached(*args, **kwargs):
        raise AssertionError("the weights would be allocated now")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(reached))
