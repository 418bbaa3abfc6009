"""Tables that torch.distributed.pipelining writes: its own dumps where torch is installed, and literal ones everywhere."""

import itertools

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Op, Schedule, one_f_one_b, simulate


def ops_of(rows):
    return [[op for op in row if op is not None] for row in rows]


# Two ranks, a stage each, with everything that torch puts beside the ops when stages are sharded. CRLF, as it writes.
COMMUNICATION = (
    "0UNSHARD,0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD,0RESHARD\r\n"
    "1UNSHARD,1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1B1,1SEND_B1,1REDUCE_GRAD,1RESHARD\r\n"
)
# Stages in a V, so that a rank can compute forward of one of its stages and backward of the other together.
OVERLAP = (
    "0F0,0F1,0F2,3F0,3I0,3W0,(0F3;3B1)OVERLAP_F_B,0B0,,3B2,3F3,3B3,0I1,0W1,0B2,0B3\n"
    "1F0,2F0,1F1,2F1,1F2,2F2,1F3,2F3,2B0,1B0,2B1,1B1,2B2,1B2,2B3,1B3\n"
)


def test_cells_of_what_happens_by_itself_are_taken_out():
    plain = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    assert Schedule.from_csv(COMMUNICATION) == Schedule.from_csv(plain)
    # As a spreadsheet writes it: quotes and spaces around cells. An idle cell stays one.
    quoted = '"0F0", 0SEND_F0 ,"","0F1",0B0,"0REDUCE_GRAD",0B1\n"1RECV_F0","1F0","1B0","1F1","1B1"'
    assert Schedule.from_csv(quoted).rows[0] == (Op("F", 0, 0), None, Op("F", 0, 1), Op("B", 0, 0), Op("B", 0, 1))
    assert ops_of(Schedule.from_csv(quoted).rows) == ops_of(Schedule.from_csv(plain).rows)


@pytest.mark.parametrize(
    "pair",
    ["(0F1;1B0)OVERLAP_F_B", "(1B0;0F1)OVERLAP_F_B", '"(0F1;1B0)OVERLAP_F_B"', "( 0F1 ; 1B0 ) OVERLAP_F_B"],
)
def test_overlapped_pairs_are_a_forward_and_a_backward(pair):
    schedule = Schedule.from_csv(f"0F0,1F0,{pair},0B0,1F1,1B1,0B1")
    assert schedule == Schedule.from_csv("0F0,1F0,0F1,1B0,0B0,1F1,1B1,0B1")
    assert Schedule.from_csv(schedule.to_csv()) == schedule and "OVERLAP" not in schedule.to_csv()


@pytest.mark.parametrize("pair", ["(0F1;1I0;1W0)", "(1W0;1I0;0F1)", "(1I0;0F1;1W0)"])
def test_a_backward_in_two_parts_in_a_pair(pair):
    assert Schedule.from_csv(f"0F0,1F0,{pair}OVERLAP_F_B,0B0,1F1,1B1,0B1") == Schedule.from_csv(
        "0F0,1F0,0F1,1I0,1W0,0B0,1F1,1B1,0B1"
    )
    single = Schedule.from_csv("0F0,1F0,(0F1;1I0)OVERLAP_F_B,1F1,(0F2;1W0)OVERLAP_F_B,1F2,1B1,1B2,0B0,0B1,0B2")
    assert [str(op) for op in single.rows[0]][2:7] == ["0F1", "1I0", "1F1", "0F2", "1W0"]


# What torch's Schedule1F1B writes for two ranks and three micro-batches: the forwards of the last rank count from 1.
FROM_ONE = "0F0,0F1,,0B0,0F2,0B1,,0B2\n,1F1,1B0,1F2,1B1,1F3,1B2,\n"


def test_a_table_that_counts_from_one_is_refused_with_the_cell():
    with pytest.raises(ScheduleError, match="row 1, column 5: 1F3 is one too many: .* of stage 1 are numbered 1 to 3"):
        Schedule.from_csv(FROM_ONE)


# ---------------------------------------------------------------------------------------------------- torch's own tables


class FakeStage:
    """As much of a stage as a schedule asks for before anything runs."""

    def __init__(self, index, num_stages, rank, size, index_to_rank):
        self.stage_index, self.num_stages, self.group_rank, self.group_size = index, num_stages, rank, size
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.stage_index_to_group_rank, self.has_backward, self.submod = index_to_rank, True, None


def dumps(name, ranks, micro_batches, tmp_path, chunks=2):
    """The text of a table without and with communication."""
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules", reason="torch is not installed")
    if not hasattr(torch_schedules, name):
        pytest.skip(f"this torch has no {name}")
    kind = getattr(torch_schedules, name)
    num_stages = ranks * chunks
    if name in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV"):
        index_to_rank = {stage: min(stage, num_stages - 1 - stage) for stage in range(num_stages)}
    else:
        index_to_rank = {stage: stage % ranks for stage in range(num_stages)}
    mine = [stage for stage, rank in index_to_rank.items() if rank == 0]
    made = kind([FakeStage(stage, num_stages, 0, ranks, index_to_rank) for stage in mine], micro_batches, loss_fn=abs)
    texts = []
    for form in ("compute_only", "compute_comms"):
        path = tmp_path / f"{form}.csv"
        if form == "compute_comms" and getattr(made, "pipeline_order_with_comms", None) is None:
            made._prepare_schedule_with_comms(made.pipeline_order)
        made._dump_csv(str(path), format=form)
        texts.append(path.read_text())
    return texts


SIZES = [(1, 2), (2, 2), (2, 4), (2, 6), (2, 8), (4, 4), (4, 8), (4, 12)]


@pytest.mark.parametrize(
    "name",
    [
        "ScheduleLoopedBFS",
        "ScheduleInterleaved1F1B",
        "ScheduleInterleavedZeroBubble",
        "ScheduleZBVZeroBubble",
        "ScheduleDualPipeV",
    ],
)
def test_dumps_of_torch(name, tmp_path):
    seen = set()
    for (ranks, micro_batches), chunks in itertools.product(SIZES, (1, 2, 3)):
        in_a_v = name in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
        if in_a_v and (chunks != 2 or micro_batches < 2 * ranks and name == "ScheduleDualPipeV"):
            continue
        plain, full = dumps(name, ranks, micro_batches, tmp_path, chunks)
        first, second = Schedule.from_csv(plain), Schedule.from_csv(full)
        for schedule in (first, second):
            assert (schedule.num_ranks, schedule.num_stages) == (ranks, ranks * chunks)
            assert schedule.num_micro_batches == micro_batches and not schedule.forward_only
            assert Schedule.from_csv(schedule.to_csv()) == schedule
            assert simulate(schedule, sync="global").makespan >= simulate(schedule).makespan
        if in_a_v:
            assert first.placement == tuple(min(s, 2 * ranks - 1 - s) for s in range(2 * ranks))
        forwards = [[op for op in row if op is not None and op.kind == "F"] for row in first.rows]
        assert forwards == [[op for op in row if op is not None and op.kind == "F"] for row in second.rows]
        text = plain + full
        seen |= {
            word for word in ("SEND_F", "RECV_F", "SEND_B", "RECV_B", "SHARD", "REDUCE_GRAD", "OVERLAP") if word in text
        }
    assert seen >= {"SEND_F", "RECV_B"} and (name != "ScheduleDualPipeV" or "OVERLAP" in seen), seen


def test_one_stage_per_rank_of_torch(tmp_path):
    """GPipe and 1F1B say their order only; the one of 1F1B is wrong, or is like ours where a later torch has mended it."""
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules", reason="torch is not installed")
    for name in ("ScheduleGPipe", "Schedule1F1B"):
        made = getattr(torch_schedules, name)(FakeStage(0, 2, 0, 2, {0: 0, 1: 1}), 4, loss_fn=abs)
        order = made._get_pipeline_order()
        if order is None:
            continue
        text = "\r\n".join(",".join("" if a is None else str(a) for a in order[rank]) for rank in sorted(order))
        if name == "Schedule1F1B" and "1F4" in text:
            with pytest.raises(ScheduleError, match="row 1, column .*: 1F4 is one too many"):
                Schedule.from_csv(text)
        else:
            assert ops_of(Schedule.from_csv(text).rows)[1][0] == one_f_one_b(2, 4).rows[1][1]
