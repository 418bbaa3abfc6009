"""The guard, with time and messages from the test: what it decides, whom it tells, and when it keeps quiet."""

import pytest

from jaxpipe.processes.channel import Ended
from jaxpipe.processes.guard import Guard
from jaxpipe.processes.verdicts import Verdict
from jaxpipe.processes.watchdog import Activity, Status, Waits, key

BOTH = (0, 1)


class Channel:
    """Has messages for the guard, and keeps those that it sends."""

    def __init__(self):
        self.incoming, self.sent = [], []

    def poll(self, seconds):
        found, self.incoming = self.incoming, []
        return found

    def send(self, message):
        self.sent.append(message)

    def close(self):
        pass


class World:
    """A guard with everything around it."""

    def __init__(self, number, count=3, heartbeat_timeout=10, step_timeout=20, connect=True):
        self.now, self.channel, self.ends, self.said = 0.0, Channel(), [], []
        self.activity = Activity(lambda: self.now)
        self.guard = Guard(
            number,
            count,
            self.activity,
            (lambda: self.channel) if connect else None,
            heartbeat_timeout,
            step_timeout,
            self.ends.append,
            self.said.append,
            lambda: self.now,
        )
        self.guard.connect()

    def after(self, seconds, *messages):
        """Time goes on in small steps; the messages come with the first one."""
        self.channel.incoming += messages
        for _ in range(max(1, round(seconds))):
            self.now += min(1, seconds)
            self.guard.step()
        return self.ends

    def stuck(self):
        """The second step of this process has begun, and does not finish."""
        self.activity.began(BOTH, "step", "step 1", lambda: True)
        self.activity.look()
        self.activity.began(BOTH, "step", "step 2", lambda: False)


def status(number=0, place="here", waits=None):
    work = None if waits is None else Waits(BOTH, number, f"step {number}", waits, True)
    return {"status": Status(place, 1.0, {key(BOTH): number}, work).to_json()}


def bye(error=None):
    return {"bye": error, **status()}


def test_a_process_that_is_gone_ends_all():
    world = World(0)
    (verdict,) = world.after(0.1, (1, status()), (1, Ended(True)))
    assert verdict.culprits == (1,) and verdict.text.startswith("Process 1 is gone without a word")
    assert {"verdict": [[1], verdict.text]} in world.channel.sent
    assert world.guard.decided.is_set() and world.guard.verdict == verdict


def test_the_others_do_what_process_0_says():
    world = World(2)
    assert world.after(0.1, (0, {"verdict": [[1], "Why."]}), (0, Ended(True))) == [Verdict((1,), "Why.")]


def test_process_0_is_gone():
    (verdict,) = World(1).after(0.1, (0, Ended(True)))
    assert verdict.culprits == (0,) and "Process 0 is gone" in verdict.text


@pytest.mark.parametrize("number", [0, 1])
def test_an_end_that_was_told_ends_nobody(number):
    world, other = World(number), 1 - number
    assert world.after(300, (other, bye()), (other, Ended(True))) == []
    assert not any(f"process {other}" in said for said in world.said)


@pytest.mark.parametrize("number", [0, 1])
def test_a_network_that_fails_ends_nobody(number):
    world, other = World(number), 1 - number
    assert world.after(300, (other, status()), (other, Ended(False))) == []


def test_an_error_is_told_to_all():
    (verdict,) = World(0).after(0.1, (2, bye("DataError: no more")))
    assert verdict == Verdict((2,), "Process 2 ended with DataError: no more")
    world = World(0)
    world.guard.bye("DataError: no more")
    assert world.channel.sent == [{"verdict": [[0], "Process 0 ended with DataError: no more"]}]


def test_what_is_sent_at_the_end():
    for number in (0, 1):
        world = World(number)
        world.stuck()
        world.guard.bye(None)
        (sent,) = world.channel.sent
        assert sent["bye"] is None
        assert Status.from_json(sent["status"]).count(BOTH) == 2, "so that nobody is blamed who has made all steps"
        world.after(300, (1 - number, bye()))
        assert world.ends == [] and world.activity.look().waits is None


def test_a_stuck_process_ends_all():
    world = World(0, count=2)
    world.stuck()
    for _ in range(20):
        assert world.after(1, (1, status(1, "in its data iterator"))) == []
    world.after(3, (1, status(1, "in its data iterator")))
    assert world.ends[0].culprits == (1,) and "been in its data iterator for" in world.ends[0].text
    assert len(world.ends) == 1


def test_what_has_no_limit_is_told_once_and_ends_nobody():
    world = World(0, count=2)
    world.activity.began(BOTH, "exchange", "an exchange", lambda: False, timed=False)
    for _ in range(100):
        world.after(1, (1, status(0, "in save_checkpoint")))
    (said,) = world.said
    assert "An exchange has not finished for" in said and "process 1 has not begun it" in said
    assert "been in save_checkpoint for" in said and {"note": said} in world.channel.sent and world.ends == []


def test_process_0_hears_that_others_wait():
    (verdict,) = World(0, count=2).after(1, (1, status(5, waits=21)))
    assert verdict.culprits == (0,)


def test_once_it_has_decided_it_decides_nothing_else():
    world = World(0)
    world.after(2, (1, Ended(True)), (2, Ended(True)))
    assert len(world.ends) == 1


def test_without_a_decision_of_process_0_a_process_decides_alone():
    world = World(1)
    world.stuck()
    for _ in range(24):
        assert world.after(1, (0, {"alive": True})) == []
    (verdict,) = world.after(3, (0, {"alive": True}))
    assert verdict.culprits == () and "which one is not known" in verdict.text


def test_process_0_may_be_the_one_that_is_silent():
    world = World(1, heartbeat_timeout=1000)
    world.stuck()
    (verdict,) = world.after(28)
    assert verdict.culprits == (0,)


@pytest.mark.parametrize("number", [0, 1])
def test_without_a_connection_a_stuck_step_ends_the_process_all_the_same(number, monkeypatch):
    monkeypatch.setattr("jaxpipe.processes.guard.PERIOD", 0)
    world = World(number, count=2, connect=False)
    world.stuck()
    assert len(world.after(28)) == 1


def test_silence_is_told_once_and_so_is_its_end():
    world = World(0)
    world.after(5, (1, status(place="in train_batch")), (2, bye()))
    assert world.said == []
    world.after(4)
    (said,) = world.said
    assert "process 1 has not been heard of for 6 s" in said and "it was in train_batch" in said
    assert {"note": said} in world.channel.sent
    world.after(1, (1, status()))
    assert world.said[1:] == ["process 1 is heard of again."]
    assert world.ends == [], "JAX ends the processes, which also notices whether only Python is silent"


def test_silence_from_the_start_is_told():
    """It may have stopped before it has said anything."""
    world = World(0)
    world.after(9, (2, status()), (2, bye()))
    (said,) = world.said
    assert "process 1 has not been heard of for 6 s, since it started. It has no connection to process 0, or" in said


def test_the_others_say_it_if_process_0_is_silent_and_what_it_says():
    world = World(1)
    world.after(7)
    assert "process 0 has not been heard of" in world.said[0]
    world.after(1, (0, {"note": "something"}))
    assert world.said[1:] == ["process 0 is heard of again.", "something"]


def test_a_process_that_did_not_run_does_not_call_the_others_silent():
    world = World(0)
    world.after(3, (1, status()))
    world.now += 1000
    world.after(3)
    assert world.said == [] and world.ends == []


def test_messages_go_out_every_second():
    for number, what in ((0, "alive"), (1, "status")):
        world = World(number)
        world.channel.sent.clear()
        world.after(10)
        assert sum(what in message for message in world.channel.sent) == 10


def test_no_connection_is_not_the_end(monkeypatch):
    monkeypatch.setattr("jaxpipe.processes.guard.PAUSE", 0)
    said, calls = [], []

    def connect():
        calls.append(1)
        raise OSError("firewall")

    guard = Guard(1, 2, Activity(), connect, 10, 20, lambda verdict: None, said.append)
    guard.connect()
    assert len(calls) > 1 and guard.connected.is_set() and "no connection to process 0 (firewall)" in said[0]
    guard.bye(None)
