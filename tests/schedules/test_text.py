"""CSV: round trips, the files other frameworks write, and messages that point at the cell."""

import pytest
from hypothesis import given

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Schedule, simulate
from tests.schedules.tables import examples, tables

# Orders only, as torch.distributed.pipelining writes them: rows of different length, nothing aligned, idle where it
# happens to be. The interleaved zero-bubble table has two ranks, two chunks, four micro-batches.
ONE_F_ONE_B = "0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3\n1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3"
INTERLEAVED_ZERO_BUBBLE = """\
0F0,0F1,2F0,,2F1,2I0,2W0,0F2,2I1,2W1,0F3,0I0,0W0,2F2,0I1,0W1,2F3,2I2,2W2,2I3,2W3,0I2,0W2,0I3,0W3
,1F0,1F1,3F0,3I0,3F1,3I1,3W0,1F2,1I0,3W1,1F3,1I1,1W0,3F2,3I2,1W1,3F3,3I3,3W2,1I2,3W3,1I3,1W2,1W3
"""


@examples
@given(tables())
def test_round_trip(table):
    schedule = Schedule(*table)
    assert Schedule.from_csv(schedule.to_csv()) == schedule


def test_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b'\xef\xbb\xbf"0F0", 0F1,,0B0,0B1\r\n,1F0,1F1,1B0,1B1,\r\n\r\n')  # as a spreadsheet may save it
    schedule = Schedule.from_csv(path)
    assert schedule == Schedule.from_csv(str(path))
    assert schedule.placement == (0, 1) and schedule.num_micro_batches == 2
    single = tmp_path / "single.csv"
    single.write_text("0F0")
    assert Schedule.from_csv(single) == Schedule.from_csv("0F0")


def test_unaligned_rows_are_retimed():
    schedule = Schedule.from_csv(ONE_F_ONE_B)
    assert str(schedule) == "rank 0 | F0 F1 .. B0 F2 B1 F3 B2 .. B3\nrank 1 | .. F0 B0 F1 B1 F2 B2 F3 B3 .."
    assert [tuple(op for op in row if op) for row in schedule.ticks] == [*schedule.rows]


def test_interleaved_zero_bubble_table():
    schedule = Schedule.from_csv(INTERLEAVED_ZERO_BUBBLE)
    assert schedule.placement == (0, 1, 0, 1) and schedule.split_backward and schedule.num_chunks == 2
    assert [len(row) for row in schedule.rows] == [25, 25]
    p, v, forward, backward_input, backward_weight = 2, 2, 3, 3, 3
    timeline = simulate(schedule, forward, backward_input, backward_weight)
    assert timeline.bubble * v == (p - 1) * (forward + backward_input - backward_weight)
    assert max(timeline.peak_live) == p
    assert simulate(schedule, sync="global").makespan == simulate(schedule).makespan, "equal F, I, W: barriers are free"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the CSV is empty"),
        ("0F0,0f1", "row 0, column 1: '0f1' is not an op; write .* such as 0F3"),
        ("0F0\n1F0,,nan", "row 1, column 2: 'nan' is not an op"),
        ("0F0,0UNSHARD,0SEND_G0\n1F0", "row 0, column 2: '0SEND_G0' is not an op"),
        ("0F0,0SEND_F", "row 0, column 1: '0SEND_F' is not an op"),
        ("0F0,SEND_F0", "row 0, column 1: 'SEND_F0' is not an op"),
        ("0F0,0REDUCE_GRADS", "row 0, column 1: '0REDUCE_GRADS' is not an op"),
        ("0F0,(0F1;0B0)", r"row 0, column 1: '\(0F1;0B0\)' is not an overlapped pair; write \(0F3;3B1\)OVERLAP_F_B"),
        (
            "0F0,(0F1;0F2)OVERLAP_F_B",
            "row 0, column 1: .* overlaps 0F1 and 0F2; a pair is one forward and one backward",
        ),
        ("0F0,(0F1)OVERLAP_F_B", "row 0, column 1: .* a pair is one forward"),
        ("0F0,()OVERLAP_F_B", "row 0, column 1: '' is not an op"),
        ("0F0,(0F1;0SEND_F1)OVERLAP_F_B", "row 0, column 1: '0SEND_F1' is not an op"),
        ("0F0,(0F1;0B0;0W0)OVERLAP_F_B", "row 0, column 1: .* a pair is one forward"),
        ("(0F1;0B0)OVERLAP_F_B,0UNSHARD,0F1", "row 0, column 2: 0F1 occurs twice, here and in row 0, column 0"),
        ("0F0,0SEND_F0,0F1\n0RECV_F0,0RECV_F1,(1F0;0B1)OVERLAP_F_B", "row 1, column 2: 0B1 puts stage 0 on rank 1"),
        ("0F0,0F" + "9" * 5000, "row 0, column 1: .*is not an op"),
        ("0F0,0SEND_F0,1F0,0B0,1B0\n", "deadlock: rank 0 is at 0B0 and waits for 1B0"),
        ("0UNSHARD,0RESHARD\n", "with 1 rows and 0 stages is empty"),
        ("0F0\n0F1", "row 1, column 0: 0F1 puts stage 0 on rank 1, but row 0 has ops of stage 0 too"),
        ("0F0\n2F0", r"no row has an op of stage 1, but there are 2 stages: \[0, 2\]"),
        ("0F0\n\n1F0", "rank 1 holds no stage"),
    ],
)
def test_errors_point_at_the_cell(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_csv(text)


def test_errors_of_a_file_name_it(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("0F0,0B0\n1F0\n")
    with pytest.raises(ScheduleError, match=r"bad\.csv: the backward of stage 1 .* the table holds none of its ops"):
        Schedule.from_csv(path)
    with pytest.raises(ScheduleError, match=r"cannot read the schedule file .*missing\.csv': No such file"):
        Schedule.from_csv(str(tmp_path / "missing.csv"))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes("0F0,0B0\n".encode("utf-16"))
    for name in (path, str(path)):
        with pytest.raises(ScheduleError, match=r"bad\.csv': it is no UTF-8 text"):
            Schedule.from_csv(name)
    with pytest.raises(ScheduleError, match="Is a directory"):
        Schedule.from_csv(tmp_path)
    with pytest.raises(ScheduleError, match="cannot read the schedule file"):
        Schedule.from_csv("a\0b.csv")
    for value in (None, 5, b"0F0", ["0F0"], Schedule.from_csv("0F0")):
        with pytest.raises(ScheduleError, match=r"Schedule\.from_csv\(.*expected the text of a table, or the path"):
            Schedule.from_csv(value)
