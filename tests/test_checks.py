"""Single values: which numbers are numbers, and how a message shows anything."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.checks import (
    as_count,
    as_integer,
    as_number,
    count,
    did_you_mean,
    is_count,
    is_number,
    number_above_0,
    show,
)
from jaxpipe.errors import ConfigError


@pytest.mark.parametrize("kind", [int, np.int8, np.uint64, np.array, jnp.asarray])
def test_integers_of_any_library(kind):
    found = as_integer(kind(4)), as_count(kind(4)), as_number(kind(4)), count("n", kind(4))
    assert found == (4, 4, 4, 4) and {type(number) for number in found} == {int}
    assert is_count(kind(4)) and is_number(kind(4))


@pytest.mark.parametrize("kind", [float, np.float16, np.float64, np.array, jnp.asarray, Fraction])
def test_floats_of_any_library(kind):
    assert as_number(kind(0.5)) == 0.5 and type(as_number(kind(0.5))) is float
    assert as_integer(kind(4.0)) is None and as_count(kind(4.0)) is None and is_number(kind(0.5))


def test_what_is_no_number():
    for value in (True, False, np.bool_(True), jnp.asarray(True), "4", None, [4], np.array([4]), 1j, object()):
        assert as_integer(value) is None and as_number(value) is None, value
        assert not is_count(value) and not is_number(value)
    for value in (float("nan"), float("inf"), -np.inf, 10**400):
        assert as_number(value) is None
    assert [as_count(value) for value in (0, -1, 1)] == [None, None, 1]


def test_values_that_are_being_traced_are_no_numbers():
    seen = []
    jax.make_jaxpr(lambda n, x: seen.append((as_integer(n), as_number(x))) or n)(1, 0.5)
    assert seen == [(None, None)]


def test_settings():
    assert number_above_0("x", np.float32(0.5), ".") == 0.5
    with pytest.raises(ConfigError, match=r"^n=0 must be an integer, 1 or more. Use None.$"):
        count("n", 0, " Use None.")
    for value in (0, -1, float("nan"), "1"):
        with pytest.raises(ConfigError, match=r"^x=.* must be a finite number above 0, or so$"):
            number_above_0("x", value, ", or so")


class Bad:
    def __repr__(self):
        raise ZeroDivisionError


class Wide:
    def __repr__(self):
        return "one\n   two " + "x" * 200


def test_anything_is_shown_short_and_on_one_line():
    assert show("a\nb") == r"'a\nb'" and show(Fraction(1, 2)) == "1/2" and show(3) == "3"
    assert show(Bad()) == "<Bad>" and show(10**5000) == "<int>"
    assert show(Wide()).startswith("one two xxx") and show(Wide()).endswith("...") and len(show(Wide())) < 100


def test_the_nearest_known_word():
    known = ["num_micro_batches", "schedule"]
    assert did_you_mean("num_microbatches", known) == " Did you mean 'num_micro_batches'?"
    assert did_you_mean("SCHEDULE", known) == " Did you mean 'schedule'?"
    assert did_you_mean("xyz", known) == "" == did_you_mean(3, known)
    assert did_you_mean("gpip", ["gpipe"], cutoff=0.99) == ""
