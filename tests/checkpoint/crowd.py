"""Processes that are threads: what they tell each other goes through memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

from jaxpipe.processes.group import Group

PATIENCE = 600  # seconds; far more than any machine needs


class Member(Group):
    """One of several threads that stand for processes."""

    def __init__(self, me, count, said, barrier):
        self.members, self.several, self.first = tuple(range(count)), count > 1, me == 0
        self.me, self._said, self._barrier = me, said, barrier

    def gather(self, value):
        self._said[self.me] = value
        self._barrier.wait(PATIENCE)
        found = list(self._said)
        self._barrier.wait(PATIENCE)  # before anyone says something new
        return found


def crowd(count, work=lambda group: group):
    """What `work(group)` returns, or raises, in each of so many threads."""
    said, barrier = [None] * count, threading.Barrier(count)

    def one(me):
        try:
            return work(Member(me, count, said, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))
