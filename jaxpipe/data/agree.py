"""`Agreement`: the micro-batches of an evaluation, taken from an iterator in every process, and compared before use.

The number of micro-batches and their rows may differ from one evaluation to the next, and the last ones of a data set are
often odd. So the processes talk on the host before each batch, while the devices are busy with the one before.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxpipe.data.digest import CONTENTS, contents_digests, shapes_digest
from jaxpipe.data.pull import as_data_error
from jaxpipe.data.share import Share
from jaxpipe.errors import DataError
from jaxpipe.model.shapes import aval, avals
from jaxpipe.processes import watchdog
from jaxpipe.types import Batch

Said = list[dict[str, Any]]


class Agreement:
    """Takes the micro-batches of one evaluation after the other.

    Args:
      share: what this process brings.
    """

    def __init__(self, share: Share):
        self.share = share
        self._batches = 0
        self._like: Batch | None = None  # a micro-batch, for a process that has none left while others do

    def take(self, attempt: Callable[[], list[Batch]]) -> tuple[list[Batch], Share]:
        """Calls `attempt` on every process, and compares what they have.

        Returns:
          The micro-batches, and what part of each they are. With `local_rows`, where processes have rows that cannot be put
          onto the data ranks as they are (those at the end of a data set), every process gets the whole micro-batches.

        Raises:
          DataError: it went wrong on one of the processes, or what they have does not go together.
        """
        group = self.share.group
        if not group.several:
            return attempt(), self.share
        items, error = [], None
        try:
            items = attempt()
        except Exception as caught:
            error = as_data_error(caught)
        with watchdog.waiting(group.members, "evaluation", "an evaluation"):
            said: Said = group.gather(self._summary(items, error))
        self._batches += 1
        if error is not None:
            raise error
        self._compare(said)
        if items:
            self._like = avals(items[0])
        if not self.share.local or self._fits(said):
            return items, self.share
        return self._whole(items, said), Share(self.share.mesh)

    def _summary(self, items: list[Batch], error: DataError | None) -> dict[str, Any]:
        if error is not None:
            return {"error": str(error)}
        return {
            "error": None,
            "knows": bool(items) or self._like is not None,
            "rows": [_rows(item) for item in items],
            "shapes": shapes_digest(items[:1], []) if items else None,
            "contents": contents_digests(items, self._batches),
        }

    def _compare(self, said: Said) -> None:
        """Raises DataError if what the processes have said does not go together."""
        members = self.share.group.members
        for member, one in zip(members, said, strict=True):
            if one["error"] is not None:
                raise DataError(f"Nothing was computed on any process. Process {member} says: {one['error']}")
        for member, one in zip(members, said, strict=True):
            if not one["knows"] and any(other["rows"] for other in said):
                raise DataError(f"Nothing was computed: process {member} has no data at all, while others have some.")
        shapes = [one["shapes"] for one in said]
        some = next((place for place, each in enumerate(shapes) if each is not None), 0)
        for place, (member, first) in enumerate(zip(members, self.share.alike, strict=True)):
            one, other = said[place], said[first]
            what = None
            if shapes[place] is not None and shapes[place] != shapes[some]:
                what, first = "micro-batches of other shapes or dtypes", some
            elif one["rows"] != other["rows"]:
                what = f"micro-batches of {one['rows']} rows, and not of {other['rows']},"
            elif one["contents"] != other["contents"]:
                pairs = zip(CONTENTS, one["contents"], other["contents"], strict=True)
                what = f"other {' and '.join(name for name, a, b in pairs if a != b)}"
            if what is not None:
                raise DataError(
                    f"Nothing was computed: process {member} has {what} than process {members[first]}. {self.share.rule}"
                )

    def _fits(self, said: Said) -> bool:
        """Whether the data ranks of every process can take its rows as they are."""
        ranks = [len(self.share.of(member)) for member in self.share.group.members]
        per_rank = [[rows / count for rows in one["rows"]] for one, count in zip(said, ranks, strict=True)]
        return all(one == per_rank[0] for one in per_rank) and all(rows == int(rows) for rows in per_rank[0])

    def _whole(self, items: Sequence[Batch], said: Said) -> list[Batch]:
        """The whole micro-batches, joined of the rows of all processes in the order of their data ranks."""
        members, alike = self.share.group.members, self.share.alike
        firsts = sorted(set(alike), key=lambda place: self.share.of(members[place]))
        whole: list[Batch] = []
        for index in range(max(len(one["rows"]) for one in said)):
            parts = []
            for place in firsts:
                rows = said[place]["rows"][index] if index < len(said[place]["rows"]) else 0
                if rows:
                    own = items[index] if members[place] == jax.process_index() else None
                    parts.append(self._from(members[place], own, rows))
            whole.append(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts))
        return whole

    def _from(self, member: int, item: Batch | None, rows: int) -> Batch:
        """The rows of a process on all of them."""
        leaves, structure = jax.tree.flatten(self._like)
        given = [None] * len(leaves) if item is None else jax.tree.leaves(item)
        made = [
            self.share.group.from_one(
                None if own is None else np.asarray(own, like.dtype), (rows, *like.shape[1:]), like.dtype, member
            )
            for own, like in zip(given, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, made)


def _rows(item: Batch) -> int:
    return aval(jax.tree.leaves(item[0])[0]).shape[0]
