"""`jaxpipe.plan`: what is asked for, what comes out, and that it runs."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError, DataError, HardwareError, LayerError
from jaxpipe.hardware import topology
from jaxpipe.planner.measured import Measured, Timed
from tests.planner.gpts import CUT, gpt

SIZES = {"blocks": 5, "width": 64, "heads": 4, "length": 32, "vocabulary": 128}
CHIP = {"peak_flops": 1e12, "memory": 2.8e6, "bandwidth": 1e11, "link": 5e9}
FAST = CHIP | {"link": 1e12}


def test_the_code_that_is_printed_runs():
    """It trains a step: the mesh, the config, the cut and the rows all fit each other."""
    module, example = gpt(**SIZES)
    found = jaxpipe.plan(module, example, chips=4, chip=CHIP, global_batch=8)
    row = found.best
    assert row is not None and row.mesh_shape["pipe"] > 1 and row.bytes_per_chip <= CHIP["memory"]
    rows = row.rows * row.mesh_shape["data"]
    assert rows * row.config.num_micro_batches == 8
    module, example = gpt(rows=rows, **SIZES)
    names = {"jaxpipe": jaxpipe, "module": module, "optimizer": optax.adam(1e-3), "example": example}
    exec(row.code(), names)
    engine = names["engine"]
    assert engine.partition == row.partition
    ids = np.arange(rows * 32, dtype=np.int32).reshape(rows, 32) % 128
    assert jnp.isfinite(engine.train_batch(iter([(ids, ids)] * row.config.num_micro_batches)))


def test_the_rows_of_the_example_do_not_matter():
    plans = [jaxpipe.plan(*gpt(rows=rows, **SIZES), chips=4, chip=CHIP, global_batch=8) for rows in (1, 3)]
    assert [row.mesh_shape for row in plans[0].rows] == [row.mesh_shape for row in plans[1].rows]
    assert plans[0].best.step_seconds == pytest.approx(plans[1].best.step_seconds, rel=1e-6)


def test_rows_are_ranked_and_said_apart():
    found = jaxpipe.plan(*gpt(**SIZES, sharding=CUT), chips=4, chip=FAST, global_batch=8)
    fitting = [row for row in found.rows if row.fits]
    assert [row.step_seconds for row in fitting] == sorted(row.step_seconds for row in fitting)
    assert found.rows[: len(fitting)] == fitting and all(row.chips <= 4 for row in found.rows)
    assert any(row.mesh_shape.get("model") == 2 for row in found.rows)
    assert all(0 < row.utilisation < 1 and 0 <= row.bubble < 1 for row in found.rows)
    assert str(found) == str(jaxpipe.plan(*gpt(**SIZES, sharding=CUT), chips=4, chip=FAST, global_batch=8))


def test_nothing_fits():
    found = jaxpipe.plan(*gpt(**SIZES), chips=1, chip=CHIP, global_batch=8, memory=2.0e6)
    assert found.best is None and found.smallest is not None and found.smallest.fits
    assert f"it needs at least {found.smallest.chips} chips" in str(found)
    assert 'has no rules for an axis "model"' in str(found)


def test_time_is_measured_here(monkeypatch):
    monkeypatch.setattr(Timed, "measure", lambda self, traced: Measured(1.0, 2.0))  # test_measured.py runs it
    found = jaxpipe.plan(*gpt(blocks=2), chips=1, chip=CHIP, global_batch=1, measure="time")
    assert found.best is not None and "layers timed on cpu" in str(found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chip": "v7x"}, ConfigError, "Known chips: v4, v5e, v5p, v6e, a100, h100, h200"),
        ({"chip": {"peak_flops": 1.0}}, ConfigError, "exactly the keys 'peak_flops', 'memory', 'bandwidth', 'link'"),
        ({"chip": CHIP | {"link": 0}}, ConfigError, r"chip\['link'\]=0 must be a finite number above 0"),
        ({"chips": 0}, ConfigError, "chips=0 must be an integer, 1 or more"),
        ({"global_batch": 1.5}, ConfigError, "global_batch=1.5 must be an integer"),
        ({"memory": -1}, ConfigError, "memory=-1 must be a finite number above 0"),
        ({"measure": "guess"}, ConfigError, "measure='guess' must be None"),
        ({"example": 3}, ConfigError, "it is a pair"),
        ({"example": (None, None)}, DataError, "holds no inputs"),
        ({"module": [jnp.tanh]}, LayerError, "expected a jaxpipe.PipelineModule"),
    ],
)
def test_mistakes(options, error, message):
    module, example = gpt()
    arguments = {"module": module, "example": example, "chips": 1, "global_batch": 2} | options
    with pytest.raises(error, match=message):
        jaxpipe.plan(**arguments)


def test_the_tpu_compiler_is_missing(monkeypatch):
    monkeypatch.setattr(topology, "_installed", lambda module: False)
    with pytest.raises(HardwareError, match="libtpu"):
        jaxpipe.plan(*gpt(), chips=1, chip="V5E", global_batch=2, measure="tpu")
