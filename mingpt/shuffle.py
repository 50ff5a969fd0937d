"""
A dataset in random order, of which any place can be looked up without the places before it.

A training run reads its dataset pass after pass, each pass in a new random order. When it resumes,
it must find the place where it stopped. So the order of a pass is a function of a seed, and
`shuffled` yields it from any place on:

- up to SMALL examples, it is torch.randperm's, of which the beginning is thrown away;
- beyond, making all of it could cost gigabytes before the first batch. There a cipher encrypts the
  place, i, to the example that stands there. A cipher with a fixed key maps different numbers to
  different ones, which is all that a permutation has to do.

Sources: Luby & Rackoff 1988 ("How to construct pseudorandom permutations from pseudorandom
functions") for the cipher, a Feistel network of four rounds; Black & Rogaway 2002 ("Ciphers with
arbitrary finite domains", section 4.3) for walking along a cycle until the result is small enough;
Steele, Lea & Flood 2014 ("Fast splittable pseudorandom number generators") for the mixing function.
"""

from collections.abc import Iterator

import numpy as np
import torch

# Up to so many examples, the whole order is made at once: it takes up to 32 MB, and 0.1 s.
SMALL = 2**22

PIECE = 2**16  # so many places are looked up together
ROUNDS = 4


def shuffled(n: int, seed: int, skip: int = 0) -> Iterator[int]:
    """The numbers below n, each once, in an order that depends on n and seed alone.

    The first `skip` of them are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    if n <= SMALL:
        order = torch.randperm(n, generator=generator)
        # Piece by piece: a Python int takes four times the memory of one in a tensor.
        for piece in order[skip:].split(PIECE):
            yield from piece.tolist()
        return
    keys = torch.randint(2**62, (ROUNDS,), generator=generator).numpy().astype(np.uint64)
    for start in range(skip, n, PIECE):
        places = np.arange(start, min(start + PIECE, n), dtype=np.uint64)
        yield from permute(places, n, keys).tolist()


def permute(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """For places below n, the numbers that stand there in the order of these keys: uint64."""
    # The cipher is a permutation of all numbers with 2 * half_bits bits, fewer than 4 n of them.
    half_bits = (max(n - 1, 1).bit_length() + 1) // 2
    numbers = encrypt(places, half_bits, keys)
    # A number that is too large is encrypted once more, until one below n comes out. Encrypting
    # again and again runs along a cycle, which returns to where it started, a place below n. So
    # this ends, and no two places end at the same number.
    too_large = np.flatnonzero(numbers >= n)
    while len(too_large):
        numbers[too_large] = encrypt(numbers[too_large], half_bits, keys)
        too_large = too_large[numbers[too_large] >= n]
    return numbers


def encrypt(numbers: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A Feistel network: a permutation of the numbers with 2 * half_bits bits."""
    shift = np.uint64(half_bits)
    low_bits = np.uint64(2**half_bits - 1)
    left, right = numbers >> shift, numbers & low_bits
    # Each round can be undone, whatever `mix` does, and so can all of them: nothing gets lost.
    for key in keys:
        left, right = right, left ^ (mix(right + key) & low_bits)
    return (left << shift) | right


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble the bits of uint64 numbers (SplitMix64's last steps). Products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
