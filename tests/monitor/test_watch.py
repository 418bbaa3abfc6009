"""Steps that were not finite are told some calls later, without waiting for a step."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.errors import NonFiniteError
from jaxpipe.monitor.watch import PATIENCE, StepInfo, Watch


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
        watch.raise_late()


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
        watch.raise_late()
    watch.raise_late()


def test_overflows_under_a_dynamic_scale_are_an_error_only_if_many_in_a_row_are_at_the_floor():
    watch = Watch()

    def overflow(call, floor):
        watch.add(call, done(info(2.0, float("inf"))._replace(loss_scale=jnp.float32(1), at_floor=jnp.bool_(floor))))
        watch.raise_late()

    for call in range(2 * PATIENCE):
        overflow(call, False)
    for call in range(PATIENCE - 1):
        overflow(call, True)
    watch.add(0, done(info(1.0, 1.0)))
    for call in range(PATIENCE - 1):
        overflow(call, True)
    with pytest.raises(NonFiniteError, match=rf"The {PATIENCE} steps up to step 99 .* scale, 1; .*gradient norm inf"):
        overflow(99, True)
    overflow(100, True)  # training may go on


def test_forgotten_steps_are_not_told():
    watch = Watch()
    watch.add(1, done(info(float("nan"), 1.0)))
    watch.clear()
    watch.raise_late()


def test_several_processes_look_at_the_same_steps(monkeypatch):
    """Two calls later, ready or not: what is ready on one process need not be on another."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    watch = Watch()
    watch.add(1, done(info(float("nan"), 1.0)))
    watch.raise_late()
    watch.add(2, info(1.0, 1.0))
    watch.raise_late()
    watch.add(3, info(1.0, 1.0))
    with pytest.raises(NonFiniteError, match="Step 1 had the loss nan"):
        watch.raise_late()
