"""Chips by the names that JAX gives to devices."""

import pytest

from jaxpipe.hardware.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_names_of_devices(kind, name):
    found = chip_of(kind)
    assert found is not None and found.name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v99", "NVIDIA GeForce", "v4"])
def test_unknown(kind):
    assert chip_of(kind) is None


def test_clocks():
    """Those that are printed somewhere: 1,050 MHz for v4, 1,500 for v5e, 1,750 for v5p."""
    clocks = {name: round(chip.clock / 1e6) for name, chip in CHIPS.items() if chip.clock is not None}
    assert clocks == {"v4": 1049, "v5e": 1503, "v5p": 1751, "v6e": 1751}
