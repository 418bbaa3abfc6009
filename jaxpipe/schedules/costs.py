"""What `simulate` is told about ops, transfers and memory: checked, and made a value per stage or per edge."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias, cast

from jaxpipe.checks import as_integer, as_number, show
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.clock import Cost
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.table import Schedule

PerStage: TypeAlias = Cost | Sequence[Cost]
Edge: TypeAlias = tuple[int, int]  # ranks: from, to
PerEdge: TypeAlias = Cost | Mapping[Edge, Cost]


@dataclass(frozen=True)
class OpCosts:
    """How long each op takes.

    Attributes:
      of: by kind, per stage.
      per_rank: what a micro-batch costs on a rank, if one number for each kind was given, and None if not.
    """

    of: Mapping[str, tuple[Cost, ...]]
    per_rank: Cost | None

    def __call__(self, op: Op) -> Cost:
        return self.of[op.kind][op.stage]


def op_costs(schedule: Schedule, forward: object, backward_input: object, backward_weight: object) -> OpCosts:
    """Reads costs that are a number, of which a stage gets its share, or a sequence of one per stage.

    Raises:
      ScheduleError: a cost is negative or out of range, or the number of costs is not the number of stages.
    """
    given = {"forward": forward, "backward_input": backward_input, "backward_weight": backward_weight}
    whole: dict[str, Cost] = {}
    stages: dict[str, tuple[Cost, ...]] = {}
    for name, value in given.items():
        if (number := _number(value)) is not None or not _is_sequence(value):
            whole[name] = _checked(name, value, number)
            stages[name] = (_share(whole[name], schedule.num_chunks),) * schedule.num_stages
        else:
            stages[name] = per_stage(name, value, schedule)
    f, i, w = stages.values()
    per_rank: Cost | None = None
    if len(whole) == len(given):
        per_rank = whole["forward"]
        if not schedule.forward_only:
            per_rank += whole["backward_input"] + whole["backward_weight"]
        # A number was added up before it was divided, which rounds once less.
        both = _share(whole["backward_input"] + whole["backward_weight"], schedule.num_chunks)
        b = (both,) * schedule.num_stages
    else:
        b = tuple(one + other for one, other in zip(i, w, strict=True))
    return OpCosts({"F": f, "B": b, "I": i, "W": w}, per_rank)


def per_stage(name: str, value: object, schedule: Schedule) -> tuple[Cost, ...]:
    """Reads a sequence of one number per stage.

    Raises:
      ScheduleError: it is none, has another length, or a number is negative or out of range.
    """
    if not _is_sequence(value):
        raise ScheduleError(
            f"{name}={show(value)}: expected one number for each of the {schedule.num_stages} stages, as a list."
        )
    values = list(cast(Iterable[object], value))
    if len(values) != schedule.num_stages:
        ranks = f" on {schedule.num_ranks} ranks" if schedule.num_stages != schedule.num_ranks else ""
        raise ScheduleError(
            f"{name} has {len(values)} entries, but the schedule has {schedule.num_stages} stages{ranks}. Give one for "
            "each stage, in the order of the stages."
        )
    return tuple(_checked(f"{name}[{stage}]", each, _number(each)) for stage, each in enumerate(values))


def edge_costs(schedule: Schedule, comm: object) -> Mapping[Edge, Cost]:
    """The time of a transfer by (from rank, to rank), for all edges over which the schedule sends.

    Raises:
      ScheduleError: a time is negative or out of range, a key is no pair of ranks, or an edge has no time.
    """
    edges = _edges(schedule)
    if not isinstance(comm, Mapping):
        number = _checked("comm", comm, _number(comm))
        return dict.fromkeys(edges, number)
    found: dict[Edge, Cost] = {}
    for key, value in cast(Mapping[object, object], comm).items():
        name = show(key)
        pair = tuple(map(as_integer, cast(tuple[object, ...], key))) if isinstance(key, tuple) else ()
        if len(pair) != 2 or any(rank not in range(schedule.num_ranks) for rank in pair):
            raise ScheduleError(
                f"comm has the key {name}: a key is (from rank, to rank), and ranks are 0..{schedule.num_ranks - 1}."
            )
        found[cast(Edge, pair)] = _checked(f"comm[{name}]", value, _number(value))
    for edge in edges:
        if edge not in found:
            raise ScheduleError(
                f"comm has no time for {edge}, but the schedule sends from rank {edge[0]} to rank {edge[1]}. Add "
                f"{edge}: 0 if that takes no time."
            )
    return found


def _edges(schedule: Schedule) -> list[Edge]:
    """In the order of the stages: forward, and back if there are backwards."""
    found: dict[Edge, None] = {}
    for source, target in zip(schedule.placement, schedule.placement[1:], strict=False):
        if source != target:
            found[source, target] = None
            if not schedule.forward_only:
                found[target, source] = None
    return list(found)


def _is_sequence(value: object) -> bool:
    return hasattr(value, "__iter__") and hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping))


def _number(value: object) -> Cost | None:
    """A cost as an int or a Fraction if it is one, and otherwise as a float; None if it is no number."""
    return value if isinstance(value, Fraction) else as_number(value)


def _checked(name: str, value: object, number: Cost | None) -> Cost:
    # The limits leave room for sums, and for the floats with which the times are shown.
    if number is None or number < 0 or (number and not 0.9e-100 < number < 1.1e100):
        raise ScheduleError(
            f"{name}={show(value)}: a cost must be a finite number of at least 0 "
            "(and, if it is not 0, from 1e-100 to 1e100)."
        )
    return number


def _share(cost: Cost, num_chunks: int) -> Cost:
    if num_chunks == 1 or isinstance(cost, float):
        return cost / num_chunks if num_chunks > 1 else cost
    return Fraction(cost, num_chunks)
