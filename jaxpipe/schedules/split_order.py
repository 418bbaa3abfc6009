"""The order in which ranks work when the backward comes in two halves: by a rule, or as things become ready."""

from collections.abc import Sequence

from jaxpipe.schedules.op import Kind, Op, needs

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


def rows_as_ready(placement: Sequence[int], num_micro_batches: int) -> list[list[Op]]:
    """All rows, if in each tick each rank runs something that is ready: I before F before W, of the latest stage.

    That keeps all micro-batches at once, so it is for few of them. W comes last because nobody waits for it; for a later
    stage more others wait than for an earlier one.
    """
    stages, micro_batches = range(len(placement)), range(num_micro_batches)
    split = {(stage, micro_batch) for stage in stages for micro_batch in micro_batches}
    left: list[list[Op]] = [[] for _ in range(1 + max(placement))]
    kinds: tuple[Kind, ...] = ("I", "F", "W")
    for kind in kinds:
        for stage in reversed(stages):
            left[placement[stage]] += [Op(kind, stage, micro_batch) for micro_batch in micro_batches]
    rows: list[list[Op]] = [[] for _ in left]
    done: set[Op] = set()
    while any(left):
        chosen: list[Op] = []
        for waiting, row in zip(left, rows, strict=True):
            op = next((op for op in waiting if done.issuperset(needs(op, len(placement), split))), None)
            if op is not None:
                waiting.remove(op)
                row.append(op)
                chosen.append(op)
        done.update(chosen)
    return rows
