"""The bytes of a file of codes: a checked frame around a JSON header and a payload, and integers packed to the bit.

What the header means is the business of `vqtok.codes`.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np

MAGIC = b"VQTC"
CONTAINER_VERSION = 1
MAX_HEADER_BYTES = 1 << 24


def frame(header: dict[str, Any], payload: bytes) -> bytes:
    """Magic, version, length of the JSON header, header, payload, CRC-32 of all before."""
    packed = json.dumps(header, separators=(",", ":")).encode()
    body = MAGIC + bytes([CONTAINER_VERSION]) + len(packed).to_bytes(4, "little") + packed + payload
    return body + zlib.crc32(body).to_bytes(4, "little")


def unframe(data: bytes) -> tuple[bytes, bytes]:
    """The header's JSON and the payload of what `frame` wrote.

    Raises:
        ValueError: the bytes are foreign, truncated, altered, or of a newer version; the reason is said.
    """
    if data[:4] != MAGIC:
        raise ValueError("this is not a file of codes: it does not begin with the bytes 'VQTC'")
    if len(data) < 13:
        raise ValueError("this file of codes is truncated: it ends inside its header")
    if data[4] != CONTAINER_VERSION:
        raise ValueError(f"codes of container version {data[4]}, this vqtok reads {CONTAINER_VERSION}: upgrade vqtok")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("this file of codes is truncated or altered: its checksum does not match")
    length = int.from_bytes(data[5:9], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 13):
        raise ValueError(f"the header of this file of codes claims {length} bytes, more than the file holds")
    return data[9 : 9 + length], data[9 + length : -4]


def bits_for(codebook_size: int) -> int:
    """Whole bits that hold one code of a codebook of this size; 0 for a codebook of one entry."""
    return (codebook_size - 1).bit_length()


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Pack non-negative integers of `bits` bits each, most significant bit first, into ceil(n * bits / 8) bytes."""
    if not bits or not len(values):
        return b""
    shifts = np.arange(bits - 1, -1, -1, dtype=np.int64)
    return np.packbits(((values[:, None] >> shifts) & 1).astype(np.uint8)).tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> np.ndarray:
    """The `count` int64 values that `pack_bits` packed."""
    if not bits:
        return np.zeros(count, np.int64)
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    return flat.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def run_lengths(sizes: list[list[int]]) -> list[list[int]]:
    """[[count, *size], ...]: batches of equal sizes keep a small header."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][1:] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, *size])
    return runs
