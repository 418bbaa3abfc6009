"""Which values of different ranks share an array, where ranks hold unlike things. Numbers only.

All ranks run one program, so each of its arrays is as large on every rank. What a rank holds can lie end to end in one
long vector, which is as long as the fullest rank needs: that takes the fewest bytes. Or a value has a *room*, an array of
its own, in which each rank has such a value or nothing: that may take more bytes, but nothing needs to be taken out of the
vector and laid out anew. So the vector is for what has no partner on the other ranks, and rooms are for all that makes the
whole no larger.
"""

from collections.abc import Mapping, Sequence

# Rooms are worth so much more than the least that is possible.
SLACK = 0.01


def with_rooms(candidates: Sequence[Mapping[int, int]], others: Mapping[int, int] | None = None) -> list[bool]:
    """Which candidates get a room; the others lie in the vector.

    Args:
      candidates: what may share one room: by rank, the bytes that it would take in the vector. In a room it takes the most
        of these on every rank.
      others: by rank, the bytes of what lies in the vector whatever happens.

    Returns:
      Per candidate, whether it gets a room. The bytes of all rooms and of the vector together are at most `1 + SLACK` times
      those of the vector without any room.
    """
    left = dict(others or {})
    for candidate in candidates:
        for rank, size in candidate.items():
            left[rank] = left.get(rank, 0) + size
    limit = (1 + SLACK) * max(left.values(), default=0)
    # Those of most bytes first: they gain most, and the small ones fill what is left. Of equal ones the order is kept.
    order = sorted(range(len(candidates)), key=lambda i: -sum(candidates[i].values()))
    found, rooms = [False] * len(candidates), 0
    for i in order:
        size = max(candidates[i].values(), default=0)
        after = {rank: count - candidates[i].get(rank, 0) for rank, count in left.items()}
        if size and rooms + size + max(after.values()) <= limit:
            found[i], rooms, left = True, rooms + size, after
    return found
