"""`Rounds`: before a program runs on several processes, all say whether they are ready for it, and the host does not wait.

A program of several processes runs only if all of them start it, with inputs of one shape. A process whose data have ended
or do not fit must not leave the others waiting. So each round begins with a few numbers from every process, which a small
program brings to all of them: what it has, a hash of its shapes, and hashes of its contents.

A process that has what the last program took does not read the answer. It starts the program at once, and the program looks
at the answer on the device and keeps its state as it was unless all agree. A process that has something else reads the
answer. It sees whether all have the same new thing, whether some have started the last program (then it starts it too, with
zeros), or whether nobody starts anything.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.processes import watchdog

P = PartitionSpec
# What `faults` says of a process whose data have ended.
NO_MORE = "has no more data"


class Has(enum.IntEnum):
    """What a process has for a round."""

    DATA = 0
    NO_MORE = 1
    MISFIT = 2


class Answer(NamedTuple):
    """What all processes have said.

    Attributes:
      words: int32 [processes, 2 + contents]: a `Has`, the hash of the shapes, and the hashes of the contents.
      agreed: bool [], whether all have data of the same shapes, and those who must have the same contents do.
    """

    words: jax.Array
    agreed: jax.Array


class Round(NamedTuple):
    """What a process does in a round.

    Attributes:
      starts: whether the program is started; if not, no process starts it.
      own: whether with its own data; if not, with zeros in the shapes of the last program.
      answer: of all processes; reading it waits for the devices.
    """

    starts: bool
    own: bool
    answer: Answer


class Rounds:
    """The rounds of one kind of program on a mesh.

    Args:
      mesh: of the program.
      alike: for each process of the mesh, in order, the place of the first one that must have the same contents.
      name: of a round in messages; `{}` stands for its number.
    """

    def __init__(self, mesh: Mesh, alike: Sequence[int], name: str = "round {}"):
        processes = [device.process_index for device in mesh.devices.flat]
        first = [processes.index(process) for process in sorted(set(processes))]  # a device of each process
        self._rows = NamedSharding(mesh, P(mesh.axis_names))
        self._name, self._count, self._members = name, 0, sorted(set(processes))
        self._last: int | None = None  # the hash of the shapes of the program that ran last

        def answer(rows: jax.Array) -> Answer:
            words = rows[np.asarray(first)]
            has, shapes, contents = words[:, 0], words[:, 1], words[:, 2:]
            same = (shapes == shapes[0]).all() & (contents == contents[np.asarray(alike)]).all()
            return Answer(words, same & (has == Has.DATA).all())

        everywhere = NamedSharding(mesh, P())
        self._answer = jax.jit(answer, out_shardings=everywhere)

    def next(self, has: Has, shapes: int, contents: Sequence[int]) -> Round:
        """Says what this process has, and what it does now."""
        word = np.asarray([[has, shapes, *contents]], np.int32)
        whole = (self._rows.mesh.size, word.shape[1])
        self._count += 1
        # A small program may run at once, so that the call waits for the others.
        with watchdog.waiting(self._members, "round", self._name.format(self._count)) as until:
            answer: Answer = self._answer(jax.make_array_from_callback(whole, self._rows, lambda _: word))
            until(answer.agreed)
        if has == Has.DATA and shapes == self._last:
            return Round(True, True, answer)
        if bool(answer.agreed):
            self._last = shapes
            return Round(True, True, answer)
        words = np.asarray(answer.words)
        # Those who have started the last program have not read the answer, and wait for the others in it.
        started = (words[:, 0] == Has.DATA) & (words[:, 1] == self._last)
        return Round(bool(started.any()), False, answer)


def faults(answer: Answer, alike: Sequence[int], names: Sequence[str]) -> dict[int, str]:
    """What is wrong with what processes have said, by the place of the process; empty if they agree.

    Args:
      alike: as for `Rounds`.
      names: of the contents.
    """
    words = np.asarray(answer.words)
    found: dict[int, str] = {}
    usual = _usual(words)
    for place, (has, shapes, *contents) in enumerate(words.tolist()):
        if has == Has.NO_MORE:
            found[place] = NO_MORE
        elif has == Has.MISFIT:
            found[place] = "has data that do not fit; its own message says why"
        elif shapes != usual:
            found[place] = "has micro-batches of other shapes"
        elif contents != (other := words[alike[place], 2:].tolist()):
            odd = " and ".join(name for name, a, b in zip(names, contents, other, strict=True) if a != b)
            found[place] = f"has other {odd} than process {{{alike[place]}}}"
    return found


def _usual(words: np.ndarray) -> int | None:
    """The hash of the shapes that most processes have; of two that are as frequent, that of the first process."""
    shapes = [row[1] for row in words.tolist() if row[0] == Has.DATA]
    return max(shapes, key=shapes.count) if shapes else None


def refused(loss: jax.Array, answer: Answer) -> jax.Array:
    """The loss of a step; NaN if the processes have not agreed, because it is then that of some zeros."""
    return jnp.where(answer.agreed, loss, jnp.asarray(jnp.nan, loss.dtype))
