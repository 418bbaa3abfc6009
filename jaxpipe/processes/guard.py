"""`Guard`: where this process would wait for another one in vain, it ends it, with a message that says which one it was.

It is a thread. In process 0 it hears of all processes and decides. In the others it tells what the main thread does, and
does what process 0 decides. It never touches a device, but asks whether arrays are there. If there is no connection between
the processes, JAX notices those that are dead, and this thread those that are stuck, without knowing which.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from jaxpipe.processes import verdicts
from jaxpipe.processes.channel import Client, Ended, Server
from jaxpipe.processes.verdicts import Seen, Verdict
from jaxpipe.processes.watchdog import Activity, Status

# Seconds.
PERIOD = 1.0
LATE = 5.0  # after so long a process decides alone
ATTEMPTS, PAUSE = 3, 2.0  # at connecting


class Peer:
    """What this process knows of another one."""

    def __init__(self, now: float):
        self.status: Status | None = None
        self.heard, self.ended, self.missed = now, False, False


class Guard:
    """See the module.

    Args:
      number, count: of this process, and how many there are.
      activity: what this process does.
      connect: makes the connection, or raises OSError; called by the thread. None: there is none to be had.
      heartbeat_timeout: seconds after which JAX ends all processes if one is not heard of. Half-way there is a message.
      step_timeout: seconds that a work of all processes may take.
      end: called with the verdict; it does not return.
      say: prints a line.
      clock: in seconds.
    """

    def __init__(
        self,
        number: int,
        count: int,
        activity: Activity,
        connect: Callable[[], Server | Client] | None,
        heartbeat_timeout: float,
        step_timeout: float,
        end: Callable[[Verdict], None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.number, self.count, self.activity = number, count, activity
        self.heartbeat_timeout, self.step_timeout = heartbeat_timeout, step_timeout
        self.verdict: Verdict | None = None
        self.decided, self.connected = threading.Event(), threading.Event()
        self._connect, self._end, self._say, self._clock = connect, end, say, clock
        self._channel: Server | Client | None = None
        others = [0] if number else range(1, count)
        self.peers = {other: Peer(clock()) for other in others}
        self.ended = False  # whether this process has said that it ends
        self._status, self._next = Status(), clock()
        self._patient = False  # whether it was said what takes long

    # ---------------------------------------------------------------------------------- called by the main thread

    def bye(self, error: str | None) -> None:
        """Says that this process ends, and with what error."""
        self.ended = True
        self.activity.forget()
        if error is not None and self.number == 0:
            self._send({"verdict": [[0], f"Process 0 ended with {error}"]})
        else:
            self._send({"bye": error, "status": self.activity.look().to_json()})

    def close(self) -> None:
        """Gives up the connections."""
        if self._channel is not None:
            self._channel.close()

    # ----------------------------------------------------------------------------------------------- the thread

    def run(self) -> None:
        """Listens and looks, until the process ends."""
        self.connect()
        while self.verdict is None:
            self.step()

    def connect(self) -> None:
        """Makes the connection; without it this process goes on, and knows less."""
        for attempt in range(ATTEMPTS if self._connect else 0):
            try:
                assert self._connect is not None
                self._channel = self._connect()
                break
            except OSError as error:
                if attempt + 1 < ATTEMPTS:
                    time.sleep(PAUSE)
                else:
                    self._say(
                        f"process {self.number} has no connection to process 0 ({error}). Training goes on. If a process "
                        "fails, the others may not be able to say which one it was."
                    )
        self.connected.set()

    def step(self) -> None:
        """Takes what has come in a while, and looks around once in a second."""
        if self._channel is None:
            time.sleep(PERIOD)
        else:
            try:
                for sender, message in self._channel.poll(PERIOD / 2):
                    self._hear(sender, message)
            except OSError:
                self._channel = None
        now = self._clock()
        if now >= self._next and self.verdict is None:
            if now > self._next + LATE:  # this process did not run, and so could not hear the others
                for peer in self.peers.values():
                    peer.heard = now
            self._next = now + PERIOD
            self._look_around(now)

    def _hear(self, sender: int, message: Any) -> None:
        peer = self.peers[sender]
        peer.heard = self._clock()
        if peer.missed and not isinstance(message, Ended):
            peer.missed = False
            self._tell(f"process {sender} is heard of again.")
        match message:
            case Ended():
                if isinstance(self._channel, Client):
                    self._channel = None
                if message.closed and not peer.ended:
                    gone = f"Process {sender} is gone without a word: it was killed, or it crashed"
                    self._decide(Verdict((sender,), f"{gone}. What it printed last may say why."))
                peer.ended = True  # whatever happened, there is nothing more to wait for here
            case {"verdict": [culprits, text]}:
                self._decide(Verdict(tuple(culprits), text))
            case {"note": text}:
                self._say(text)
            case {"bye": error, "status": status}:
                peer.status, peer.ended = Status.from_json(status), True
                if error is not None:
                    self._decide(Verdict((sender,), f"Process {sender} ended with {error}"))
            case {"status": status}:
                peer.status = Status.from_json(status)
            case _:
                pass

    def _look_around(self, now: float) -> None:
        self._status = self.activity.look()
        seen = {number: Seen(peer.status, now - peer.heard, peer.ended) for number, peer in self.peers.items()}
        if self._channel is not None:
            self._miss(seen)
        if self.number == 0:
            self._send({"alive": True})
            seen[0] = Seen(self._status, 0.0, self.ended)
            verdict = verdicts.judge(seen, self.step_timeout)
            self._be_patient(seen)
        else:
            self._send({"status": self._status.to_json()})
            verdict = self._alone(seen[0])
        if verdict is not None:
            self._decide(verdict)

    def _miss(self, seen: dict[int, Seen]) -> None:
        for number in verdicts.silent(seen, self.heartbeat_timeout / 2):
            peer = self.peers[number]
            if not peer.missed:
                peer.missed = True
                silent = f"process {number} has not been heard of for {seen[number].silent:.0f} s"
                if self.number == 0 and peer.status is None:  # its connection may have failed while it runs
                    why = "since it started. It has no connection to process 0, or is stopped or very busy"
                else:
                    place = peer.status.place if peer.status else "running"
                    why = f"and before, it was {place}. It is stopped or very busy, or cannot be reached"
                limit = f"heartbeat_timeout={self.heartbeat_timeout:g}"
                self._tell(f"{silent}, {why}. If it does not run, JAX ends all processes ({limit}).")

    def _be_patient(self, seen: dict[int, Seen]) -> None:
        """Says once what takes long and has no limit: a compilation, or an exchange in which one process has more to do."""
        found = verdicts.overdue(seen, self.step_timeout, timed=False)
        if found is not None and not self._patient:
            self._tell(f"{found.text} This may be as it should be, so the processes go on waiting.")
        self._patient = found is not None

    def _alone(self, server: Seen) -> Verdict | None:
        """What to do if process 0 should have decided, and has not."""
        work = self._status.waits
        if work is None or not work.timed or work.seconds <= self.step_timeout + LATE:
            return None
        text = f"{work.what} has not finished for {work.seconds:.0f} s (step_timeout={self.step_timeout:g})"
        if self._channel is not None and server.silent > LATE:
            return Verdict((0,), f"{text}, and process 0 has not been heard of for {server.silent:.0f} s.")
        return Verdict((), f"{text}. Another process may be stuck; which one is not known, for lack of a connection.")

    def _tell(self, text: str) -> None:
        """Says it here, and in process 0 everywhere."""
        self._say(text)
        if self.number == 0:
            self._send({"note": text})

    def _decide(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict = verdict
            if self.number == 0:
                self._send({"verdict": [list(verdict.culprits), verdict.text]})
            self.decided.set()
            self._end(verdict)

    def _send(self, message: Any) -> None:
        if (channel := self._channel) is not None:
            channel.send(message)
