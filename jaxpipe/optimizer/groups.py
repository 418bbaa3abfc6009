"""Which equations of a trace run together, and in which order: groups on the ranks, between gathers.

Equations of like layers that look the same become one *group*: one primitive on arrays [S, K, ...], of which each rank
computes its own layers. Looking alike only decides what runs together. What an equation reads is looked up layer by layer,
so the result does not depend on it: a transformation that mixes arrays of several layers, or treats every layer
differently, is slow, not wrong.
"""

from collections import Counter
from typing import Any

from jaxpipe.optimizer.trace import Equation, Trace, Value


class Grouped:
    """A trace in levels.

    Level n runs in this order: the `groups` of level n, on the ranks; the gathers of what values without home need; the
    `plain` equations of level n, which have no home, in the order of the trace. Plain equations of level -1 come first.

    Attributes:
      groups: per level, lists of like equations, at most one of each layer.
      plain: per level, equations without home.
      gathered: keys of the batches that are needed on all ranks.
    """

    def __init__(self, trace: Trace):
        self.trace = trace
        self.plain: dict[int, list[Equation]] = {}
        self.groups: dict[int, list[list[Equation]]] = {}
        self._found: dict[Any, list[Equation]] = {}
        self._counts: Counter[Any] = Counter()
        gathered: list[Any] = []
        for eqn in trace.equations:
            if eqn.home is None:
                level = max((v.level for v in eqn.inputs), default=-1)
                self.plain.setdefault(level, []).append(eqn)
                gathered += [v.batch for v in eqn.inputs if v.home]
            else:
                level = max((v.level if v.home else v.level + 1 for v in eqn.inputs), default=0)
                self._join(eqn, level)
            for v in eqn.outputs:
                v.level = level
        gathered += [v.batch for v, home in zip(trace.outputs, trace.out_homes, strict=True) if v.home and not home]
        self.gathered = list(dict.fromkeys(gathered))

    def _join(self, eqn: Equation, level: int) -> None:
        """Puts an equation into its group: the n-th that looks so, of each layer of a stack."""
        assert eqn.home is not None
        reads = tuple(v.batch if v.home else (v.aval.shape, v.aval.dtype) for v in eqn.inputs)
        like = (eqn.look, reads, level, eqn.home[0])
        self._counts[eqn.home, like] += 1
        group = self._found.setdefault((like, self._counts[eqn.home, like]), [])
        if not group:
            self.groups.setdefault(level, []).append(group)
            name = len(self._found)
            for i, v in enumerate(eqn.outputs):
                v.batch = ("made", name, i)
        else:
            for v, first in zip(eqn.outputs, group[0].outputs, strict=True):
                v.batch = first.batch
        group.append(eqn)

    @property
    def last(self) -> int:
        """The level after all others, in which the results are put together."""
        return max([*self.groups, *self.plain, -1]) + 1

    def reads(self, level: int) -> set[Value]:
        """What the groups of a level read."""
        return {v for group in self.groups.get(level, ()) for eqn in group for v in eqn.inputs}

    def made_at(self) -> dict[Any, int]:
        """The level at which each batch is made."""
        return {v.batch: level for level, groups in self.groups.items() for g in groups for v in g[0].outputs}
