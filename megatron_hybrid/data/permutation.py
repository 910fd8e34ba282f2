"""Pseudo-random permutation that is computed, not stored.

A Feistel network (M. Luby and C. Rackoff, "How to construct pseudorandom permutations", 1988) permutes the smallest
power of four that holds n; results outside [0, n) are sent through again ("cycle walking": J. Black and P. Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002), which keeps it a bijection. The round function is the finaliser
of SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). This
shuffles; it does not encrypt.
"""

_MASK = (1 << 64) - 1
_ROUNDS = 8


def mix64(x: int) -> int:
    """Return SplitMix64's output for state x, a bijection of 64-bit integers with seemingly independent bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def hash_integers(*values: int) -> int:
    """Return one 64-bit hash of several integers in order."""
    state = 0
    for value in values:
        state = mix64(state ^ mix64(value & _MASK))
    return state


class Permutation:
    """Bijection of [0, n) by a key. `permutation(i)` takes constant time and memory."""

    def __init__(self, n: int, *key: int):
        """Create a permutation of [0, n). key: integers such as a seed and an epoch. Raises ValueError if n < 1."""
        if n < 1:
            raise ValueError(f"a permutation of {n} things: n must be at least 1")
        self.n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._shift = 64 - self._half_bits
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = tuple(hash_integers(*key, n, round_) for round_ in range(_ROUNDS))

    def __call__(self, i: int) -> int:
        """Return the image of i. Raises IndexError outside [0, n)."""
        if not 0 <= i < self.n:
            raise IndexError(f"{i} is outside [0, {self.n})")
        while True:  # the domain is below 4n, so fewer than four iterations on average
            left, right = i >> self._half_bits, i & self._half_mask
            for key in self._round_keys:
                left, right = right, left ^ (mix64(key ^ right) >> self._shift)
            i = left << self._half_bits | right
            if i < self.n:
                return i
