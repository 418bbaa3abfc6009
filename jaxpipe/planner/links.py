"""How long bytes take between chips. Neighbours on the axis "model" are nearest, then those on "data", then on "pipe"."""

from collections.abc import Sequence

import numpy as np

from jaxpipe.hardware.chips import Chip


def scatter(chip: Chip, size: int, apart: int) -> float:
    """Seconds per byte of an array that is summed and scattered over an axis, or gathered; an all-reduce is both.

    It is done among the chips that links join first, and then between such groups, each chip with its own part.

    Args:
      size: of the axis.
      apart: how many chips there are between neighbours on it: the size of the axes inside of it.
    """
    inside = size
    if chip.group is not None and chip.network is not None:
        inside = max(min(size, chip.group // apart), 1)
    outside = -(-size // inside)
    seconds = (inside - 1) / inside / chip.ring
    if outside > 1 and chip.network is not None:
        seconds += (outside - 1) / outside / (inside * chip.network)
    return seconds


def send(chip: Chip, placement: Sequence[int], apart: int) -> np.ndarray:
    """Seconds per byte from each stage to the next one, [stages - 1]: over a link, or between groups of chips.

    Args:
      placement: the rank of each stage.
      apart: how many chips there are between neighbours on the axis "pipe".
    """
    first = np.asarray(placement) * apart
    if chip.group is None or chip.network is None:
        return np.full(len(first) - 1, 1 / chip.link)
    # The chips of a rank lie in a row; if that is longer than a group, all of them send to other groups.
    group = first // chip.group if apart < chip.group else first
    return np.where(group[1:] == group[:-1], 1 / chip.link, 1 / chip.network)
