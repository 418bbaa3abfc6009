"""The rule of a dynamic loss scale, against one that is written out in Python, and what is no loss scale."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpipe
from jaxpipe.errors import ConfigError
from jaxpipe.training import loss_scale
from jaxpipe.training.loss_scale import as_loss_scale, dynamic, first_scale


class Plain:
    """The same in DeepSpeed's way: iterations are counted, and the last overflow is remembered by its number."""

    def __init__(self, rule):
        self.rule, self.scale, self.left = rule, rule.initial, rule.hysteresis
        self.iteration, self.last = 0, -1

    def step(self, finite):
        if not finite:
            if self.left == 1:
                self.scale = max(self.scale / 2, self.rule.minimum)
            else:
                self.left -= 1
            self.last = self.iteration
        elif (self.iteration - self.last) % self.rule.window == 0:
            self.scale, self.left = self.scale * 2, self.rule.hysteresis
        self.iteration += 1


AFTER = jax.jit(
    lambda rule_window, rule_minimum, rule_hysteresis, state, finite: loss_scale.DynamicScale.after(
        _Rule(rule_window, rule_minimum, rule_hysteresis), state, finite
    )
)


class _Rule:
    """The numbers of a rule as arrays, so that one compiled function serves all examples."""

    def __init__(self, window, minimum, hysteresis):
        self.window, self.minimum, self.hysteresis = window, minimum, hysteresis


@settings(max_examples=60)
@given(
    steps=st.lists(st.integers(0, 3), max_size=60),
    window=st.integers(1, 4),
    hysteresis=st.integers(1, 3),
    initial=st.sampled_from([1.0, 2.0, 64.0]),
)
def test_it_follows_the_rule(steps, window, hysteresis, initial):
    rule = jaxpipe.DynamicScale(initial, window, 0.5, hysteresis)
    plain, state = Plain(rule), rule.start()
    for step in steps:
        finite = step > 0
        plain.step(finite)
        state = AFTER(jnp.int32(window), jnp.float32(0.5), jnp.int32(hysteresis), state, jnp.bool_(finite))
        assert float(state.scale) == plain.scale
    assert int(state.skipped) == steps.count(0)


def test_a_window_of_three():
    rule = jaxpipe.DynamicScale(initial=8.0, window=3)
    state, found = rule.start(), []
    for finite in [True, True, True, True, False, True, True, True, False, False, False, False, False, False]:
        found.append(float(state.scale))
        state = rule.after(state, jnp.bool_(finite))
    assert found == [8, 8, 8, 16, 16, 8, 8, 8, 16, 8, 4, 2, 1, 1]
    assert float(state.scale) == 1.0 and int(state.skipped) == 7
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_it_goes_on_from_what_another_rule_has_left():
    """A checkpoint may hold more good steps than the window of the run that loads it, and a scale below its minimum."""
    state = replace(jaxpipe.DynamicScale(initial=4.0).start(), good=jnp.int32(1500))
    shorter = jaxpipe.DynamicScale(initial=64.0, window=500, minimum=16.0)
    assert float(shorter.after(state, jnp.bool_(True)).scale) == 8.0
    assert float(shorter.after(state, jnp.bool_(False)).scale) == 4.0


def test_it_never_leaves_what_float32_holds():
    rule = jaxpipe.DynamicScale(initial=2.0**127, window=1)
    assert float(rule.after(rule.start(), jnp.bool_(True)).scale) == 2.0**127


def test_what_is_a_loss_scale():
    rule = jaxpipe.DynamicScale(window=5)
    assert as_loss_scale(None) is None and as_loss_scale("dynamic") == "dynamic" and as_loss_scale(rule) is rule
    assert [as_loss_scale(number) for number in (128, np.float16(0.5), jnp.int32(4))] == [128.0, 0.5, 4.0]
    assert dynamic("dynamic") == jaxpipe.DynamicScale() == jaxpipe.DynamicScale(65536.0, 2000, 1.0, 1)
    assert dynamic(rule) is rule and dynamic(None) is None and dynamic(4.0) is None
    assert [first_scale(value) for value in (None, 4.0, "dynamic", rule)] == [None, 4.0, 65536.0, 65536.0]
    assert jaxpipe.DynamicScale(np.int32(4), np.int64(3)) == jaxpipe.DynamicScale(4.0, 3)
    assert loss_scale.describe(1024.0) == "1024"
    assert loss_scale.describe("dynamic") == "dynamic (initial 65536, window 2000, minimum 1, hysteresis 1)"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "must be a number above 0 that float32 holds.*'dynamic' finds"),
        (-1.0, "must be a number above 0"),
        (1e39, "float32 holds"),
        (1e-40, "float32 holds"),
        (float("inf"), "must be None, a number above 0, 'dynamic', or a jaxpipe.DynamicScale"),
        (float("nan"), "must be None, a number above 0"),
        (True, "must be None, a number above 0"),
        ("1024", "must be None, a number above 0"),
        ("dynamics", "Did you mean 'dynamic'"),
        (jaxpipe.DynamicScale, "DynamicScale"),
    ],
)
def test_what_is_none(value, message):
    with pytest.raises(ConfigError, match=f"loss_scale=.*{message}"):
        as_loss_scale(value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial": 0}, "DynamicScale: initial=0 must be a number above 0"),
        ({"minimum": -1}, "DynamicScale: minimum=-1"),
        ({"initial": 1.0, "minimum": 2.0}, "initial=1.0 is below minimum=2.0"),
        ({"window": 0}, "DynamicScale: window=0 must be an integer, 1 or more"),
        ({"hysteresis": 1.5}, "DynamicScale: hysteresis=1.5 must be an integer"),
    ],
)
def test_wrong_numbers(fields, message):
    with pytest.raises(ConfigError, match=message):
        jaxpipe.DynamicScale(**fields)
