"""What the TPU and the GPU compiler make of steps. `make test-compilers` runs it; without the compilers it is skipped."""

import pytest

from tests.compilers.cases import CASES, report_of

MEGABYTE = 10**6
TICKS = ("loop", "forward", "backward", "tail")

# What does not hold yet, with what was found: {(name of the test, name of the case): reason}.
NOT_YET: dict[tuple[str, str], str] = {
    ("permutes", "gpu-model2-bfloat16"): "none: each arrives behind the ops that send it, and is read by the next ones",
    ("memory", "tpu-gpipe-bfloat16"): "1.18 of what was planned",
}


def cases(test, *, wanted=lambda name: True):
    """The names of cases, marked where a test is known to fail."""
    marked = []
    for name in filter(wanted, CASES):
        reason = NOT_YET.get((test, name))
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        marked.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("name", marked)


def is_training(name):
    return not CASES[name].evaluation


@cases("compiles")
def test_it_compiles_and_fits(name):
    report, case = report_of(name), CASES[name]
    own = report.bytes_per_device
    assert own["total"] == sum(size for kind, size in own.items() if kind != "total")
    assert report.chip is not None and own["total"] < report.chip.memory
    assert report.useful_flops <= report.flops <= 4 / 3 * report.useful_flops + 1
    assert bool(report.cycles) == case.is_tpu
    if case.is_tpu:
        assert 0 < report.utilisation < 1


@cases("permutes")
def test_permutes_between_neighbours_are_asynchronous(name):
    """Under the eager schedule all of them; under the others those that nothing waits for at once."""
    permutes = [one for one in report_of(name).collectives if one.kind == "collective-permute" and one.part == "loop"]
    assert {one.axes for one in permutes} == {("pipe",)}
    beside = sum(one.count for one in permutes if one.asynchronous)
    share = beside / sum(one.count for one in permutes)
    assert share == 1 if CASES[name].config.get("schedule") == "eager_1f1b" else share >= 0.5, f"{share:.2f}"


@cases("collectives")
def test_nothing_but_permutes_and_the_model_axis_talks_in_the_ticks(name):
    ticks = [one for one in report_of(name).collectives if one.part in TICKS]
    # An evaluation whose tail all ranks share deals what enters it out, between two rounds of ticks.
    allowed = (
        ("collective-permute", "all-to-all", "reduce-scatter") if CASES[name].evaluation else ("collective-permute",)
    )
    assert all(one.axes == ("model",) or one.kind in allowed for one in ticks), ticks


@cases("copies")
def test_no_large_copy_of_weights_gradients_or_saved_values_in_the_ticks(name):
    large = [copy for copy in report_of(name).copies if copy.bytes > MEGABYTE and copy.what not in ("message", "other")]
    assert not large


@cases("overhead", wanted=lambda name: CASES[name].is_tpu)
def test_the_loop_costs_at_most_a_hundredth_of_its_work(name):
    assert report_of(name).loop_overhead <= 0.01


@cases("memory", wanted=is_training)
def test_temporary_memory_is_what_was_planned(name):
    report = report_of(name)
    own, planned = report.bytes_per_device, report.planned
    assert own["temporary"] + own["gradients"] + own["saved"] <= 1.1 * sum(planned.values())


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_zero_stage_1_stores_a_part_of_the_state(kind):
    plain, cut = (report_of(f"{kind}-{name}-bfloat16").bytes_per_device for name in ("1f1b", "zero1"))
    assert cut["weights"] + cut["optimizer"] <= 0.51 * (plain["weights"] + plain["optimizer"])
    gathers = [c for c in report_of(f"{kind}-zero1-bfloat16").collectives if "data" in c.axes]
    assert gathers and all(one.part == "outside" for one in gathers)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_the_model_axis_cuts_weights_and_work(kind):
    plain, cut = report_of(f"{kind}-1f1b-bfloat16"), report_of(f"{kind}-model2-bfloat16")
    # Half as many ranks hold twice as many blocks each, cut in two.
    assert cut.bytes_per_device["weights"] < 1.6 * plain.bytes_per_device["weights"]
    assert cut.flops == pytest.approx(plain.flops, rel=0.1)
    sums = [one for one in cut.collectives if one.axes == ("model",) and one.part in ("forward", "backward")]
    assert {one.kind for one in sums} == {"all-reduce"}
