"""Random numbers as functions of keys: no generator, no state, the same on every machine and rank.

All integers are 64-bit with wrap-around; keys and their parts may be arrays, everything is vectorised.
"""

import hashlib

import numpy as np

GOLD = np.uint64(0x9E3779B97F4A7C15)
M1 = np.uint64(0xBF58476D1CE4E5B9)
M2 = np.uint64(0x94D049BB133111EB)
ROUNDS, FLOOR_BITS = 8, 6


def _u64(value: object) -> np.ndarray:
    """At least 1-d uint64, so that wrap-around never warns as numpy scalars do."""
    array = np.asarray(value)
    return np.atleast_1d(array.astype(np.uint64) if array.dtype != np.uint64 else array)


def mix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: a bijection of 64-bit integers."""
    x = _u64(x)
    x = (x ^ (x >> np.uint64(30))) * M1
    x = (x ^ (x >> np.uint64(27))) * M2
    return x ^ (x >> np.uint64(31))


def key(*parts: object) -> np.ndarray:
    """A 64-bit key from integers or integer arrays that broadcast; shape (1,) from plain integers."""
    h = np.zeros(1, np.uint64)
    for part in parts:
        h = mix64((h ^ _u64(part)) * M2 + GOLD)
    return h


def name_tag(name: str) -> int:
    """A source's own number, independent of the other sources: the first 8 bytes of sha256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def uniform(keys: np.ndarray, num: int) -> np.ndarray:
    """`num` draws in [0, 1) per key -> keys.shape + (num,), float64."""
    counter = np.arange(1, num + 1, dtype=np.uint64) * GOLD
    return (mix64(_u64(keys)[..., None] + counter) >> np.uint64(11)) * 2.0**-53


def feistel(x: np.ndarray, n: np.ndarray | int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of [0, n), evaluated at x; n and keys may vary per element.

    Alternating Feistel network over max(6, ceil(log2 n)) bits with cycle walking. Fewer bits would be visibly biased,
    and an index outside the domain could walk for ever, so it is refused.
    """
    x, n, keys = np.atleast_1d(np.asarray(x, np.int64)), np.asarray(n, np.int64), _u64(keys)
    x, keys = np.broadcast_arrays(x, keys) if n.ndim == 0 else np.broadcast_arrays(x, keys, n)[:2]
    if not ((x >= 0) & (x < n)).all():
        raise ValueError("feistel: an index lies outside [0, n)")
    bits = np.maximum(FLOOR_BITS, np.ceil(np.log2(np.maximum(n, 2))).astype(np.int64))
    bits = bits + ((np.int64(1) << bits) < n)  # where log2 rounded down
    low_bits = bits // 2
    low, high, size = (np.asarray(a, np.uint64) for a in (low_bits, bits - low_bits, n))
    if n.ndim:  # else scalars, which stay scalars: a third of the work
        low, high, size = (np.broadcast_to(a, x.shape).ravel() for a in (low, high, size))
    k = keys.ravel()
    result = _rounds(x.astype(np.uint64).ravel(), low, high, k)
    todo = np.flatnonzero(result >= size)
    while todo.size:
        result[todo] = _rounds(result[todo], _at(low, todo), _at(high, todo), k[todo])
        todo = todo[result[todo] >= _at(size, todo)]
    return result.astype(np.int64).reshape(x.shape)


def _at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    return values[places] if values.ndim else values


def _rounds(value: np.ndarray, low_bits: np.ndarray, high_bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    low, high = value & low_mask, value >> low_bits
    for i in range(ROUNDS):
        round_key = keys + GOLD * _u64(i + 1)
        if i % 2 == 0:
            high = high ^ (mix64(round_key ^ low) & high_mask)
        else:
            low = low ^ (mix64(round_key ^ high) & low_mask)
    return (high << low_bits) | low
