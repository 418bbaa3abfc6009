"""Who prints, as several processes would see it."""

import io

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxpipe
from jaxpipe.processes.first import is_first
from jaxpipe.processes.group import _group, _group_of
from tests.devices import cpus


@pytest.fixture
def process(monkeypatch):
    """`process(1)` makes this one process 1 of several."""

    def become(number):
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(jax, "process_index", lambda: number)
        forget()  # groups know which process this is

    def forget():
        _group.cache_clear()
        _group_of.cache_clear()

    yield become
    forget()


def mesh_of(process):
    devices = [device for device in cpus(1, 1) if device.process_index == process]
    return Mesh(np.asarray(devices, dtype=object).reshape(1, 1), ("pipe", "data"), axis_types=(AxisType.Auto,) * 2)


def test_one_process_prints_and_looks_for_no_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_index", None)
    assert is_first()


@pytest.mark.parametrize("number", [0, 1])
def test_the_first_process_prints_and_the_first_of_a_mesh(number, process):
    process(number)
    assert is_first() == (number == 0)
    assert is_first(mesh_of(number)), "the other process has no part of the mesh"
    assert not is_first(mesh_of(1 - number))


def test_others_show_no_progress_and_give_no_warning(process):
    process(1)
    out = io.StringIO()
    with jaxpipe.Progress(1, stream=out) as bar:
        bar.update(1.0)
        bar.note("text")
    assert bar.finished == 1 and not out.getvalue()
    with jaxpipe.Progress(1, stream=out, mesh=mesh_of(1)) as bar:
        bar.update(1.0)
    assert "step 1/1" in out.getvalue()
    settings = {"gradient_accumulation_steps": 2, "wall_clock_breakdown": True}
    jaxpipe.Config.from_deepspeed(settings)
    process(0)
    with pytest.warns(UserWarning, match="wall_clock_breakdown"):
        jaxpipe.Config.from_deepspeed(settings)
