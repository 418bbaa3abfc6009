"""What an evaluation adds up, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe import metrics
from jaxpipe.errors import LossError
from jaxpipe.executor.options import Options
from jaxpipe.executor.tally import Tally, loss_of
from tests.compare import assert_close

M, ROWS = 4, 3
Y = np.random.default_rng(0).uniform(0.5, 2, (M, ROWS)).astype(np.float32)
T = np.arange(M * ROWS).reshape(M, ROWS).astype(np.int32)
MESH = jaxpipe.make_mesh()


def mean(y, t):
    return (y**2).mean()


def weighted(y, t):
    on = (t % 2).astype(jnp.float32)
    return jaxpipe.Weighted((y * on).sum(), on.sum())


def named(y, t):
    return {
        "mean": y.mean(),
        "pair": ((y * t.astype(y.dtype)).sum(), t.sum()),
        "sum": metrics.Sum(t.sum()),
        "max": metrics.Max(y.max()),
        "min": metrics.Min(t.min()),
        "all": metrics.Concat(y * 2),
    }


def run(tally, reals):
    """All micro-batches in another order than theirs; `reals[m]`: do the rows of m count (None: nothing is said)."""

    @jax.jit
    def whole():
        sums = tally.start()
        for m in (2, 0, 3, 1):
            real = None if reals is None else jnp.bool_(reals[m])
            sums = tally.add(sums, jnp.int32(m), jnp.asarray(Y[m]), jnp.asarray(T[m]), real)
        loss, joined = tally.reduced(sums, {}, jnp.int32(0), "pipe", "data")
        return tally.results(loss, joined), tally.kept_rows(sums)

    return whole()


def tally_of(loss_fn, **options):
    outputs, labels = jax.ShapeDtypeStruct((ROWS,), jnp.float32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    return Tally(loss_fn, Options(**options), outputs, labels, rows=ROWS, num_micro_batches=M, mesh=MESH)


@pytest.mark.parametrize("reals", [None, [True, False, True, True]], ids=["all", "some"])
def test_metrics_by_their_rules(reals):
    tally = tally_of(weighted, metrics=True, metrics_fn=named)
    assert tally.keeps_rows
    (loss, found), rows = run(tally, reals)
    keep = np.ones(M, bool) if reals is None else np.asarray(reals)
    y, t = Y[keep], T[keep]
    on = t % 2
    wanted = {
        "mean": y.mean(),
        "pair": np.float32((y * t).sum() / t.sum()),
        "max": y.max(),
    }
    assert_close(loss, np.float32((y * on).sum() / on.sum()), 1e-6)
    assert_close({name: found[name] for name in wanted}, wanted, 1e-6)
    assert (found["sum"], found["min"]) == (t.sum(), t.min())
    assert rows.keys() == {"all"} and rows["all"].shape == (M, ROWS)
    assert_close(rows["all"][np.flatnonzero(keep)], 2 * y, 0)


@pytest.mark.parametrize("reduce_output", ["avg", "sum", None])
@pytest.mark.parametrize("loss_fn", [mean, weighted])
def test_losses(loss_fn, reduce_output):
    (loss, found), rows = run(tally_of(loss_fn, reduce_output=reduce_output), None)
    on = T % 2
    total, weight = ((Y**2).mean(1), np.ones(M)) if loss_fn is mean else ((Y * on).sum(1), on.sum(1))
    each = total / weight
    wanted = {"avg": total.sum() / weight.sum(), "sum": each.sum(), None: each}[reduce_output]
    assert_close(loss, np.float32(wanted), 1e-6)
    assert not found and not rows


def test_raw_terms_of_a_mean_weigh_as_its_rows():
    (terms, _), _ = run(tally_of(mean, raw=True), [True, True, False, True])
    total, weight = (Y**2).mean(1) * ROWS, np.full(M, ROWS, np.float32)
    total[2] = weight[2] = 0
    assert_close(terms, (total, weight), 1e-6)
    (terms, _), _ = run(tally_of(weighted, raw=True), None)
    assert_close(terms[1], (T % 2).sum(1).astype(np.float32), 0)


def test_extremes_of_nothing_change_nothing():
    start = tally_of(mean, metrics=True, metrics_fn=named).start()
    assert start.metrics["max"].terms[0] == -np.inf and start.metrics["min"].terms[0] == np.iinfo(np.int32).max
    assert tally_of(None, loss=False).start().loss is None


def test_where_nothing_counts_the_loss_is_zero():
    terms = jnp.asarray([3.0, 2.0]), jnp.asarray([0.0, 4.0])
    assert (
        loss_of(terms, None).tolist() == [0.0, 0.5] and loss_of(terms, "sum") == 0.5 and loss_of(terms, "avg") == 1.25
    )


def test_one_name_for_two_metrics_is_refused():
    with pytest.raises(LossError, match=r"The metrics \['mean'\] come from both"):
        tally_of(lambda y, t: (mean(y, t), {"mean": y.mean()}), metrics=True, metrics_fn=named)
