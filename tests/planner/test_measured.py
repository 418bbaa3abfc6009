"""Layers that are timed here, and what is said where there is no compiler for TPU."""

import pytest

from jaxpipe.errors import ConfigError, HardwareError
from jaxpipe.hardware import topology
from jaxpipe.hardware.chips import CHIPS, as_chip
from jaxpipe.planner.cost import Costs
from jaxpipe.planner.measured import Timed, mesh_of
from tests.planner.gpts import model


def test_each_distinct_layer_is_timed_once_in_each_mode(monkeypatch):
    found = model(blocks=3)
    clock = Timed(found)
    seen = []
    monkeypatch.setattr(Timed, "_time", lambda self, jaxpr: seen.append(jaxpr) or 1.0)
    costs = Costs(found, as_chip("a100"), clock)
    assert len(seen) == 2 * (3 * 3 + 1) and costs.measured[1, "dots"] == (1.0, 1.0)


def test_a_layer_runs():
    found = model(blocks=1)
    forward, backward = Timed(found).measure(found.layers[1, "dots"].small)
    assert forward > 0 and backward > 0
    assert Timed(found).measure(found.loss.small).forward == 0  # all of the loss is backward


def test_no_tpu_compiler(monkeypatch):
    with pytest.raises(ConfigError, match='measure="tpu" asks the TPU compiler, and a100 is none'):
        mesh_of("tpu", CHIPS["a100"], {})
    monkeypatch.setattr(topology, "_installed", lambda module: False)
    with pytest.raises(HardwareError, match="libtpu, which is not installed"):
        mesh_of("tpu", CHIPS["v5e"], {})
    assert mesh_of("time", CHIPS["v5e"], {"model": 1}).shape == {"pipe": 1, "data": 1, "model": 1}
