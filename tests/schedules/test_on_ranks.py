"""How many stages a schedule has on so many ranks, and which number of chunks it takes."""

import pytest

from jaxpipe import schedules
from jaxpipe.errors import ConfigError, ScheduleError
from jaxpipe.schedules.on_ranks import check_num_chunks, get_on_ranks
from tests.lowering.programs import in_random_order, loop_of

TABLE = in_random_order(loop_of(2, 3), 4, 0)


def test_one_stage_per_rank_without_a_word():
    assert get_on_ranks("gpipe", 3, 4) == schedules.gpipe(3, 4)
    assert get_on_ranks("zbv", 3, 4) == get_on_ranks("zbv", 3, 4, 2) == schedules.zbv(6, 4)
    assert get_on_ranks("interleaved", 3, 4, 2) == schedules.interleaved(6, 4, num_chunks=2)
    assert get_on_ranks("looped_bfs", 3, 4) == schedules.looped_bfs(3, 4, num_chunks=1)
    assert check_num_chunks("zbv", 1) == check_num_chunks("1f1b", 1) == check_num_chunks(TABLE, 1) == 1


@pytest.mark.parametrize("given", [1, 3])
def test_a_table_brings_its_own(given, tmp_path):
    assert get_on_ranks(TABLE, 2, 4, given) == TABLE
    path = tmp_path / "table.csv"
    path.write_text(TABLE.to_csv())
    assert get_on_ranks(path, 2, 4, given) == TABLE


@pytest.mark.parametrize(
    ("schedule", "chunks", "message"),
    [
        ("1f1b", 2, "num_chunks=2 with schedule='1f1b', which has 1 stage per rank.* 'interleaved'"),
        ("zbv", 3, "num_chunks=3 with schedule='zbv', which has 2 stages per rank"),
        (TABLE, 2, "a table brings its own number of chunks, 3. Leave num_chunks out"),
        ("interleaved", 0, "num_chunks=0"),
        ("interleaved", 2.5, "num_chunks=2.5"),
    ],
)
def test_refused(schedule, chunks, message):
    with pytest.raises(ConfigError, match=message):
        check_num_chunks(schedule, chunks)
    with pytest.raises(ConfigError, match=message):
        get_on_ranks(schedule, 2, 4, chunks)


def test_tables_for_other_ranks(tmp_path):
    with pytest.raises(ScheduleError, match="table of 2 ranks and 6 stages, but the mesh has 6 ranks"):
        get_on_ranks(TABLE, 6, 4)
    path = tmp_path / "table.csv"
    path.write_text(TABLE.to_csv())
    with pytest.raises(ConfigError, match="brings its own number of chunks, 3"):
        get_on_ranks(path, 2, 4, 2)
    with pytest.raises(ScheduleError, match="6 stages and 4 micro-batches, but 6 stages and 5 micro-batches"):
        get_on_ranks(TABLE, 2, 5)
    with pytest.raises(ScheduleError, match="must be a name"):
        get_on_ranks(3, 2, 5)
