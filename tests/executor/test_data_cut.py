"""Gathered over the data ranks, and back as sums: many small arrays in one collective, large ones on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor import data_cut
from jaxpipe.layout.placement import Placement
from tests.compare import assert_close

DATA = 4
MESH = jaxpipe.make_mesh(pipe=2, data=DATA)
rng = np.random.default_rng(0)
ARRAYS = [
    rng.normal(size=(8, 3)).astype(np.float32),
    rng.normal(size=(2, 3, 4)).astype(np.float32),
    rng.normal(size=(8, 2)).astype(jnp.bfloat16),
    np.arange(12, dtype=np.int32),
    np.arange(8) % 3 == 0,
    rng.normal(size=(5,)).astype(np.float32),
    np.float32(3),
]
CUTS = [0, 2, 0, 0, 0, None, None]
PLACEMENTS = [Placement() if dim is None else Placement((("data", dim),)) for dim in CUTS]
SPECS = [placement.spec for placement in PLACEMENTS]


@pytest.mark.parametrize("small", [1 << 16, 30, 0], ids=["together", "some", "alone"])
def test_there_and_back(small, monkeypatch):
    monkeypatch.setattr(data_cut, "SMALL", small)
    # Each data rank has gradients of its own; integers and booleans have none.
    grads = [
        np.stack([(i + 1) * a for i in range(DATA)]).astype(a.dtype)
        if jnp.issubdtype(a.dtype, jnp.inexact)
        else np.zeros((DATA, *np.shape(a)), a.dtype)
        for a in ARRAYS
    ]

    def both(pieces, grads):
        whole = data_cut.gathered(pieces, PLACEMENTS, MESH)
        return [a[None] for a in whole], data_cut.scattered([a[0] for a in grads], PLACEMENTS, MESH)

    run = jax.jit(
        jax.shard_map(both, mesh=MESH, in_specs=(SPECS, P("data")), out_specs=(P("data"), SPECS), check_vma=False)
    )
    whole, back = run(ARRAYS, grads)
    assert_close(whole, [np.stack([a] * DATA) for a in ARRAYS], 0)
    wanted = [g.astype(np.float32).sum(0).astype(g.dtype) for g in grads]
    assert_close(jax.tree.map(np.asarray, back), wanted, 1e-6)
    text = run.lower(ARRAYS, grads).as_text()
    found = text.count("stablehlo.all_gather"), text.count("stablehlo.reduce_scatter")
    # One for each dtype; of floats [8, 3] and [2, 3, 4], [8, 2], integers, booleans.
    assert found == ((5, 3) if not small else (4, 2)), found
