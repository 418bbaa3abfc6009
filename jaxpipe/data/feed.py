"""`Feed`: the batches of training, taken from an iterator in every process and put on the mesh together."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.data.digest import CONTENTS, contents_digests, shapes_digest
from jaxpipe.data.place import stack
from jaxpipe.data.pull import EndOfData, as_data_error, check_for_training, pull
from jaxpipe.data.share import Share
from jaxpipe.errors import DataError
from jaxpipe.model.shapes import aval, avals, describe, is_key
from jaxpipe.model.values import raw_aval, typed
from jaxpipe.processes.rounds import NO_MORE, Answer, Has, Rounds, faults
from jaxpipe.types import AnyArray, Avals, Batch, Tree


class Fed(NamedTuple):
    """A batch for one training step.

    Attributes:
      inputs, labels: leaves [M, B, ...] on the mesh.
      answer: what all processes have said about their data; None where a process is alone. If they do not agree, the step
        must change nothing.
      fault: says what was wrong if they do not agree, and None if they do. It waits for the devices.
    """

    inputs: Tree
    labels: Tree
    answer: Answer | None = None
    fault: Callable[[], DataError | None] | None = None


class Feed:
    """Takes the micro-batches of one training step after the other.

    With several processes a step runs on all of them or on none. Usually they agree on the devices, and no host waits for
    an answer; see `jaxpipe.processes.rounds`.

    Args:
      share: what this process brings.
      num_micro_batches: M.
    """

    def __init__(self, share: Share, num_micro_batches: int):
        self.share, self.num_micro_batches = share, num_micro_batches
        self._rounds = Rounds(share.mesh, share.alike, "call {} of train_batch") if share.group.several else None
        self._like: Avals = None  # abstract values of a micro-batch of the last step
        self._batches = 0

    def next(self, data_iter: Iterator[Batch]) -> Fed:
        """The next batch.

        Raises:
          DataError: the iterator ends early, or yields what does not fit. With several processes it is raised only if no
            process has started the step; otherwise the step is started everywhere, and `Fed.fault` says what was wrong.
        """
        if self._rounds is None:
            return Fed(*stack(self._pull(data_iter), self.share))
        items, has, problem = self._taken(data_iter)
        rows = [self.share.whole(aval(jax.tree.leaves(inputs)[0]).shape[0]) for inputs, _ in items]
        contents = contents_digests(items, self._batches)
        turn = self._rounds.next(has, shapes_digest(items, rows), contents)
        self._batches += 1
        mine = avals(items[0]) if items else None  # and not the data: a step that is in flight must not keep them
        if not turn.starts:
            raise problem or self._fault(turn.answer, mine)
        if turn.own:
            self._like = mine
        else:
            items = [jax.tree.map(_zeros, self._like)] * self.num_micro_batches

        def fault() -> DataError | None:
            return None if bool(turn.answer.agreed) else problem or self._fault(turn.answer, mine)

        return Fed(*stack(items, self.share), turn.answer, fault)

    def _pull(self, data_iter: Iterator[Batch]) -> list[Batch]:
        return pull(data_iter, self.num_micro_batches, check_for_training(self.share.ranks))

    def _taken(self, data_iter: Iterator[Batch]) -> tuple[list[Batch], Has, DataError | None]:
        """The micro-batches of this process, or none and what is wrong."""
        try:
            return self._pull(data_iter), Has.DATA, None
        except EndOfData as error:
            return [], Has.NO_MORE, error
        except Exception as error:
            return [], Has.MISFIT, as_data_error(error)

    def _fault(self, answer: Answer, mine: Avals) -> DataError:
        """Why a step was not made, where the data of this process are right in themselves: micro-batches like `mine`."""
        members = self.share.group.members
        found = faults(answer, self.share.alike, CONTENTS)
        said = "; ".join(f"process {members[place]} {text.format(*members)}" for place, text in found.items())
        ended = all(text == NO_MORE for text in found.values())
        return (EndOfData if ended else DataError)(
            f"The step was skipped on all {len(members)} processes, and the state is unchanged: {said}. (Process "
            f"{jax.process_index()} has {describe(mine)}.) {self.share.rule}"
        )


def _zeros(like: jax.ShapeDtypeStruct) -> AnyArray:
    words = raw_aval(like)
    return typed(jnp.zeros(words.shape, words.dtype), like) if is_key(like) else np.zeros(like.shape, like.dtype)
