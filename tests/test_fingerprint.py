"""The fingerprint is equal exactly when the code space is."""

import hashlib
import json
import struct

import pytest
import torch

from vqtok.fingerprint import check_fingerprint, fingerprint

FIELDS = {"strides": [8, 4], "model_type": "x", "preprocessing": {"mean": 0.5, "rgb": True}}
TENSORS = {"encoder.weight": torch.randn(3, 4), "quantizer.table": torch.randn(5), "encoder.steps": torch.tensor(7)}


def test_the_bytes_that_are_hashed():
    """Written out once: a change of this test is a change of every published fingerprint."""
    table = torch.tensor([[1.5, -2.0], [4.0, 0.25]])
    text = '{"a":[1,2],"\\u00fc":null}' + "\ncodes:(1,):<i8\n"
    expected = hashlib.sha256(
        text.encode() + struct.pack("<q", 9) + b"\ntable:(2, 2):<f4\n" + struct.pack("<4f", 1.5, -2, 4, 0.25)
    )
    fields = {"ü": None, "a": (1, 2)}
    assert fingerprint(fields, {"table": table, "codes": torch.tensor([9])}) == expected.hexdigest()


def test_what_does_not_matter():
    expected = fingerprint(FIELDS, TENSORS)
    assert len(expected) == 64 and set(expected) <= set("0123456789abcdef")
    assert fingerprint(dict(reversed(FIELDS.items())), dict(reversed(TENSORS.items()))) == expected
    assert fingerprint(json.loads(json.dumps(FIELDS)), TENSORS) == expected
    assert fingerprint({**FIELDS, "strides": (8, 4)}, TENSORS) == expected
    turned = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in TENSORS.items()}
    assert fingerprint(FIELDS, turned) == expected, "memory layout"
    wide = {name: value.double() if value.is_floating_point() else value.int() for name, value in TENSORS.items()}
    assert fingerprint(FIELDS, wide) == expected, "dtype of storage"
    leaves = {
        name: torch.nn.Parameter(value) if value.is_floating_point() else value for name, value in TENSORS.items()
    }
    assert fingerprint(FIELDS, leaves) == expected, "gradients"
    exact = {"w": torch.randn(9).bfloat16()}
    assert fingerprint({}, exact) == fingerprint({}, {"w": exact["w"].float()})


def test_what_matters():
    def variant(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**TENSORS, name: value}

    weight = TENSORS["encoder.weight"]
    one_bit = weight.clone()
    one_bit.view(torch.int32)[2, 3] ^= 1
    without = {name: value for name, value in TENSORS.items() if name != "encoder.steps"}
    swapped = {**TENSORS, "a": weight[0], "b": weight[1]}, {**TENSORS, "a": weight[1], "b": weight[0]}
    prints = [
        fingerprint(FIELDS, TENSORS),
        fingerprint({**FIELDS, "strides": [8, 2]}, TENSORS),
        fingerprint({**FIELDS, "preprocessing": {"mean": 0.5, "rgb": False}}, TENSORS),
        fingerprint({**FIELDS, "more": None}, TENSORS),
        fingerprint(FIELDS, without),
        fingerprint(FIELDS, variant("encoder.weight", one_bit)),
        fingerprint(FIELDS, variant("encoder.weight", weight.view(4, 3))),
        fingerprint(FIELDS, variant("encoder.steps", torch.tensor(8))),
        fingerprint(FIELDS, variant("encoder.steps", torch.tensor(7.0))),
        fingerprint(FIELDS, {**without, "encoder.step": TENSORS["encoder.steps"]}),
        *(fingerprint(FIELDS, each) for each in swapped),
        fingerprint({}, {}),
    ]
    assert len(set(prints)) == len(prints)


def test_a_mismatch_names_both_and_the_remedy():
    check_fingerprint("a" * 64, "a" * 64, "codes")
    check_fingerprint(None, "a" * 64, "codes")
    check_fingerprint(None, None, "codes")
    with pytest.raises(ValueError, match=f"the shard x.*{'b' * 64}.*{'a' * 64}.*encode again"):
        check_fingerprint("a" * 64, "b" * 64, "the shard x")
    with pytest.raises(ValueError, match="unsaved tokenizer"):
        check_fingerprint("a" * 64, None, "codes")
