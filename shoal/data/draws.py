"""Numbers that look random and depend on nothing but what they are for: no state, the same on every machine.

SplitMix64's finaliser (Steele, Lea and Flood, 2014) stirs a 64-bit word; whatever a number is for is added in, word by
word.
"""

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15  # 2^64 by the golden ratio


def stirred(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def mix(seed: int, a: int, b: int) -> int:
    """64 bits of three numbers."""
    x = 0
    for word in (seed, a, b):
        x = stirred(x + word + GAMMA & MASK)
    return x


def uniform(seed: int, position: int, purpose: int) -> float:
    """A number in [0, 1) with 48 bits."""
    x = seed & MASK
    for word in (position, purpose):
        x = stirred(x + GAMMA * (word + 1) & MASK)
    return (x >> 16) / 2**48


def permuted(i: int, n: int, key: int) -> int:
    """Where a pseudo-random permutation of 0 … n-1 sends i: a Feistel network on the next even number of bits, walked
    until it lands below n (fewer than four steps on average)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for turn in range(4):
            left, right = right, left ^ (mix(key, turn, right) & low)
        i = left << half | right
        if i < n:
            return i
