"""Iterators: how many micro-batches are taken, and that each is looked at before the next."""

import itertools

import numpy as np
import pytest

from jaxpipe.data.pull import check_for_evaluation, check_for_training, pull, take
from jaxpipe.errors import DataError
from tests.data.micro_batches import BAD, item

RANKS = 2
TRAINING, EVALUATION = check_for_training, lambda _: check_for_evaluation(needs_labels=True)


def accept(pair):
    pass


def test_as_many_as_are_asked_for():
    source = iter([item(seed=seed) for seed in range(5)])
    assert [len(pull(source, 2, accept)), len(take(source, 2, accept)), len(take(source, 2, accept))] == [2, 2, 1]
    assert take(source, 2, accept) == []
    with pytest.raises(DataError, match="data_iter ended after 1 of 2 micro-batches. Nothing was computed"):
        pull(iter([item()]), 2, accept)


@pytest.mark.parametrize("source", [[item()], (item() for _ in ()).__iter__, 5, None], ids=lambda s: type(s).__name__)
def test_what_is_no_iterator(source):
    with pytest.raises(DataError, match=f"data_iter is a {type(source).__name__}, not an iterator"):
        take(source, 1, accept)


@pytest.mark.parametrize("name", BAD)
def test_the_bad_one_is_the_last_that_is_taken(name):
    bad, message = BAD[name]
    for place, check in itertools.product(range(3), (TRAINING, EVALUATION)):
        source = iter([*[item()] * place, bad, item(), item()])
        with pytest.raises(DataError, match=rf"(?s)^Micro-batch {place} of data_iter.*{message}") as caught:
            take(source, 9, check(RANKS))
        assert f"({place + 1} of 9 micro-batches were taken" in str(caught.value)
        assert len(list(source)) == 2


def test_training_wants_one_shape_and_evaluation_one_but_for_rows():
    with pytest.raises(DataError, match=r"1 of data_iter is float32\[2,3\] at inputs.*, but micro-batch 0 is float32"):
        pull(iter([item(), item(2)]), 2, check_for_training(RANKS))
    with pytest.raises(
        DataError, match="All micro-batches of one training step have one shape: pad them with jaxpipe.pad_micro"
    ):
        pull(iter([item(), item(2)]), 2, check_for_training(RANKS))
    assert len(pull(iter([item(), item(2), item(3)]), 3, EVALUATION(RANKS))) == 3
    with pytest.raises(
        DataError, match="micro-batches may differ in the number of rows, their first dim, and in nothing else"
    ):
        pull(iter([item(), (item()[0], {"t": np.ones((4, 2))})]), 2, EVALUATION(RANKS))


def test_the_first_one_decides_also_after_others_that_are_like_it():
    odd = item()[0], {"t": item()[1]["t"].astype(np.float16)}
    with pytest.raises(DataError, match=r"^Micro-batch 3 of data_iter is float16\[4,3\] at labels"):
        pull(iter([item(), item(seed=1), item(seed=2), odd]), 4, check_for_training(RANKS))


def test_labels_that_are_not_needed_may_be_anything():
    source = [(item()[0], labels) for labels in (None, "text", np.ones(1))]
    assert len(pull(iter(source), 3, check_for_evaluation(needs_labels=False))) == 3


def test_errors_of_an_iterator_are_its_own():
    def fails():
        yield item()
        raise OSError("a broken file")

    with pytest.raises(OSError, match="^a broken file$"):
        pull(fails(), 2, check_for_training(RANKS))
