"""What a process notes about itself."""

import itertools
import json

import jax.numpy as jnp
import pytest

from jaxpipe.processes import watchdog
from jaxpipe.processes.watchdog import ITERATOR, LONGEST_LOOK, OUTSIDE, Activity, Status, Waits

BOTH = (0, 1)


class Clock:
    """Time that goes on when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def activity(clock):
    made = Activity(clock)
    watchdog.note(made)
    yield made
    watchdog.note(None)


def look(activity, clock, seconds=0.0):
    clock.now += seconds
    return activity.look()


def begin(activity, done=False, kind="step", timed=True):
    state = [done]
    activity.began(BOTH, kind, "step", lambda: state[0], timed)
    return state


def test_places(activity, clock):
    assert look(activity, clock, 3) == Status(OUTSIDE, 3, {}, None)
    with watchdog.doing("in train_batch"):
        clock.now += 1
        for _ in watchdog.pulled(iter("ab")):
            assert look(activity, clock).place == "in train_batch"
        taken = watchdog.pulled(_looks(activity, clock))
        assert next(taken) == (ITERATOR, 2)
    assert look(activity, clock, 4) == Status(OUTSIDE, 4, {}, None)


def _looks(activity, clock):
    status = look(activity, clock, 2)
    yield status.place, status.seconds


def test_an_iterator_gives_no_more_than_is_asked_for(activity):
    source = iter(range(5))
    assert list(itertools.islice(watchdog.pulled(source), 2)) == [0, 1] and next(source) == 2
    assert list(watchdog.pulled(source)) == [3, 4]


def test_a_place_as_a_decorator(activity, clock):
    @watchdog.doing("here")
    def place():
        return activity.look().place

    assert [place(), place(), activity.look().place] == ["here", "here", OUTSIDE]


def test_the_first_of_a_kind_has_no_limit(activity, clock):
    first = begin(activity)
    assert look(activity, clock, 1).waits == Waits(BOTH, 1, "step", 0, False)
    first[0] = True
    assert look(activity, clock, 1).waits is None
    begin(activity)
    assert look(activity, clock).waits.timed
    assert look(activity, clock, 1).waits == Waits(BOTH, 2, "step", 1, True)


def test_each_kind_has_a_first(activity, clock):
    begin(activity, done=True)
    look(activity, clock)
    begin(activity, kind="evaluation")
    assert not look(activity, clock).waits.timed


def test_time_begins_anew_with_each_work(activity, clock):
    first, second = begin(activity), begin(activity)
    look(activity, clock)
    assert look(activity, clock, 1).waits.seconds == 1
    first[0] = True
    assert look(activity, clock, 1).waits == Waits(BOTH, 2, "step", 0, True)
    second[0] = True
    assert look(activity, clock).waits is None and look(activity, clock).count(BOTH) == 2


def test_time_in_which_this_process_did_not_run_does_not_count(activity, clock):
    begin(activity)
    look(activity, clock)
    assert look(activity, clock, 1000).waits.seconds == LONGEST_LOOK


def test_works_of_one_process_are_not_noted(activity):
    activity.began((1,), "step", "step", lambda: False)
    assert activity.look().waits is None


def test_each_set_of_processes_has_its_own_count(activity):
    begin(activity)
    activity.began((0, 2), "step", "step", lambda: False)
    status = activity.look()
    assert [status.count(members) for members in (BOTH, (0, 2), (1, 2))] == [1, 1, 0]


def test_waiting_is_over_at_the_end_of_the_with_or_when_an_array_is_there(activity, clock):
    with watchdog.waiting(BOTH, "exchange", "an exchange", timed=False):
        assert look(activity, clock).waits == Waits(BOTH, 1, "an exchange", 0, False)
    assert activity.look().waits is None

    class Result:
        ready = deleted = False

        def is_ready(self):
            return self.ready

        def is_deleted(self):
            return self.deleted

    for end in ("ready", "deleted"):
        result = Result()
        with watchdog.waiting(BOTH, "round", "round 1") as until:
            assert activity.look().waits is not None
            until(result)
        assert activity.look().waits is not None
        setattr(result, end, True)
        assert activity.look().waits is None
    with pytest.raises(KeyError), watchdog.waiting(BOTH, "round", "round 1") as until:
        raise KeyError
    assert activity.look().waits is None


def test_results_on_devices(activity):
    watchdog.began(BOTH, "step", "step 1", jnp.ones(3).block_until_ready())
    assert activity.look().waits is None and activity.look().count(BOTH) == 1


def test_at_the_end_nothing_is_looked_at_any_more(activity):
    activity.began(BOTH, "step", "step", lambda: pytest.fail("an array was touched"))
    activity.forget()
    assert activity.look().waits is None and activity.look().count(BOTH) == 1


def test_nothing_is_noted_where_there_is_one_process():
    source = iter([1])
    assert watchdog.pulled(source) is source
    with watchdog.doing("here"), watchdog.waiting(BOTH, "round", "round 1") as until:
        until(jnp.ones(()))
    watchdog.began(BOTH, "step", "step 1", jnp.ones(()))


@pytest.mark.parametrize("waits", [None, Waits((0, 3), 7, "step 5", 1.5, True)])
def test_a_status_is_sent_as_json(waits):
    status = Status("here", 2.0, {"0,3": 7}, waits)
    assert Status.from_json(json.loads(json.dumps(status.to_json()))) == status
