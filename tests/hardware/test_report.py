"""What reports derive from their numbers, and how they look."""

import dataclasses

import pytest

from jaxpipe.hardware.chips import CHIPS
from jaxpipe.hardware.collectives import Collective
from jaxpipe.hardware.copies import Copy
from jaxpipe.hardware.report import OpCost, Report
from jaxpipe.hardware.structure import Op

V5E = CHIPS["v5e"]
REPORT = Report(
    mesh={"pipe": 2, "data": 4},
    device="TPU v5 lite",
    chip=V5E,
    evaluation=False,
    bytes_per_device={
        "weights": 1_000,
        "optimizer": 2_000,
        "gradients": 0,
        "saved": 0,
        "temporary": 500,
        "total": 3_500,
    },
    planned={"gradients": 0},
    flops=4e12,
    useful_flops=3e12,
    collectives=[Collective("collective-permute", 8_388_608, 38, True, "loop over pipe")],
    cycles={"forward": 1, "backward": 2, "tail": 0, "loop": 30_000_000, "optimizer": 4},
    ops=[OpCost(Op("F", 1), (1, 2), 5_000_000, 0, 1_234, 0)],
    copies=[Copy("weights", "bf16[4,4]", 32 + n, 7, 99, "loop") for n in range(14)],
    times={"forward": 0.01, "backward": 0.02, "tail": 0.0, "loop": 0.0, "waiting": 0.02},
    ticks=38,
    text="HloModule",
)


def test_derived():
    assert REPORT.step_seconds == pytest.approx(0.05)
    assert REPORT.utilisation == pytest.approx(3e12 / (0.05 * 197e12))
    assert REPORT.loop_overhead == pytest.approx(30_000_000 / (0.03 * V5E.clock))


def test_text():
    lines = str(REPORT).splitlines()
    assert lines[0] == "a training step on TPU v5 lite, pipe 2 x data 4, 38 ticks"
    assert "total              3.50 kB" in lines
    assert "collective-permute     8.39 MB     38  with work beside  loop over pipe" in lines
    assert "FLOPs of a device: 4.00 T, of which 1.00 T are computed a second time" in lines
    assert any(line.startswith("2 smaller ones") for line in lines)
    assert lines[-1] == "utilisation 30.5 %, at 1,503 MHz and 197 TFLOP/s of v5e"
    assert "HloModule" not in repr(REPORT)


def test_without_cycles():
    gpu = dataclasses.replace(
        REPORT, chip=CHIPS["h100"], times={}, cycles={}, copies=[], collectives=[], evaluation=True
    )
    assert gpu.step_seconds is None and gpu.utilisation is None and gpu.loop_overhead is None
    lines = str(gpu).splitlines()
    assert lines[0].startswith("an evaluation on") and lines[-1].endswith("the products alone take 3.03 ms")
    assert "none" in "\n".join(lines)
    assert "peak" not in str(dataclasses.replace(gpu, chip=None))
