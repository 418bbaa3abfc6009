"""A timeline in the Chrome trace format, for ui.perfetto.dev: a process per rank, with its ops and a counter of memory."""

import json
from pathlib import Path

from jaxpipe.schedules.captions import KINDS, chunk_of, title
from jaxpipe.schedules.simulate import Timeline

_UNIT = 1000  # the format counts microseconds, and a unit of time is shown as a millisecond


def write_trace(timeline: Timeline, path: Path, name: str) -> None:
    """Writes the file. One unit of time becomes one millisecond."""
    path.write_text(
        json.dumps({"traceEvents": events(timeline), "otherData": {"title": title(timeline, name)}}), encoding="utf-8"
    )


def events(timeline: Timeline) -> list[dict[str, object]]:
    """Names of processes, ops as complete events (`X`), and what micro-batches keep as counters (`C`)."""
    table = timeline.schedule
    found: list[dict[str, object]] = []
    for rank in range(table.num_ranks):
        found.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        found.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        found.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": 0, "args": {"name": "ops"}})
    for op, start in sorted(timeline.starts.items(), key=lambda item: (item[1], item[0])):
        found.append(
            {
                "ph": "X",
                "name": str(op),
                "cat": KINDS[op.kind],
                "pid": table.placement[op.stage],
                "tid": 0,
                "ts": float(start * _UNIT),
                "dur": float((timeline.ends[op] - start) * _UNIT),
                "args": {"stage": op.stage, "chunk": chunk_of(op, table), "micro_batch": op.micro_batch},
            }
        )
    counter, unit = ("micro-batches kept", "micro-batches") if timeline.memory is None else ("memory kept", "bytes")
    for rank, steps in enumerate(timeline.held):
        for time, amount in steps:
            counts = {unit: float(amount)}
            found.append({"ph": "C", "name": counter, "pid": rank, "tid": 0, "ts": float(time * _UNIT), "args": counts})
    return found
