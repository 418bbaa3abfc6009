"""Steps that were not finite are told some calls later, without waiting for a step."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.errors import NonFiniteError
from jaxpipe.monitor.watch import StepInfo, Watch


class Pending:
    """A flag of a step that is still running."""

    def is_ready(self):
        return False

    def __bool__(self):
        raise AssertionError("the host waited for the device")


def info(loss, norm, finite=None):
    return StepInfo(jnp.float32(loss), jnp.float32(norm), finite if finite is not None else jnp.isfinite(loss + norm))


def done(step):
    return jax.block_until_ready(step)


def test_finite_steps_and_steps_that_run_say_nothing():
    watch = Watch()
    watch.add(1, done(info(1.0, 2.0)))
    watch.add(2, info(1.0, float("nan"), Pending()))
    for _ in range(3):
        watch.raise_if_not_finite()


@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [
        (float("nan"), 1.0, "Step 7 had the loss nan. It did not change the state"),
        (float("inf"), float("inf"), "Step 7 had the loss inf"),
        (2.5, float("inf"), r"Step 7 had the gradient norm inf \(loss 2.5\)"),
    ],
)
def test_the_call_and_what_was_not_finite_are_named_once(loss, norm, what):
    watch = Watch()
    watch.add(6, done(info(1.0, 1.0)))
    watch.add(7, done(info(loss, norm)))
    with pytest.raises(NonFiniteError, match=what):
        watch.raise_if_not_finite()
    watch.raise_if_not_finite()


def test_forgotten_steps_are_not_told():
    watch = Watch()
    watch.add(1, done(info(float("nan"), 1.0)))
    watch.clear()
    watch.raise_if_not_finite()


def test_several_processes_look_at_the_same_steps(monkeypatch):
    """Two calls later, ready or not: what is ready on one process need not be on another."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    watch = Watch()
    watch.add(1, done(info(float("nan"), 1.0)))
    watch.raise_if_not_finite()
    watch.add(2, info(1.0, 1.0))
    watch.raise_if_not_finite()
    watch.add(3, info(1.0, 1.0))
    with pytest.raises(NonFiniteError, match="Step 1 had the loss nan"):
        watch.raise_if_not_finite()
