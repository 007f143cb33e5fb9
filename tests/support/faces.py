"""Shared by tests of the environment's faces: actions, and equality of whatever a face returns."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import tiny

# Batches of other sizes add the same float32 numbers in another order: 1e-6 of a value, at values of about 5.
TOLERANCE = 2e-5
STOPS = list(range(75))  # a quarter of all ids, so that random responses end at many lengths


def assert_same(got, wanted, where):
    """Equal structure, types and values, floats to the tolerance."""
    assert type(got) is type(wanted), f"{where}: {type(got)} and {type(wanted)}"
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), f"{where}: {sorted(got)} and {sorted(wanted)}"
        for key in wanted:
            assert_same(got[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, tuple):
        for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(wanted, np.ndarray):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, f"{where}: {got!r} and {wanted!r}"
        if wanted.dtype == object:
            for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
                assert_same(one, other, f"{where}[{index}]")
        else:
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=TOLERANCE, err_msg=where)  # float32 rounding
    else:
        assert got == (pytest.approx(wanted, rel=1e-6, abs=TOLERANCE) if isinstance(wanted, float) else wanted), where


def random_tokens(steps, rows, seed=0):
    """Actions, [steps, rows]."""
    return np.random.default_rng(seed).integers(tiny.VOCABULARY, size=(steps, rows))
