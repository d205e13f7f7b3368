"""Hashes that are the same in every process, on every platform, for every version of numpy."""

import hashlib

_MASK = 2**64 - 1


def hash64(content: bytes) -> int:
    """Return a 64-bit hash of bytes, the same in every process (Python's own hash of them is not)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def mix(value: int) -> int:
    """Return the next splitmix64 output: a 64-bit hash in a microsecond, where a numpy generator takes twenty to start."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
