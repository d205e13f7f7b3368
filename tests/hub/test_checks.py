"""Nothing is published that should not be: by name, and before the first request."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import make_tokenizer
from vqtok.hub.checks import publishable_files, without_paths
from vqtok.hub.publish import publish

FACTS = {"kind": "tokenizer", "modality": "image"}
TOKEN = "hf_" + "t" * 34


def write(name, data):
    def spoil(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return spoil


def metadata(folder):
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors", metadata={"from": "/home/anna/run"})


BAD = [
    (write("pytorch_model.bin", b"x"), "pytorch_model.bin is a pickle or an archive"),
    (write("training/optimizer.pt", b"x"), "training/optimizer.pt is a pickle"),
    (write("last.ckpt", b"x"), "last.ckpt is a pickle"),
    (write("state.npz", b"x"), "state.npz is a pickle"),
    (write("results.json", pickle.dumps({"a": 1})), "results.json is a pickle"),
    (write("weights.txt", b"PK\x03\x04data.pkl"), "weights.txt is a pickle or an archive"),
    (write("modeling_x.py", "print()"), "modeling_x.py is of a kind that is not published"),
    (write("run.sh", "true"), "run.sh is of a kind"),
    (write("checkpoints/step-1/x.json", "{}"), "part of a checkpoint"),
    (write("other.safetensors", pickle.dumps(1)), "other.safetensors is no complete safetensors file"),
    (write("training.json", '{"a":\n "hf_' + "A" * 34 + '"}'), "training.json, line 2, holds a Hugging Face token"),
    (write("notes.md", "-----BEGIN RSA PRIVATE KEY-----"), "notes.md, line 1, holds a private key"),
    (write("training.json", '{"wandb_api_key": "' + "a1" * 20 + '"}'), "holds a W&B or other API key"),
    (write("training.json", '{"said": "loaded /home/anna/data/x"}'), "a path of a home folder '/home/anna'"),
    (write("vq_tokenizer/config.json", '{"a": "see /Users/anna/x"}'), "vq_tokenizer/config.json, line 1, holds a path"),
    (write("training.json", r'{"a": "in C:\\Users\\anna\\x"}'), "a path of a home folder"),
    (write("metrics.json", '{"a": "on /scratch/anna"}'), "a path of a machine '/scratch/anna'"),
    (write("samples/a.png", b"\x89PNG tEXt /tmp/run/a.png"), "samples/a.png, line 1, holds a path of a machine"),
    (write("metrics.json", json.dumps({"a": TOKEN[:3] + "-" + TOKEN})), "holds the token that you push with"),
    (write("README.md", "it lies in /home/anna/x"), "README.md, line 1, holds a path of a home folder"),
    (metadata, "a.safetensors, line 1, holds a path of a home folder"),
    (lambda f: (f / "link.json").symlink_to("/etc/hostname"), "link.json is a link"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD)
def test_what_may_not_be_published_is_named_before_anything_is_sent(hub, tmp_path, spoil, words):
    make_tokenizer().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        publish(tmp_path, "me/vq", FACTS, token=TOKEN)
    assert hub.seen == [] and TOKEN not in str(caught.value)


def test_what_is_fine_is_fine(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    for name, text in {
        "README.md": "mount it at /data/x; see https://huggingface.co/data/x, a/opt/b and docs/tmp/x; and/or /",
        "tokenizer.json": '{"vocab": {"/home/anna": 1}}',
        ".gitattributes": "x",
        "LICENSE": "MIT",
    }.items():
        (tmp_path / name).write_text(text)
    names = publishable_files(tmp_path)
    assert "LICENSE" in names and "tokenizer.json" in names and ".gitattributes" not in names


def test_paths_lose_their_folders():
    value = {
        "a": "/home/anna/out/vq",
        "b": ["~/x/", r"C:\Users\anna\y", r"\\host\share\z"],
        "c": "out/vq",
        "d": 3,
        "e": "me/vq",
    }
    wanted = {"a": "vq", "b": ["x", "y", "z"], "c": "out/vq", "d": 3, "e": "me/vq"}
    assert without_paths(value) == wanted
