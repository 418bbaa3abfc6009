import itertools

import pytest

from jaxpipe.errors import DataError
from jaxpipe.trainer.position import Position


class Counting:
    """An iterator that knows where it stands."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return self.at - 1, None

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


PAIRS = [(number, None) for number in range(10)]


@pytest.mark.parametrize(
    "given", [PAIRS, iter(PAIRS), lambda seen: iter(PAIRS[seen:])], ids=["list", "iterator", "function"]
)
def test_it_goes_on_behind_what_was_used(given):
    position = Position(given)
    assert position.remembered is None
    assert [number for number, _ in itertools.islice(position.start(4, loaded=True), 2)] == [4, 5]


def test_an_iterator_that_knows_its_place_is_left_to_the_checkpoint():
    position = Position(Counting())
    position.remembered.set_state(7)
    assert next(position.start(4, loaded=True))[0] == 7


@pytest.mark.parametrize(
    ("given", "first"), [(PAIRS, 0), (lambda seen: iter(PAIRS[seen:]), 4)], ids=["list", "function"]
)
def test_without_a_checkpoint_an_iterator_stands_where_it_shall(given, first):
    """The engine was trained by hand before, with the same iterator or another one; a function is asked all the same."""
    assert next(Position(given).start(4, loaded=False))[0] == first


def test_data_that_are_shorter_than_what_was_used_have_ended():
    assert next(Position(PAIRS).start(11, loaded=True), "end") == "end"


def test_a_function_has_to_return_data():
    with pytest.raises(DataError, match=r"train_data\(2\) returned a int, which yields nothing"):
        Position(lambda seen: seen).start(2, loaded=False)
