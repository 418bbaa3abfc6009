"""The order in which a rank works when its backward comes in two halves."""

from collections.abc import Sequence

from jaxpipe.schedules.op import Op

Work = tuple[int, int]  # (stage, micro_batch)


def split_row(forwards: Sequence[Work], backwards: Sequence[Work], *, ahead: int, behind: int) -> list[Op]:
    """One row: `ahead` forwards; then F, I and W in turn for as long as there are any; then the rest of W.

    Args:
      forwards, backwards: the same works, in the order in which they go forward, and backward.
      ahead: how many forwards come before the first turn.
      behind: by how many backwards W is behind I.
    """
    ahead = min(ahead, len(forwards))
    row = [Op("F", *work) for work in forwards[:ahead]]
    for number, work in enumerate(backwards):
        if ahead + number < len(forwards):
            row.append(Op("F", *forwards[ahead + number]))
        row.append(Op("I", *work))
        if number >= behind:
            row.append(Op("W", *backwards[number - behind]))
    return row + [Op("W", *work) for work in backwards[max(0, len(backwards) - behind) :]]
