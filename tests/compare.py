"""Leaf-by-leaf comparison with the path in the message."""

import jax
import numpy as np


def assert_close(found, wanted, tolerance, what=""):
    """Every leaf equal to `tolerance`, relative to the largest entry of the wanted leaf; structures equal."""
    found, structure = jax.tree_util.tree_flatten_with_path(found)
    wanted, wanted_structure = jax.tree_util.tree_flatten_with_path(wanted)
    assert structure == wanted_structure, f"{what}: {structure} is not {wanted_structure}"
    for (path, a), (_, b) in zip(found, wanted, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        name = what + jax.tree_util.keystr(path)
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.dtype}{a.shape} is not {b.dtype}{b.shape}"
        assert np.isfinite(a).all(), f"{name}: not finite"
        if not np.issubdtype(b.dtype, np.inexact):
            assert (a == b).all(), f"{name}: {a} is not {b}"
            continue
        scale = np.abs(b).max() if b.size else 0
        error = np.abs(a - b).max() / scale if scale else np.abs(a).max(initial=0)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
