"""What the command line makes of its arguments; how it is called, tests/test_cli.py says."""

import json
from fractions import Fraction

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import interleaved, registry, simulate, zbv
from jaxpipe.schedules.command import Command, read_cost, read_costs

PLAIN = {
    "schedule": "zbv",
    "stages": 4,
    "micro_batches": 3,
    "chunks": 1,
    "forward": Fraction(1),
    "backward_input": Fraction(1),
    "backward_weight": Fraction(1),
    "comm": Fraction(0),
    "memory": None,
    "pending": None,
}


def command(**changes):
    return Command(**{**PLAIN, **changes})


@pytest.mark.parametrize("name", sorted(registry.ALL))
def test_every_name_and_its_file(name, tmp_path):
    chunks = 2 if name in registry.CHUNKED else 1
    table = command(schedule=name, chunks=chunks).table()
    assert table == registry.find(name, 4, 3, chunks)
    (tmp_path / "table.csv").write_text(table.to_csv())
    again = command(schedule=str(tmp_path / "table.csv"), stages=None, micro_batches=None)
    assert again.table() == table and name not in again.report()


def test_costs_of_stages_and_memory():
    costs = [Fraction(stage) for stage in (1, 2, 3, 4)]
    memory = {"memory": Fraction(5), "pending": [Fraction(size) for size in (1, 1, 1, 2)]}
    (timeline,) = command(schedule="interleaved", chunks=2, forward=costs, **memory).timelines("neighbour")
    expected = simulate(interleaved(4, 3), costs, 1, 1, sync="neighbour", memory=[5, 5, 5, 5], pending=[1, 1, 1, 2])
    assert timeline == expected


def test_report():
    assert command(memory=Fraction(10**9)).report() == (
        "zbv: <Schedule 2 ranks x 2 chunks x 3 micro-batches, 19 ticks>\n"
        "sync        none  neighbour  global\n"
        "makespan     9.5        9.5     9.5\n"
        "bubble       0.5        0.5     0.5\n"
        "bubble %     5.3        5.3     5.3\n"
        "peak live   2 2  (micro-batches, rank 0 first)\n"
        "pending     0.5 1.5  (those of them between I and W)\n"
        "peak bytes  4 GB, 4 GB"
    )
    assert "pending" not in command(schedule="1f1b").report()


def test_files(tmp_path):
    trace, picture = tmp_path / "trace.json", tmp_path / "other.json"
    assert command().plot("none", None, str(trace)).makespan == simulate(zbv(4, 3)).makespan
    assert command().plot("none", str(picture), None) is None
    assert json.loads(trace.read_text()) == json.loads(picture.read_text())
    with pytest.raises(ScheduleError, match="--trace .*trace.png' must end in .json; pictures go to --output"):
        command().plot("none", None, str(tmp_path / "trace.png"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": None}, "zbv needs --stages and --micro-batches"),
        ({"stages": 10**9}, "the product may be at most 1,000,000"),
        ({"schedule": "1f1b", "chunks": 2}, "num_chunks=2 with '1f1b', which has 1 stage per rank"),
        ({"forward": [Fraction(1)] * 3}, "forward has 3 entries, but the schedule has 4 stages"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ScheduleError, match=message):
        command(**changes).report()


def test_numbers():
    assert read_cost("1.1") == Fraction(11, 10) == read_cost("11/10") and read_cost("2e9") == 2 * 10**9
    assert read_costs("1,1/3") == [1, Fraction(1, 3)] and read_costs("3") == 3
    for bad in ("fast", "", "1/0", "1e9999999", "9" * 101):
        with pytest.raises(ScheduleError, match="is not a number in range; write 2, 1.1 or 11/10"):
            read_costs(bad)
