"""The one form of codes: layout arithmetic, batches, the container."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from vqtok.codes import CodeLayout, Codes, LevelLayout, check_range
from vqtok.container import bits_for, pack_bits, unpack_bits

IMAGES = CodeLayout(2, (LevelLayout(8, 1, 256), LevelLayout(4, 1, 512)))
AUDIO = CodeLayout(1, (LevelLayout(640, 2, 1024), LevelLayout(320, 3, 1000)))


def make(
    layout: CodeLayout, sizes: list, seed: int = 0, side: dict | None = None, fingerprint: str | None = None
) -> Codes:
    """Random codes, zero in the padding."""
    generator = torch.Generator().manual_seed(seed)
    most = layout.grids([max(axis) for axis in zip(*sizes, strict=True)])
    levels = []
    for index, level in enumerate(layout.levels):
        codes = torch.zeros(len(sizes), level.num_codebooks, *most[index], dtype=torch.int64)
        for row, size in zip(codes, sizes, strict=True):
            grid = layout.grids(size)[index]
            inner = row[(slice(None), *(slice(n) for n in grid))]
            inner.copy_(torch.randint(level.codebook_size, inner.shape, generator=generator))
        levels.append(codes)
    return Codes(tuple(levels), torch.tensor(sizes), layout, fingerprint, side or {})


def assert_equal(first: Codes, second: Codes) -> None:
    assert first.layout == second.layout and first.fingerprint == second.fingerprint
    assert first.sizes.equal(second.sizes) and len(first.levels) == len(second.levels)
    assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(first.levels, second.levels, strict=True))
    assert first.side.keys() == second.side.keys()
    assert all(value.equal(second.side[name]) for name, value in first.side.items())


layouts = st.builds(
    lambda ndim, strides, codebooks, sizes: CodeLayout(
        ndim, tuple(LevelLayout(*level) for level in zip(sorted(strides, reverse=True), codebooks, sizes, strict=False))
    ),
    st.sampled_from([1, 2]),
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
    st.lists(st.sampled_from([1, 2, 3, 255, 256, 257, 1000, 70_000]), min_size=3, max_size=3),
)


# -- layouts


def test_grids_by_hand():
    assert IMAGES.grids((32, 32)) == ((4, 4), (8, 8))
    assert IMAGES.grids((1, 17)) == ((1, 3), (2, 6)) and IMAGES.padded((1, 17)) == (8, 24)
    assert IMAGES.num_codes((32, 32)) == 16 + 64 and IMAGES.bits((32, 32)) == 16 * 8 + 64 * 9
    assert AUDIO.grids([641]) == ((2,), (4,)) and AUDIO.num_codes([641]) == 2 * 2 + 4 * 3
    assert AUDIO.bits([1]) == pytest.approx(2 * 10 + 2 * 3 * math.log2(1000))
    assert CodeLayout(1, (LevelLayout(3),)).padded([2**60 + 1]) == (2**60 + 2,), "no rounding through floats"


@settings(max_examples=50, deadline=None)
@given(layouts)
def test_layouts_survive_json(layout):
    assert CodeLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert hash(CodeLayout.from_dict(layout.to_dict())) == hash(layout)


@pytest.mark.parametrize("field", ["stride", "num_codebooks", "codebook_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "4", True, None])
def test_impossible_levels_are_named(field, value):
    with pytest.raises(ValueError, match=f"LevelLayout.{field} must be a positive integer"):
        LevelLayout(**{"stride": 4, field: value})


@pytest.mark.parametrize(
    ("ndim", "levels", "named"),
    [
        (3, [LevelLayout(4)], "ndim"),
        (2.0, [LevelLayout(4)], "ndim"),
        (True, [LevelLayout(4)], "ndim"),
        (2, [], "at least one"),
        (2, [4], "LevelLayout"),
        (2, [LevelLayout(4), LevelLayout(8)], r"coarse to fine.*\[4, 8\]"),
        (2, [LevelLayout(8), LevelLayout(3)], r"nest.*\[8, 3\]"),
    ],
)
def test_impossible_layouts_are_named(ndim, levels, named):
    with pytest.raises(ValueError, match=named):
        CodeLayout(ndim, tuple(levels))


@pytest.mark.parametrize(
    "value",
    [None, [], {"ndim": 2}, {"ndim": 2, "levels": None}, {"ndim": 2, "levels": [{"stride": 4, "strid": 4}]}]
    + [{"ndim": 2, "levels": [3]}, {"ndim": 2, "levels": [{"stride": 4}], "extra": 1}, {"ndim": [], "levels": []}],
)
def test_dicts_that_are_no_layout_are_refused(value):
    with pytest.raises(ValueError, match="layout|CodeLayout"):
        CodeLayout.from_dict(value)


@pytest.mark.parametrize("size", [(32,), (32, 32, 3), (0, 32), (32, -1)])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match="2 axes of at least 1"):
        IMAGES.grids(size)


# -- batches


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sizes": [[32], [32]]}, r"sizes must have shape \(B, 2\)"),
        ({"sizes": [[32, 32], [0, 32]]}, "at least 1, got 0"),
        ({"sizes": [[40, 32], [32, 32]]}, r"\(5, 4\)"),
        ({"levels": ()}, "0 levels"),
        ({"levels": (torch.zeros(2, 1, 4, 4, dtype=torch.int64),) * 3}, "3 levels"),
        ({"levels": (torch.zeros(2, 1, 4, 4, dtype=torch.int32),)}, "int64"),
        ({"levels": (torch.zeros(2, 4, 4, dtype=torch.int64),)}, r"\(2, 4, 4\)"),
        ({"levels": (torch.zeros(3, 1, 4, 4, dtype=torch.int64),)}, "B=2"),
        ({"levels": (torch.zeros(2, 2, 4, 4, dtype=torch.int64),)}, "Q<=1"),
        ({"levels": (torch.zeros(2, 0, 4, 4, dtype=torch.int64),)}, "1<=Q"),
        ({"levels": (torch.zeros(2, 1, 4, 5, dtype=torch.int64),)}, r"\(4, 4\)"),
        ({"levels": (torch.full((2, 1, 4, 4), 256),)}, r"level 0: code 256 is outside \[0, 256\)"),
        ({"levels": (torch.full((2, 1, 4, 4), -1),)}, "code -1"),
        ({"side": {"gain": torch.zeros(3)}}, "gain"),
        ({"side": {"gain": torch.tensor(1.0)}}, "gain"),
    ],
)
def test_what_does_not_fit_the_layout_is_named(change, named):
    good = make(IMAGES, [[32, 32], [32, 32]])
    fields = {"levels": good.levels, "sizes": good.sizes, "layout": IMAGES, **change}
    with pytest.raises(ValueError, match=named):
        Codes(**fields)


def test_indexing_crops_to_the_sample():
    sizes = [[32, 32], [9, 40], [16, 16]]
    codes = make(IMAGES, sizes, side={"gain": torch.tensor([[1.0], [2.0], [3.0]])}, fingerprint="f")
    assert codes.levels[1].shape == (3, 1, 8, 10)
    for i, size in enumerate(sizes):
        one = codes[i]
        assert len(one) == 1 and one.sizes.tolist() == [size] and one.fingerprint == "f"
        assert [tuple(level.shape[2:]) for level in one.levels] == list(IMAGES.grids(size))
        assert one.levels[0].equal(codes.levels[0][i : i + 1, :, : one.levels[0].shape[2], : one.levels[0].shape[3]])
        assert one.side["gain"].tolist() == [[i + 1.0]]
        assert_equal(codes[i - 3], one)
        assert_equal(codes[np.int64(i)], one)
        assert_equal(codes[torch.tensor(i)], one)
    assert [len(one) for one in codes] == [1, 1, 1]
    assert_equal(codes[1:], codes[[1, 2]])
    assert_equal(codes[::-1], codes[torch.tensor([2, 1, 0])])
    assert_equal(codes[[True, False, True]], codes[[0, -1]])
    assert_equal(codes[torch.tensor([False, True, False])], codes[1])
    assert len(codes[[]]) == 0 == len(codes[3:])
    for index in (3, -4, [0, 3], [True, False]):
        with pytest.raises(IndexError):
            codes[index]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), layout=layouts)
def test_cat_undoes_indexing(data, layout):
    axis = st.integers(1, 30)
    sizes = data.draw(st.lists(st.lists(axis, min_size=layout.ndim, max_size=layout.ndim), min_size=1, max_size=4))
    codes = make(layout, sizes, side={"gain": torch.randn(len(sizes), 2)})
    assert_equal(Codes.cat(codes), codes)
    assert_equal(Codes.cat([codes[:1], codes[1:], codes[:0]]), codes)
    assert_equal(codes.to("cpu"), codes)


def test_parts_that_do_not_belong_together_are_refused():
    codes = make(AUDIO, [[700]], fingerprint="a")
    others = {
        "layouts": make(CodeLayout(1, AUDIO.levels[:1]), [[700]], fingerprint="a"),
        "different layouts": codes.prefix(num_levels=1),
        "fingerprints a and b": make(AUDIO, [[700]], fingerprint="b"),
        "numbers of codebooks": codes.prefix(num_codebooks=1),
        "side": make(AUDIO, [[700]], fingerprint="a", side={"gain": torch.ones(1)}),
    }
    for named, other in others.items():
        for parts in ([codes, other], [other, codes]):
            with pytest.raises(ValueError, match=named.replace("a and b", "")):
                Codes.cat(parts)
    with pytest.raises(ValueError, match="at least one part"):
        Codes.cat([])


def test_prefixes():
    codes = make(AUDIO, [[700], [5000]], side={"gain": torch.ones(2)}, fingerprint="f")
    short = codes.prefix(num_levels=1, num_codebooks=1)
    assert [tuple(level.shape) for level in short.levels] == [(2, 1, 8)] and short.levels[0].equal(
        codes.levels[0][:, :1]
    )
    assert short.layout == AUDIO and short.fingerprint == "f" and short.side == codes.side
    assert [level.shape[1] for level in codes.prefix(num_codebooks=3).levels] == [2, 3]
    assert_equal(codes.prefix(), codes)
    for wrong in ({"num_levels": 0}, {"num_levels": 3}, {"num_codebooks": 0}, {"num_codebooks": 4}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            codes.prefix(**wrong)


def test_check_range():
    check_range(torch.tensor([0, 4]), 5, "x")
    check_range(torch.zeros(0, dtype=torch.int64), 5, "x")
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=rf"here: code {bad} is outside \[0, 5\)"):
            check_range(torch.tensor([0, bad, 1]), 5, "here")


# -- bits


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 40))
def test_packed_bits_come_back(data, bits):
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=50))
    packed = pack_bits(np.array(values, np.int64), bits)
    assert packed == reference.pack_bits(values, bits)
    assert len(packed) == math.ceil(len(values) * bits / 8)
    assert unpack_bits(packed, bits, len(values)).tolist() == values
    assert unpack_bits(packed, bits, len(values)).dtype == np.int64


def test_bits_hold_the_largest_code_and_no_more():
    assert [bits_for(k) for k in (1, 2, 3, 4, 5, 256, 257, 1 << 20)] == [0, 1, 2, 2, 3, 8, 9, 20]


# -- the container


@settings(max_examples=80, deadline=None)
@given(data=st.data(), layout=layouts)
def test_containers_come_back(data, layout):
    axis = st.integers(1, 20)
    sizes = data.draw(st.lists(st.lists(axis, min_size=layout.ndim, max_size=layout.ndim), min_size=1, max_size=4))
    side = (
        {"gain": torch.randn(len(sizes)), "träger": torch.randn(len(sizes), 2, 3)} if data.draw(st.booleans()) else {}
    )
    codes = make(layout, sizes, data.draw(st.integers(0, 9)), side, data.draw(st.sampled_from([None, "ab" * 32])))
    codes = codes.prefix(data.draw(st.integers(1, len(layout.levels))), data.draw(st.sampled_from([None, 1])))
    packed = codes.to_bytes()
    assert_equal(Codes.from_bytes(packed), codes)
    payload = sum(
        math.ceil(
            sum(math.prod(layout.grids(size)[i]) for size in sizes) * level.shape[1] * bits_for(entry.codebook_size) / 8
        )
        for i, (level, entry) in enumerate(zip(codes.levels, layout.levels, strict=False))
    )
    header = int.from_bytes(packed[5:9], "little")
    assert len(packed) == 13 + header + payload + sum(4 * value.numel() for value in side.values())


def test_the_container_byte_by_byte():
    """The format is a promise: files of today are read by the versions of tomorrow."""
    layout = CodeLayout(1, (LevelLayout(2, 1, 4),))
    codes = Codes((torch.tensor([[[1, 2, 3]]]),), [[5]], layout, side={"g": torch.tensor([[1.5]])})
    header = b'{"n":1,"l":[[2,1,4]],"q":[1],"f":null,"s":[[1,5]],"x":{"g":[1]}}'
    body = b"VQTC\x01" + len(header).to_bytes(4, "little") + header + b"\x6c" + b"\x00\x00\xc0\x3f"
    assert codes.to_bytes() == body + zlib.crc32(body).to_bytes(4, "little")


def test_a_picture_has_a_short_header(tmp_path):
    three = CodeLayout(2, tuple(LevelLayout(stride, 1, 1 << 16) for stride in (256, 128, 64)))
    for layout in (IMAGES, three):
        packed = make(layout, [[4000, 3000]], fingerprint="f" * 64).to_bytes()
        assert int.from_bytes(packed[5:9], "little") <= 256
    # A batch of equal sizes is no longer than one picture.
    assert int.from_bytes(make(IMAGES, [[32, 32]] * 999, fingerprint="f" * 64).to_bytes()[5:9], "little") <= 256


def test_empty_batches_come_back():
    codes = make(IMAGES, [[32, 24]], side={"gain": torch.ones(1, 2)})[:0]
    back = Codes.from_bytes(codes.to_bytes())
    assert len(back) == 0 and [level.shape[:2] for level in back.levels] == [(0, 1), (0, 1)]
    assert back.side["gain"].shape == (0, 2)
    assert len(Codes.cat([back, make(IMAGES, [[8, 8]], side={"gain": torch.ones(1, 2)})])) == 1


def test_padding_is_not_saved():
    """Whatever a model left behind the edge of a smaller sample is not part of the codes."""
    codes = make(IMAGES, [[8, 8], [16, 16]])
    dirty = [level.clone() for level in codes.levels]
    dirty[1][0, :, 3, 3] = 7
    assert Codes(tuple(dirty), codes.sizes, IMAGES).to_bytes() == codes.to_bytes()


def test_save_and_load(tmp_path):
    codes = make(AUDIO, [[700], [5000]], side={"gain": torch.randn(2, 2)}, fingerprint="f" * 64)
    codes.save(tmp_path / "a.vqt")
    assert_equal(Codes.load(str(tmp_path / "a.vqt")), codes)
    assert [path.name for path in tmp_path.iterdir()] == ["a.vqt"]
    with pytest.raises(FileNotFoundError, match="b.vqt"):
        Codes.load(tmp_path / "b.vqt")
    (tmp_path / "a.vqt").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"a\.vqt: this is not a file of codes"):
        Codes.load(tmp_path / "a.vqt")


def test_every_altered_byte_and_every_truncation_is_refused():
    packed = make(AUDIO, [[700], [1500]], side={"gain": torch.ones(2)}, fingerprint="f" * 64).to_bytes()
    Codes.from_bytes(packed)
    for i in range(len(packed)):
        for flip in (0x01, 0x80, 0xFF):
            altered = packed[:i] + bytes([packed[i] ^ flip]) + packed[i + 1 :]
            with pytest.raises(ValueError, match="not a file of codes|version|truncated or altered"):
                Codes.from_bytes(altered)
        with pytest.raises(ValueError, match="not a file of codes|truncated"):
            Codes.from_bytes(packed[:i])
    with pytest.raises(ValueError, match="altered"):
        Codes.from_bytes(packed + b"\x00")
    with pytest.raises(ValueError, match="version 2.*upgrade"):
        Codes.from_bytes(packed[:4] + b"\x02" + packed[5:])


GOOD = {"n": 2, "l": [[8, 1, 16]], "q": [1], "f": None, "s": [[1, 8, 8]]}


def container(header: object, payload: bytes = b"\x10", length: int | None = None) -> bytes:
    """A container with a right checksum, whatever is inside."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = b"VQTC\x01" + (len(text) if length is None else length).to_bytes(4, "little") + text + payload
    return body + zlib.crc32(body).to_bytes(4, "little")


FORGED = [{key: value for key, value in GOOD.items() if key != missing} for missing in GOOD] + [
    {**GOOD, key: value}
    for key, values in {
        "n": [2.0, 1, 3, True, None, "2"],
        "l": [
            [],
            None,
            [[8, 1]],
            [[8, 1, 16, 1]],
            [[8.0, 1, 16]],
            [["8", 1, 16]],
            [[8, 0, 16]],
            "ab",
            [[4, 1, 4], [8, 1, 4]],
        ],
        "q": [[], [2], [0], [-1], "1", 5, [1, 1], [1.0], [True]],
        "f": [5, ["a"], True],
        "s": [
            [],
            [[]],
            [[1, 8]],
            [[1, 8, 8, 8]],
            [[0, 8, 8]],
            [[-1, 8, 8]],
            [[3, 8, 8]],
            [[1, 24, 8]],
            5,
            None,
            [["a", 8, 8]],
        ]
        + [[[1, 2**63, 8]], [[1, 2**80, 8]], [[10**9, 8, 8]], [[1, 8.0, 8]], [[True, 8, 8]], {"a": 1}],
        "x": [[], {"a": 5}, {"a": [2]}, {"a": [2**62]}, {"a": [-1]}, {"a": ["b"]}, {"a": [1.0]}, 3],
    }.items()
    for value in values
]


@pytest.mark.parametrize("header", [*FORGED, [1, 2], None, 7, b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"n": NaN}'])
def test_forged_headers_are_refused(header):
    assert Codes.from_bytes(container(GOOD)).levels[0].item() == 1
    with pytest.raises(ValueError, match=".{10}"):
        Codes.from_bytes(container(header))


def test_forged_lengths_and_payloads_are_refused():
    for data, named in [
        (container(GOOD, length=1 << 31), "claims"),
        (container(GOOD, payload=b""), "0 bytes, the header promises 1"),
        (container(GOOD, payload=b"\x10\x00"), "2 bytes"),
        (container({**GOOD, "l": [[8, 1, 10]]}, payload=b"\xf0"), "code 15 is outside"),
        # A codebook of one entry takes no bytes: 13 bytes must not ask for a hundred gigabytes.
        (
            container({**GOOD, "l": [[1, 1, 1]], "s": [[1, 100_000, 200_000]]}, payload=b""),
            "promises 20000000000 codes",
        ),
    ]:
        with pytest.raises(ValueError, match=named):
            Codes.from_bytes(data)
