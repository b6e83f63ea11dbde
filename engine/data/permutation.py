"""Keyed pseudo-random numbers and permutations as functions: no state, no memory, the same on every machine and version."""

import hashlib


def keyed_hash(*key: int) -> int:
    """64 random-looking bits that depend on the integers of the key alone."""
    text = " ".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: int, size: int, *key: int) -> int:
    """Where `index` goes in a random permutation of range(size) chosen by the key.

    A Feistel network permutes the smallest range of 4**n numbers that holds `size`; results beyond `size` are sent on through it.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for step in range(6):
            left, right = right, left ^ keyed_hash(*key, step, right) & mask
        index = left << half_bits | right
        if index < size:
            return index
