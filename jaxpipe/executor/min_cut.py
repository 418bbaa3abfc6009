"""The cheapest set of values that separates what is made from what is needed. Integers only; Dinic's algorithm."""

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Node = TypeVar("Node", bound=Hashable)


class Network(Generic[Node]):
    """Values with a cost each, and what is made of what. Values that cannot be paid for have the cost None.

    A value that is *made* is there on the near side, one that is *needed* has to be on the far side. There it is either
    brought, at its cost, or made again of values that are there, if `follows` says so.
    """

    def __init__(self):
        self._edges: list[tuple[int, int | None]] = []  # (target, what may still pass; None: any amount), pairwise
        self._out: list[list[int]] = [[], []]  # per node, its edges; node 0 is the near side, node 1 the far side
        self._doors: dict[Node, tuple[int, int]] = {}  # per value, its way in and its way out
        self._costs: dict[Node, int | None] = {}

    def value(self, node: Node, cost: int | None) -> None:
        """Adds a value. The cost of bringing it; None: it cannot be brought."""
        doors = len(self._out), len(self._out) + 1
        self._out += [[], []]
        self._doors[node], self._costs[node] = doors, cost
        self._edge(*doors, cost)

    def made(self, node: Node) -> None:
        """Says that a value cannot be made again on the far side."""
        self._edge(0, self._doors[node][0], None)

    def follows(self, node: Node, of: Node) -> None:
        """Says that the far side makes `node` of `of`, among others, unless it is brought."""
        self._edge(self._doors[of][1], self._doors[node][0], None)

    def needed(self, node: Node) -> None:
        """Says that the far side needs a value."""
        self._edge(self._doors[node][1], 1, None)

    def cut(self) -> list[Node]:
        """The values to bring: of all sets of the least total cost the one nearest to what is needed, so that least is made
        again. In the order in which values were added."""
        while (levels := self._levels())[1] is not None:
            self._block(levels)
        reaches = self._reaching_the_far_side()
        return [node for node, (way_in, way_out) in self._doors.items() if way_out in reaches and way_in not in reaches]

    def _edge(self, source: int, target: int, room: int | None) -> None:
        self._out[source].append(len(self._edges))
        self._edges.append((target, room))
        self._out[target].append(len(self._edges))
        self._edges.append((source, 0))

    def _levels(self) -> list[int | None]:
        """Per node, how many edges it is away from the near side."""
        levels: list[int | None] = [None] * len(self._out)
        levels[0], waiting = 0, deque([0])
        while waiting:
            node = waiting.popleft()
            for edge in self._out[node]:
                target, room = self._edges[edge]
                if room != 0 and levels[target] is None:
                    levels[target] = (levels[node] or 0) + 1
                    waiting.append(target)
        return levels

    def _block(self, levels: list[int | None]) -> None:
        """Sends as much as shortest ways can take."""
        tried = [0] * len(self._out)
        path: list[int] = []
        node = 0
        while True:
            if node == 1:
                rooms = [room for _, room in (self._edges[edge] for edge in path) if room is not None]
                assert rooms, "what is made and cannot be brought is needed"
                for edge in path:
                    self._push(edge, min(rooms))
                path, node = [], 0
                continue
            while tried[node] < len(self._out[node]):
                edge = self._out[node][tried[node]]
                target, room = self._edges[edge]
                if room != 0 and levels[target] is not None and levels[target] == (levels[node] or 0) + 1:
                    path.append(edge)
                    node = target
                    break
                tried[node] += 1
            else:
                if not path:
                    return
                node = self._edges[path.pop() ^ 1][0]
                tried[node] += 1

    def _push(self, edge: int, amount: int) -> None:
        for one, change in ((edge, -amount), (edge ^ 1, amount)):
            target, room = self._edges[one]
            if room is not None:
                self._edges[one] = target, room + change

    def _reaching_the_far_side(self) -> set[int]:
        found, waiting = {1}, deque([1])
        while waiting:
            node = waiting.popleft()
            for edge in self._out[node]:
                source = self._edges[edge][0]
                if source not in found and self._edges[edge ^ 1][1] != 0:
                    found.add(source)
                    waiting.append(source)
        return found
