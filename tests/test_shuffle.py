"""The order of examples: each once, any place at once, the same for the same seed."""

import itertools
import tracemalloc
import unittest

import numpy as np
import torch

from mingpt import shuffle
from mingpt.shuffle import encrypt, permute, shuffled

LARGE = 30_000_000
KEYS = np.array([3, 2**62 - 1, 0, 10**18], dtype=np.uint64)


def mix_slowly(x):
    """SplitMix64's finaliser on Python ints, which do not wrap around by themselves."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def encrypt_slowly(number, half_bits, keys):
    """A Feistel network on one Python int."""
    left, right = divmod(number, 2**half_bits)
    for key in keys:
        left, right = right, left ^ mix_slowly((right + int(key)) % 2**64) % 2**half_bits
    return left * 2**half_bits + right


class TestShuffled(unittest.TestCase):
    def test_a_small_dataset_has_the_order_of_torch(self):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(7)).tolist()
        self.assertEqual(list(shuffled(1000, seed=7)), order)
        self.assertEqual(list(shuffled(1000, seed=7, skip=990)), order[990:])

    def test_a_large_dataset_has_each_example_once(self):
        n = shuffle.SMALL + 1
        order = np.fromiter(shuffled(n, seed=0), dtype=np.int64, count=n)
        self.assertTrue(np.array_equal(np.sort(order), np.arange(n)))

    def test_any_place_of_a_large_dataset_is_there_at_once(self):
        first = list(itertools.islice(shuffled(LARGE, seed=5), 200_010))
        later = list(itertools.islice(shuffled(LARGE, seed=5, skip=200_000), 10))
        self.assertEqual(later, first[200_000:])
        self.assertEqual(len(list(shuffled(LARGE, seed=5, skip=LARGE - 3))), 3)

    def test_the_seed_decides(self):
        orders = [list(itertools.islice(shuffled(LARGE, seed), 1000)) for seed in (1, 1, 2)]
        self.assertEqual(orders[0], orders[1])
        # Two random samples of 1000 of 30 million have 0.03 in common.
        self.assertLess(len(set(orders[0]) & set(orders[2])), 3)

    def test_the_first_batch_costs_no_whole_order(self):
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        next(shuffled(LARGE, seed=0))
        self.assertLess(tracemalloc.get_traced_memory()[1], 20 * 2**20)  # all would be 240 MB

    def test_the_order_looks_random(self):
        # A uniform sample's mean and its correlation with the next one are normal, with these
        # standard deviations. Five of them is once in two million.
        sample = np.fromiter(itertools.islice(shuffled(LARGE, 3), 100_000), np.float64) / LARGE
        self.assertLess(abs(sample.mean() - 0.5), 5 * (1 / 12 / len(sample)) ** 0.5)
        correlation = np.corrcoef(sample[:-1], sample[1:])[0, 1]
        self.assertLess(abs(correlation), 5 / len(sample) ** 0.5)
        # And each of 100 equal parts of the dataset gets about 1000 (chi-square, 99 degrees).
        counts = np.histogram(sample, bins=100, range=(0, 1))[0]
        self.assertLess(((counts - 1000) ** 2 / 1000).sum(), 99 + 5 * (2 * 99) ** 0.5)


class TestCipher(unittest.TestCase):
    def test_it_is_the_cipher_computed_number_by_number(self):
        for half_bits in (1, 2, 5, 13, 31):
            numbers = np.random.RandomState(0).randint(2 ** (2 * half_bits), size=50)
            expected = [encrypt_slowly(int(x), half_bits, KEYS) for x in numbers]
            result = encrypt(numbers.astype(np.uint64), half_bits, KEYS)
            self.assertEqual(result.tolist(), expected)

    def test_every_size_is_permuted(self):
        for n in [*range(1, 70), 255, 256, 257, 1000, 4097]:
            numbers = permute(np.arange(n, dtype=np.uint64), n, KEYS)
            self.assertEqual(sorted(numbers.tolist()), list(range(n)), n)
