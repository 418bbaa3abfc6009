"""Which buffer slot each in-flight value gets: interval colouring, optimal in one sweep."""

import heapq
from collections.abc import Hashable, Mapping
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)


def colour(intervals: Mapping[Value, tuple[int, int]]) -> tuple[dict[Value, int], int]:
    """Assigns slots so that values alive at the same time never share one.

    Args:
      intervals: per value, (first, last) tick at which it occupies a slot, both inclusive.

    Returns:
      The slot of each value, and how many slots are used: exactly the largest number of values alive at once, because
      the sweep opens a new slot only when every older one is occupied.
    """
    slots: dict[Value, int] = {}
    free: list[int] = []
    occupied: list[tuple[int, int]] = []  # (last tick, slot)
    used = 0
    for value, (first, last) in sorted(intervals.items(), key=lambda item: item[1]):
        while occupied and occupied[0][0] < first:
            heapq.heappush(free, heapq.heappop(occupied)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, used = used, used + 1
        slots[value] = slot
        heapq.heappush(occupied, (last, slot))
    return slots, used
