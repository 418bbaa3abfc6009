"""Which like layers are stored as a stack, and which one by one. Numbers only.

A stack [S, slots, ...] moves nothing before a step, but every rank stores as many slots as the fullest one has layers. If a
kind of layer lies on a few of the ranks only (vision blocks and text blocks of one model), that would be mostly padding, in
weights, sums of gradients and the state of an optimizer. Such layers are a *pile*: each is stored on its own, cut over all
ranks, and they are a stack for the time of a step, on the ranks that use them.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

# Layers of fewer bytes are always stacked: a pile of them would save nothing that anybody could see.
SMALL = 1 << 18
# What piles have to save, of all that is counted.
WORTH = 0.15
# What a number that is stored costs: itself, and two numbers that optimizers such as Adam keep about it.
STORED = 3


class LikeLayers(NamedTuple):
    """Layers of one kind.

    Attributes:
      bytes: of one.
      counts: how many of them each rank has.
    """

    bytes: int
    counts: tuple[int, ...]


def piled(kinds: Sequence[LikeLayers], single: Sequence[int]) -> list[bool]:
    """Per kind, whether it is a pile.

    Args:
      single: per rank, the bytes of the layers that only it uses and that are the only ones of their kind.
    """
    free = [i for i, kind in enumerate(kinds) if kind.bytes >= SMALL and _is_padded(kind)][:8]
    none = [False] * len(kinds)
    best, least = none, _bytes(kinds, single, none) * (1 - WORTH)
    for chosen in itertools.product([False, True], repeat=len(free)):
        choice = list(none)
        for i, pile in zip(free, chosen, strict=True):
            choice[i] = pile
        if any(chosen) and (size := _bytes(kinds, single, choice)) < least:
            best, least = choice, size
    return best


def _is_padded(kind: LikeLayers) -> bool:
    return max(kind.counts) * len(kind.counts) > sum(kind.counts)


def _bytes(kinds: Sequence[LikeLayers], single: Sequence[int], choice: Sequence[bool]) -> float:
    """The bytes of a rank: what it stores, what it computes with beside that, and the sums of gradients."""
    ranks = len(single)
    own, found = list(single), STORED * sum(single) / ranks
    for kind, pile in zip(kinds, choice, strict=True):
        if pile:
            found += STORED * kind.bytes * sum(kind.counts) / ranks
            own = [size + kind.bytes * count for size, count in zip(own, kind.counts, strict=True)]
        else:
            found += (STORED + 1) * kind.bytes * max(kind.counts)
    return found + 2 * max(own)
