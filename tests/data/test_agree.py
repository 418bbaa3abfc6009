"""Two processes that are threads here: what they have is compared, and odd rows are joined."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jaxpipe.data.agree import Agreement
from jaxpipe.data.pull import pull
from jaxpipe.errors import DataError
from tests.data.micro_batches import item

LIMIT = 600


class Line:
    """What two threads hand to each other."""

    def __init__(self):
        self.barrier, self.said = threading.Barrier(2, timeout=LIMIT), [None, None]

    def swap(self, place, value):
        self.barrier.wait()
        self.said[place] = value
        self.barrier.wait()
        return list(self.said)


class Group:
    several, members = True, (0, 1)

    def __init__(self, line, place):
        self.line, self.place = line, place

    def gather(self, value):
        return self.line.swap(self.place, value)

    def from_one(self, array, shape, dtype, member):
        found = self.line.swap(self.place, array)[member]
        assert (found.shape, found.dtype) == (shape, dtype)
        return found


class Share:
    """Of two processes with one data rank each, or which both bring everything."""

    mesh, rule = None, "The rule."

    def __init__(self, group, local):
        self.group, self.local = group, local
        self.alike = [0, 1] if local else [0, 0]

    def of(self, process):
        return (process,) if self.local else (0, 1)


def meet(monkeypatch, local, *rounds):
    """What both processes take in each round; each round is a pair of functions that take."""
    line, made = Line(), []
    shares = [Share(Group(line, place), local) for place in range(2)]
    agreements = [Agreement(share) for share in shares]
    where = threading.local()
    monkeypatch.setattr(jax, "process_index", lambda: where.place)
    monkeypatch.setattr("jaxpipe.data.agree.Share", lambda mesh: "whole")

    def take(place, attempt):
        where.place = place
        try:
            return agreements[place].take(attempt)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        for attempts in rounds:
            made.append(list(pool.map(take, range(2), attempts)))
    return made, shares


def rows(start, stop, seed=0):
    return jax.tree.map(lambda a: a[start:stop], item(8, seed=seed))


def test_whole_micro_batches_are_taken_as_they_are(monkeypatch):
    same = lambda: [item(3), item(4)]  # noqa: E731
    (found,), shares = meet(monkeypatch, False, (same, same))
    assert [share for _, share in found] == shares
    assert [len(items) for items, _ in found] == [2, 2]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (lambda: pull(iter([item(4)]), 2, lambda pair: None), "ended after 1 of 2"),
        (lambda: [item(4)], r"process 1 has micro-batches of [4] rows, and not of [4, 4], than process 0. The rule."),
        (lambda: [item(4), item(3)], "process 1 has micro-batches of [4, 3] rows"),
        (lambda: [item(4), item(4, seed=9)], "process 1 has other inputs and labels than process 0"),
        (lambda: [(item(4)[0], None)] * 2, "process 1 has micro-batches of other shapes or dtypes than process 0"),
        (lambda: 1 // 0, "data_iter raised ZeroDivisionError"),
        (list, "process 1 has no data at all, while others have some"),
    ],
)
def test_what_does_not_go_together_is_told_to_both(monkeypatch, second, words):
    (found,), _ = meet(monkeypatch, False, (lambda: [item(4), item(4)], second))
    assert all(words in text for text in found), found


def test_own_rows_that_fit_stay_where_they_are(monkeypatch):
    (found,), shares = meet(monkeypatch, True, (lambda: [rows(0, 4)] * 2, lambda: [rows(4, 8)] * 2))
    assert [share for _, share in found] == shares


def test_own_rows_that_do_not_fit_are_joined_in_order(monkeypatch):
    rounds = [
        (lambda: [rows(0, 4), rows(0, 4, 1)], lambda: [rows(4, 7), rows(4, 8, 1)]),
        (lambda: [rows(0, 4), rows(0, 4, 1)], lambda: [rows(4, 8)]),
        (lambda: [rows(0, 1)], list),
        (list, list),
    ]
    found, shares = meet(monkeypatch, True, *rounds)
    expected = [[rows(0, 7), rows(0, 8, 1)], [rows(0, 8), rows(0, 4, 1)], [rows(0, 1)]]
    for both, whole in zip(found, expected, strict=False):
        for items, share in both:
            assert share == "whole" and len(items) == len(whole)
            jax.tree.map(np.testing.assert_array_equal, items, whole)
    assert found[-1] == [([], share) for share in shares]
