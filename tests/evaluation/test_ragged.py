"""Micro-batches of unlike size: cut into pieces and joined, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe import metrics
from jaxpipe.errors import DataError
from jaxpipe.evaluation.ragged import cut, flat, join, join_on
from jaxpipe.executor.options import Found, Options
from jaxpipe.model.metrics import Joined
from tests.compare import assert_close


def make_groups(sizes):
    """Groups [M, B] of inputs that say which they are, (micro-batch, row), and labels that follow from them."""
    groups, first = [], 0
    for count, rows in sizes:
        m, row = np.meshgrid(np.arange(first, first + count), np.arange(rows), indexing="ij")
        x = np.stack([m, row], -1).astype(np.float32)
        groups.append(({"x": x, "none": None}, 10 * x[..., 0] + x[..., 1]))
        first += count
    return groups


group_sizes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=4)


@given(group_sizes, st.integers(1, 4))
def test_every_row_counts_once(sizes, data_ranks):
    groups = make_groups(sizes)
    counted = []
    for piece in cut(groups, data_ranks):
        x = piece.inputs["x"]
        count, rows = x.shape[:2]
        assert rows % data_ranks == 0 and piece.inputs["none"] is None
        np.testing.assert_array_equal(piece.labels, 10 * x[..., 0] + x[..., 1])
        real = np.ones(data_ranks, bool) if piece.real is None else piece.real
        counts = np.repeat(real, rows // data_ranks)
        assert counts.sum() == piece.rows and counts[: piece.rows].all(), "those that count come first"
        wanted = [(piece.micro_batch + m, piece.row + r) for m in range(count) for r in range(piece.rows)]
        assert [tuple(map(int, pair)) for pair in x[:, counts].reshape(-1, 2)] == wanted
        counted += wanted
    everything = [(int(m), int(r)) for inputs, _ in groups for m, r in inputs["x"].reshape(-1, 2)]
    assert sorted(counted) == sorted(everything)


def evaluated(piece, data_ranks):
    """What a program would find: the loss of a piece is the sum of its labels over its rows."""
    x, labels = piece.inputs["x"], piece.labels
    real = np.ones(data_ranks, bool) if piece.real is None else piece.real
    counts = np.repeat(real, x.shape[1] // data_ranks)
    total, weight = labels[:, counts].sum(1), np.full(len(x), counts.sum(), np.float32)
    largest = Joined((jnp.asarray(labels[:, counts].max()),), metrics.Max)
    return Found((total, weight), {"max": largest}, {"y": jnp.asarray(2 * x)}, {"row": jnp.asarray(x[..., 1])})


@settings(max_examples=5)
@given(group_sizes, st.integers(1, 3), st.sampled_from(["avg", "sum", None]))
def test_pieces_make_the_whole(sizes, data_ranks, reduce_output):
    groups = make_groups(sizes)
    pieces = cut(groups, data_ranks)
    options = Options(reduce_output=reduce_output)
    found = join(pieces, [evaluated(piece, data_ranks) for piece in pieces], options)
    labels = [row for _, labels in groups for row in labels]
    each = np.asarray([row.mean() for row in labels])
    wanted = {"avg": np.concatenate(labels).mean(), "sum": each.sum(), None: each}[reduce_output]
    assert_close(found.loss, np.asarray(wanted, np.float32), 1e-6)
    assert found.metrics["max"] == max(row.max() for row in labels)
    most = max(map(len, labels))
    assert found.outputs["y"].shape == (len(labels), most, 2)
    for m, row in enumerate(labels):
        np.testing.assert_array_equal(found.outputs["y"][m, : len(row)], [[2 * m, 2 * r] for r in range(len(row))])
        assert (found.outputs["y"][m, len(row) :] == 0).all(), "rows that are not there"
    np.testing.assert_array_equal(found.rows["row"], np.concatenate([np.arange(len(row)) for row in labels]))


def test_raw_sums_stay_apart():
    pieces = cut(make_groups([(2, 3)]), 2)
    loss, metric = (
        getattr(join(pieces, [evaluated(piece, 2) for piece in pieces], Options(raw=True)), name)
        for name in ("loss", "metrics")
    )
    assert_close(loss, (np.asarray([3, 33], np.float32), np.full(2, 3, np.float32)), 0)
    assert metric["max"].terms[0] == 12


def test_leaves_with_unlike_rows_can_only_be_split_evenly():
    inputs, labels = np.ones((2, 4)), np.ones((2, 8))
    (piece,) = cut([(inputs, labels)], 2)
    assert piece.inputs is inputs and piece.labels is labels and piece.real is None
    for data_ranks, groups in ((3, [(inputs, labels)]), (2, [(inputs, labels)] * 2)):
        with pytest.raises(DataError, match="unlike numbers of rows"):
            cut(groups, data_ranks)


def test_inside_jit_rows_must_divide():
    with pytest.raises(DataError, match="Inside jit the rows .* 3 are not"):
        jax.jit(lambda x: cut([(x, x)], 2)[0].inputs)(jnp.ones((2, 3)))
    keys = jax.random.split(jax.random.key(0), (2, 3))
    assert (cut([(keys, None)], 2)[0].inputs == keys[:, :2]).all()
    assert flat(jnp.arange(12).reshape(2, 3, 2)).tolist() == jnp.arange(12).reshape(6, 2).tolist()


@pytest.mark.parametrize("rows", [3, 4])
def test_outputs_where_other_processes_hold_them(rows):
    """Cut over the data ranks where they divide; what the other processes have is in test_processes_weights."""
    last = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
    pieces = cut(make_groups([(2, 2), (1, rows)]), 2)
    found = [evaluated(piece, 2) for piece in pieces]
    wanted, held = join(pieces, found, Options()), join_on(last, True, pieces, found, Options())
    assert_close((held.loss, held.metrics, held.rows), (wanted.loss, wanted.metrics, wanted.rows), 0)
    assert_close(held.outputs, wanted.outputs, 0)
    assert held.outputs["y"].sharding.is_fully_replicated == (rows % 2 == 1)
