"""The rules over what processes have said: who is to blame, and who is not."""

from jaxpipe.processes import verdicts
from jaxpipe.processes.verdicts import Seen
from jaxpipe.processes.watchdog import ITERATOR, OUTSIDE, Status, Waits, key

ALL = (0, 1, 2)


def seen(number=0, place="in train_batch", seconds=1.0, waits=None, timed=True, silent=0.0, ended=False, members=ALL):
    """A process that has begun `number` works, and waits for the last one since `waits` seconds."""
    work = None if waits is None else Waits(members, number, f"step {number}", waits, timed)
    return Seen(Status(place, seconds, {key(members): number}, work), silent, ended)


def test_a_process_that_is_stuck_is_named_with_its_place():
    waits = seen(7, waits=6)
    found = verdicts.judge({0: waits, 1: seen(6, ITERATOR, 6.4), 2: waits}, 5)
    assert found.culprits == (1,)
    assert found.text == (
        "Step 7 has not finished for 6 s (step_timeout=5): process 1 has not begun it, and has been in its data iterator "
        "for 6 s."
    )


def test_several_that_are_stuck():
    found = verdicts.judge({0: seen(7, waits=6), 1: seen(6, OUTSIDE, 9), 2: Seen(None)}, 5)
    assert found.culprits == (1, 2)
    assert "process 1 has not begun it, and has been outside of train_batch for 9 s" in found.text
    assert "process 2 has not begun it, and has not been heard of at all" in found.text


def test_of_many_some_are_named():
    members = tuple(range(20))
    found = verdicts.judge({0: seen(7, waits=6, members=members)} | dict.fromkeys(range(1, 20), Seen(None)), 5)
    assert len(found.culprits) == 19 and "and 11 more" in found.text and "process 9 " not in found.text


def test_a_process_that_was_not_heard_of_lately():
    found = verdicts.judge({0: seen(7, waits=6), 1: seen(6, ITERATOR, 1, silent=8), 2: seen(7)}, 5)
    assert (
        "process 1 has not begun it, and has not been heard of for 8 s; it was in its data iterator then" in found.text
    )


def test_a_process_that_is_silent_though_it_has_begun():
    found = verdicts.judge({0: seen(7, waits=6), 1: seen(7, silent=8), 2: seen(7, silent=2)}, 5)
    assert found.culprits == (1,)
    assert found.text.endswith(": process 1 has not been heard of for 8 s; it was in train_batch then.")


def test_devices_that_do_not_finish():
    found = verdicts.judge(dict.fromkeys(ALL, seen(7, waits=6)), 5)
    assert found.culprits == () and "all of its processes have begun it: the devices" in found.text


def test_patience():
    slow = seen(6, ITERATOR, 1000)
    assert verdicts.judge(dict.fromkeys(ALL, slow), 5) is None, "slow data everywhere, and nothing begun"
    assert verdicts.judge({0: seen(7, waits=4.9), 1: slow, 2: slow}, 5) is None
    assert verdicts.judge({0: seen(7, waits=900, timed=False), 1: slow, 2: slow}, 5) is None, "it may be compiled"
    assert verdicts.judge({0: seen(7, waits=900, members=(0, 1)), 1: seen(6, members=(0, 1)), 2: slow}, 1000) is None
    assert verdicts.judge({0: Seen(None), 1: Seen(None)}, 5) is None


def test_only_those_who_take_part_are_blamed():
    found = verdicts.judge({0: seen(7, waits=6, members=(0, 1)), 1: seen(6, members=(0, 1)), 2: seen(3, ended=True)}, 5)
    assert found.culprits == (1,)


def test_a_process_that_has_ended_too_early():
    for timed in (True, False):
        found = verdicts.judge({0: seen(7, waits=3, timed=timed), 1: seen(6, ended=True), 2: seen(6)}, 1000)
        assert found.culprits == (1,)
        assert found.text.startswith("Process 1 has ended, and process 0 waits for it in step 7.")


def test_a_process_that_has_ended_as_it_should():
    assert verdicts.judge({0: seen(7, waits=100), 1: seen(7, ended=True), 2: seen(7)}, 1000) is None
    assert verdicts.judge({0: seen(7, waits=1), 1: seen(6, ended=True), 2: seen(7)}, 1000) is None, "not yet"
    assert verdicts.judge({0: seen(7), 1: seen(6, ended=True), 2: seen(7)}, 1000) is None, "nobody waits for it"


def test_silence():
    found = {0: seen(silent=0.5), 1: seen(silent=6), 2: seen(silent=60, ended=True)}
    assert verdicts.silent(found, 5) == [1]
