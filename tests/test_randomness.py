"""Counter-based randomness: pure, pinned, and independent where the seed or the use differs."""

import doctest
import math

import numpy as np

from flowstream import randomness
from flowstream.randomness import permutation, uniform


def test_docstring_examples_run():
    assert doctest.testmod(randomness).failed == 0


def test_uniform_and_permutation_are_pure_and_differ_by_every_part_of_the_seed():
    seeds = [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (0, 0, 0),
        (2**64, 0, 0, 0),
        (-1, 0, 0, 0),
    ]
    assert len({uniform(seed) for seed in seeds}) == len(seeds)
    assert len({permutation(50, seed).tobytes() for seed in seeds}) == len(seeds)
    state = np.random.get_state()[1].copy()
    for seed in seeds:
        assert uniform(seed) == uniform(tuple(np.int64(s) if abs(s) < 2**63 else s for s in seed))
        assert permutation(50, seed).tolist() == permutation(50, seed).tolist()
        assert sorted(permutation(50, seed).tolist()) == list(range(50))
    assert (state == np.random.get_state()[1]).all()


def test_draws_are_the_same_on_every_platform_and_version():
    assert uniform((0, 1, 2, 3)) == 0.6887548916702605
    assert permutation(8, (0, 1, 2, 3)).tolist() == [2, 7, 1, 3, 5, 0, 4, 6]
    assert permutation(8, (0, 1, 2, 3), use="permuted").tolist() == [1, 3, 4, 2, 7, 0, 6, 5]
    assert permutation(0, (0,)).tolist() == []
    assert permutation(8, (0,)).dtype == np.int64


def test_uniform_is_uniform_over_windows_and_independent_of_the_permutation():
    num = 20_000
    draws = np.array([uniform((7, 0, w, 0)) for w in range(num)])
    assert (draws >= 0).all()
    assert (draws < 1).all()
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - num / 20) ** 2 / (num / 20)).sum() < 45.0  # chi-square with 19 degrees: p = .0007
    first = np.array([permutation(10, (7, 0, w, 0))[0] for w in range(4000)])
    correlations = np.corrcoef([draws[:-1], draws[1:]])[0, 1], np.corrcoef([draws[:4000], first])[0, 1]
    assert abs(correlations[0]) < 4 / math.sqrt(num)
    assert abs(correlations[1]) < 4 / math.sqrt(4000)


def test_draws_for_different_uses_are_independent():
    num = 4000
    one, other = (np.array([uniform((7, 0, w, 0), use=use) for w in range(num)]) for use in ("one", "other"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(num)
    same = sum(
        permutation(4, (7, 0, w, 0)).tolist() == permutation(4, (7, 0, w, 0), use="b").tolist() for w in range(num)
    )
    assert abs(same - num / 24) < 4 * math.sqrt(num / 24)
