"""The guards of conftest.py are alive."""

import os
import socket

import pytest
import torch


def test_the_network_is_blocked():
    # 192.0.2.1 is reserved for documentation: nothing answers there, should the guard be gone.
    for connect in (socket.socket.connect, socket.socket.connect_ex):
        with socket.socket() as sock, pytest.raises(RuntimeError, match="tried to reach 192.0.2.1:80"):
            sock.settimeout(1)
            connect(sock, ("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match="tried to reach"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


def test_loopback_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass


def test_the_hub_is_offline_and_its_cache_our_own():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HOME"] == constants.HF_HOME
    assert "vqtok-tests-" in constants.HF_HUB_CACHE


@pytest.mark.parametrize("run", [1, 2])
def test_every_test_starts_from_the_same_seed(run):
    assert torch.rand(()).item() == torch.rand((), generator=torch.Generator().manual_seed(0)).item()
    assert torch.get_num_threads() == 1
