"""The queue of results: oldest first, and nothing waits that was not asked to."""

import jax.numpy as jnp

from jaxpipe.monitor.late import Late, is_ready


class Result:
    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


def test_what_is_ready():
    assert is_ready(3.0) and is_ready(None) and is_ready(jnp.ones(2).block_until_ready())
    assert is_ready(Result(True)) and not is_ready(Result(False))


def test_the_first_that_is_not_ready_ends_the_search():
    late, results = Late(), [Result(True), Result(False), Result(True)]
    for result in results:
        late.add(result)
    assert list(late.finished()) == results[:1] and len(late) == 2
    assert list(late.finished()) == []
    results[1].ready = True
    assert list(late.finished()) == results[1:] and len(late) == 0


def test_the_oldest_beyond_a_number_are_taken_ready_or_not():
    late = Late(lambda result: False)
    for number in range(5):
        late.add(number)
    assert list(late.finished()) == [] and list(late.beyond(2)) == [0, 1, 2] and len(late) == 2
    assert list(late.beyond(2)) == []
    late.clear()
    assert len(late) == 0 and list(late.beyond(0)) == []


def test_ready_is_asked_of_a_part_of_the_result():
    late = Late(lambda pair: is_ready(pair[1]))
    late.add((1, Result(True)))
    late.add((2, Result(False)))
    assert [number for number, _ in late.finished()] == [1]
