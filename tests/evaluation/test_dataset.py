"""Sums over a data set, with an evaluator that computes on the host."""

import contextlib
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe import metrics
from jaxpipe.data.agree import Agreement
from jaxpipe.data.share import Share
from jaxpipe.errors import DataError
from jaxpipe.evaluation.dataset import batches, evaluate, groups, number_of_batches, predict
from jaxpipe.executor.options import Found, Options
from jaxpipe.model.metrics import Joined

AGREEMENT = Agreement(Share(jaxpipe.make_mesh(pipe=2, data=2)))


class Progress(contextlib.nullcontext):
    def __init__(self):
        super().__init__()
        self.losses = []

    def update(self, loss):
        self.losses.append(loss)


class Evaluator:
    """Finds what `results` says, one after the other."""

    def __init__(self, results=(), data=1):
        self.mesh, self.results, self.ran = jaxpipe.make_mesh(data=data), iter(results), []

    def run(self, params, groups, options, states=None):
        self.ran.append((params, len(groups)))
        return next(self.results)


def found(total, weight, **more):
    return Found((np.asarray(total, np.float32), np.asarray(weight, np.float32)), more, None, {})


def test_sums_lose_nothing():
    """2 ** 24 + 1 is no float32, and a count of 3 * 2 ** 30 no int32."""
    big, count = 2.0**24, 2**30
    results = [
        found([big], [1], n=Joined((np.int32(count),), metrics.Sum), top=Joined((np.float32(k),), metrics.Max))
        for k in range(3)
    ] + [found([1, 0], [1, 0], n=Joined((np.int32(0),), metrics.Sum), top=Joined((np.float32(-1),), metrics.Max))]
    progress = Progress()
    result = evaluate(Evaluator(results), None, iter([[()]] * 4), Options(raw=True), progress)
    assert result == {"loss": (3 * big + 1) / 4, "n": 3 * count, "top": 2.0}
    assert type(result["loss"]) is float and type(result["n"]) is int
    assert progress.losses == [big, big, big, result["loss"]]


def test_values_per_row_come_in_order():
    results = [Found(None, {}, "dropped", {"r": jnp.arange(n) + 10 * n}) for n in (2, 3)]
    result = evaluate(Evaluator(results), None, iter([[()]] * 2), Options(loss=False, metrics=True), Progress())
    assert result.keys() == {"r"} and result["r"].tolist() == [20, 21, 30, 31, 32]


def test_nothing_to_evaluate_and_nothing_that_counts():
    with pytest.raises(DataError, match="there is nothing to evaluate"):
        evaluate(Evaluator(), None, iter([]), Options(raw=True), Progress())
    with pytest.raises(DataError, match="add up to 0"):
        evaluate(Evaluator([found([2], [0])]), None, iter([[()]]), Options(raw=True), Progress())


def test_batches_of_micro_batches():
    """The last one may be short; neighbours of one shape are one group; labels are dropped where none are wanted."""
    items = [(np.full((rows, 2), m, np.float32), np.ones(rows)) for m, rows in enumerate((4, 4, 3, 4, 4))]
    made = list(batches(items, 3, None, AGREEMENT, labels=False))
    assert [[group[0].shape for group in each] for each in made] == [[(2, 4, 2), (1, 3, 2)], [(2, 4, 2)]]
    assert [float(group[0][m, 0, 0]) for each in made for group in each for m in range(len(group[0]))] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert all(labels is None for each in made for _, labels in each)
    assert len(list(batches(items, 2, 2, AGREEMENT, labels=True))) == 2
    assert list(batches([], 2, None, AGREEMENT, labels=True)) == []
    with pytest.raises(DataError, match="ended after 5 of 6"):
        groups(iter(items), 6, AGREEMENT, labels=True)
    with pytest.raises(DataError, match="yields nothing"):
        batches(3, 2, None, AGREEMENT, labels=True)
    for wrong in (0, 1.5, True):
        with pytest.raises(DataError, match="num_batches="):
            batches(items, 2, wrong, AGREEMENT, labels=True)


def test_how_many_batches_there_will_be():
    assert [number_of_batches([0] * n, 3, None) for n in (0, 1, 3, 4)] == [0, 1, 1, 2]
    assert number_of_batches([0] * 9, 3, 2) == 2 and number_of_batches([0] * 3, 3, 2) == 1
    assert number_of_batches(iter([]), 3, 7) == 7 and number_of_batches(iter([]), 3, None) is None


def test_predictions_come_in_order_and_before_an_error_of_the_data():
    def source():
        yield ["a", "b"]
        yield ["c"]
        raise OSError("disk")

    evaluator = Evaluator([SimpleNamespace(outputs=n) for n in range(3)])
    versions = iter("xyz")
    made = predict(evaluator, lambda: (next(versions), {}), source(), Options())
    assert next(made) == 0 and [params for params, _ in evaluator.ran] == ["x", "y"], "one is computed ahead"
    assert next(made) == 1 and next(made) == 2
    with pytest.raises(OSError, match="disk"):
        next(made)
    assert [count for _, count in evaluator.ran] == [1, 1, 1]
