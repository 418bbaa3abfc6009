"""The Chrome trace: every op, on the process of its rank, and the memory as a counter."""

import json

from jaxpipe.schedules import draw, interleaved, one_f_one_b, simulate, zero_bubble
from jaxpipe.schedules.trace import events


def of(phase, found):
    return [event for event in found if event["ph"] == phase]


def test_ops(tmp_path):
    timeline = simulate(one_f_one_b(3, 4))
    draw(timeline, tmp_path / "trace.json")
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {(event["name"], event["pid"], event["ts"], event["dur"]) for event in of("X", found)} == {
        (str(op), op.stage, start * 1000, (timeline.ends[op] - start) * 1000) for op, start in timeline.starts.items()
    }
    assert len(of("X", found)) == 24 and of("X", found)[0]["args"] == {"stage": 0, "chunk": 0, "micro_batch": 0}
    names = {event["pid"]: event["args"]["name"] for event in of("M", found) if event["name"] == "process_name"}
    assert names == {0: "rank 0", 1: "rank 1", 2: "rank 2"}


def test_chunks_are_on_the_process_of_their_rank():
    found = of("X", events(simulate(interleaved(4, 2))))
    assert {(event["args"]["stage"], event["args"]["chunk"], event["pid"]) for event in found} == {
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
    }


def test_counters_are_the_curve_of_memory():
    timeline = simulate(zero_bubble(2, 3), memory=[5e9, 7e9], pending=[1e9, 2e9])
    found = of("C", events(timeline))
    for rank in range(2):
        mine = [(event["ts"], event["args"]["bytes"]) for event in found if event["pid"] == rank]
        assert mine == [(time * 1000, amount) for time, amount in timeline.held[rank]]
        assert max(amount for _, amount in mine) == timeline.peak_bytes[rank]
    plain = of("C", events(simulate(zero_bubble(2, 3))))
    assert max(event["args"]["micro-batches"] for event in plain) == 2
