"""Decides which equations of a trace run together, and in which order.

Equations that look the same in layers of one stack become one *group*: one primitive on arrays [S, K, ...], of which each
rank computes the rows of its own layers. Between the groups come gathers, which join the layers.

Looking the same decides only what runs together. What an equation reads is looked up layer by layer, so the result does not
depend on the grouping: a transformation that mixes arrays of several layers, or treats every layer differently, is slow
but not wrong.
"""

from collections import Counter
from collections.abc import Hashable

from jaxpipe.optimizer.trace import ArrayKey, Equation, Trace, Value


class Grouped:
    """A trace in levels.

    The `plain` equations of level -1 run first. Then each level n runs in this order: the `groups` of level n, on the
    ranks; the gathers that the equations without a home need; and the `plain` equations of level n, which have no home,
    in the order of the trace.

    Attributes:
      groups: for each level, lists of equations that look the same, at most one equation of each layer per list.
      plain: for each level, the equations without a home.
      gathered: keys of the arrays that are needed on all ranks.
    """

    def __init__(self, trace: Trace):
        self.trace = trace
        self.plain: dict[int, list[Equation]] = {}
        self.groups: dict[int, list[list[Equation]]] = {}
        self._found: dict[Hashable, list[Equation]] = {}
        self._counts: Counter[Hashable] = Counter()
        gathered: list[ArrayKey] = []
        for eqn in trace.equations:
            if eqn.home is None:
                level = max((v.level for v in eqn.inputs), default=-1)
                self.plain.setdefault(level, []).append(eqn)
                gathered += [v.held_in for v in eqn.inputs if v.home]
            else:
                level = max((v.level if v.home else v.level + 1 for v in eqn.inputs), default=0)
                self._join(eqn, level)
            for v in eqn.outputs:
                v.level = level
        # A result that belongs to one layer and is to be stored with none, or with another one, has to travel.
        ends = [(v, home) for v, home in zip(trace.outputs, trace.out_homes, strict=True) if v.home and v.home != home]
        gathered += [v.held_in for v, _ in ends]
        self.gathered = list(dict.fromkeys(gathered))
        self._moved = [v.level for v, home in ends if home]

    def _join(self, eqn: Equation, level: int) -> None:
        """Puts an equation into its group, which holds the n-th equation of this look of every layer of a stack."""
        assert eqn.home is not None
        reads = tuple(v.held_in if v.home else (v.aval.shape, v.aval.dtype) for v in eqn.inputs)
        like = (eqn.look, reads, level, eqn.home[0])
        self._counts[eqn.home, like] += 1
        group = self._found.setdefault((like, self._counts[eqn.home, like]), [])
        if not group:
            self.groups.setdefault(level, []).append(group)
            name = len(self._found)
            for i, v in enumerate(eqn.outputs):
                v.held_in = ("made", name, i)
        else:
            for v, first in zip(eqn.outputs, group[0].outputs, strict=True):
                v.held_in = first.held_in
        group.append(eqn)

    @property
    def last(self) -> int:
        """The level after all others, in which the results are put together, and what they need was gathered before."""
        return max([*self.groups, *self.plain, *self._moved, -1]) + 1

    def reads(self, level: int) -> list[Value]:
        """The values that the groups of a level read, each once, in the same order in every process."""
        return list(dict.fromkeys(v for group in self.groups.get(level, ()) for eqn in group for v in eqn.inputs))

    def made_at(self) -> dict[ArrayKey, int]:
        """The level at which each array of outputs is made."""
        return {v.held_in: level for level, groups in self.groups.items() for g in groups for v in g[0].outputs}
