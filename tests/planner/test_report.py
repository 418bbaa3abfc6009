"""The text of a plan."""

from dataclasses import replace

import pytest

from jaxpipe.hardware.chips import CHIPS
from jaxpipe.planner.report import Plan, Row
from jaxpipe.training.config import Config

SECONDS = {"compute": 0.6, "memory": 0.2, "link": 0.1, "optimizer": 0.0, "bubble": 0.1}
BEST = Row(
    config=Config(num_micro_batches=16, remat="dots", compute_dtype="bfloat16", zero_stage=1),
    mesh_shape={"pipe": 4, "data": 2, "model": 2},
    rows=2,
    partition=(0, 3, 5, 7, 10),
    step_seconds=1.0,
    utilisation=0.55,
    bubble=0.09,
    bytes_per_chip=40 * 10**9,
    bytes={"weights": 10 * 10**9, "saved": 30 * 10**9, "pending": 0},
    seconds=SECONDS,
    fits=True,
)
SLOWER = replace(BEST, step_seconds=1.2, seconds=SECONDS | {"bubble": 0.3}, config=Config(schedule="gpipe"))
LARGER = replace(BEST, step_seconds=0.9, fits=False, bytes_per_chip=90 * 10**9)


def test_a_table_with_reasons():
    plan = Plan(
        [BEST, SLOWER, LARGER], replace(BEST, mesh_shape={"pipe": 4, "data": 1}), CHIPS["a100"], 16, 64, "guessing"
    )
    lines = str(plan).splitlines()
    assert plan.best is BEST and BEST.limit == "compute" and BEST.chips == 16
    assert lines[0] == "16 chips of a100, 80.0 GB each, a global batch of 64 rows; seconds by guessing"
    head, first, second, third = (line.split() for line in lines[2:6])
    assert head[:2] == ["mesh", "schedule"]
    assert first[-1] == "best" and "55.0" in first and "40.0" in first
    assert " ".join(second[-4:]) == "+20 %: larger bubble"
    assert " ".join(third[-4:]) == "10.0 GB too much"
    assert "the best: compute 60 %, memory 20 %, link 10 %, optimizer 0 %, bubble 10 %" in lines
    assert "on a chip: weights 10.0 GB, saved 30.0 GB" in lines
    assert "it would fit on 4 chips: pipe 4 x data 1" in lines
    assert lines[-4:] == [
        "mesh = jaxpipe.make_mesh(pipe=4, data=2, model=2)",
        "config = jaxpipe.Config(num_micro_batches=16, remat='dots', compute_dtype='bfloat16', zero_stage=1)",
        "module.partition_method = [0, 3, 5, 7, 10]",
        "engine = jaxpipe.initialize(module, optimizer, mesh=mesh, example=example, config=config)",
    ]


@pytest.mark.parametrize(
    ("smallest", "said"),
    [
        (LARGER, "it needs at least 16 chips: pipe 4 x data 2 x model 2, remat='dots'."),
        (None, "no number of chips was found that would do."),
    ],
)
def test_nothing_fits(smallest, said):
    plan = Plan([LARGER], smallest, CHIPS["a100"], 1, 64, "guessing", ("Smaller layers would help.",))
    assert plan.best is None
    text = str(plan)
    assert f"nothing fits into 80.0 GB on 1 chip; {said}\nSmaller layers would help.\n" in text
    assert "jaxpipe.make_mesh" not in text
