"""How stages are dealt out to ranks, and in which order a rank visits the micro-batches of its chunks.

With p ranks and v chunks per rank, stage s is chunk s // p of rank s mod p: a micro-batch goes round the ranks v times. It
does so in a group of at least p, because such a group comes back to rank 0 just when rank 0 has sent the last of it on its
way. Where p does not divide m, the rest is spread over the groups. With m < p there is one group, which is too short.
"""

from jaxpipe.errors import ScheduleError

Visit = tuple[int, int]  # (chunk, micro_batch)


def count_ranks(num_stages: int, num_chunks: int) -> int:
    """The number of ranks that hold `num_chunks` of `num_stages` stages each.

    Raises:
      ScheduleError: `num_chunks` does not divide `num_stages`.
    """
    if num_stages % num_chunks:
        raise ScheduleError(
            f"num_stages={num_stages} cannot be dealt out as num_chunks={num_chunks} per rank: num_stages counts all "
            "stages and must be a multiple of num_chunks. Use "
            f"num_stages={num_stages - num_stages % num_chunks + num_chunks}, or num_chunks=1."
        )
    return num_stages // num_chunks


def in_a_loop(num_stages: int, num_ranks: int) -> tuple[int, ...]:
    """The placement: stage s on rank s mod ranks."""
    return tuple(stage % num_ranks for stage in range(num_stages))


def groups(num_ranks: int, num_micro_batches: int) -> list[range]:
    """The micro-batches that go round together. Sizes differ by 1 at most, larger groups first."""
    num_groups = max(1, num_micro_batches // num_ranks)
    base, extra = divmod(num_micro_batches, num_groups)
    found: list[range] = []
    first = 0
    for group in range(num_groups):
        size = base + (group < extra)
        found.append(range(first, first + size))
        first += size
    return found


def visits(num_ranks: int, num_micro_batches: int, num_chunks: int) -> list[tuple[int, Visit]]:
    """For each forward of rank 0 the tick, if nothing else runs, and what it is of, in the order of time.

    Rank r is r ticks later. Backwards visit in the same order, with the chunks counted from the last one.
    """
    found: list[tuple[int, Visit]] = []
    for group in groups(num_ranks, num_micro_batches):
        start = num_chunks * group.start
        for chunk in range(num_chunks):
            begin = start + chunk * max(len(group), num_ranks)  # a short group waits until it has come round
            found += [(begin + index, (chunk, micro_batch)) for index, micro_batch in enumerate(group)]
    return found
