"""What a `Config` accepts and refuses."""

import dataclasses
import functools
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe import schedules
from jaxpipe.errors import ConfigError
from jaxpipe.training.config import Config
from jaxpipe.training.loss_scale import DynamicScale


def numbered(*cases):
    """Cases that have nothing to be named after."""
    return [pytest.param(*case, id=str(number)) for number, case in enumerate(cases)]


def keep_dots(primitive, *_, **__):
    """A stand-in for a policy of `jax.checkpoint`."""
    return primitive == "dot"


def test_defaults():
    assert dataclasses.asdict(Config()) == {
        "num_micro_batches": 1,
        "schedule": "1f1b",
        "remat": "layer",
        "gradient_clipping": None,
        "compute_dtype": None,
        "float32_params": None,
        "loss_scale": None,
        "zero_stage": 0,
        "local_rows": False,
        "num_chunks": 1,
        "steps_per_print": None,
    }


def test_frozen_and_by_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().num_micro_batches = 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        Config(8)  # pyright: ignore[reportCallIssue]
    assert Config(remat="none") == Config(remat="none") != Config()
    assert len({Config(), Config()}) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_micro_batches", 64),
        ("schedule", "gpipe"),
        ("schedule", "eager_1f1b"),
        ("schedule", "mine.csv"),
        ("schedule", Path("tables") / "mine.csv"),
        ("schedule", schedules.one_f_one_b(2, 4)),
        ("remat", "none"),
        ("remat", "stage"),
        ("remat", 1),
        ("remat", 4),
        ("remat", keep_dots),
        ("gradient_clipping", 1),
        ("gradient_clipping", 0.5),
        ("steps_per_print", 10),
        ("local_rows", True),
        ("compute_dtype", "bfloat16"),
        ("float32_params", "norm|router"),
        ("loss_scale", 1024.0),
        ("loss_scale", "dynamic"),
        ("loss_scale", DynamicScale(window=3)),
    ],
)
def test_accepted(field, value):
    assert getattr(Config(**{field: value}), field) is value


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "8"])
def test_num_micro_batches_refused(value):
    with pytest.raises(ConfigError, match="num_micro_batches=.* must be an integer, 1 or more"):
        Config(num_micro_batches=value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1f1", "is not a known schedule. Did you mean '1f1b'.*'gpipe',.* a Schedule"),
        ("", "schedule='' is not a known schedule. It must be one of '1f1b'"),
        ("forward_only", "is not a known schedule"),
        (None, "is a NoneType. It must be one of"),
        (3, "is a int"),
        (schedules.gpipe, "is a function"),
    ],
)
def test_schedule_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        Config(schedule=value)


@pytest.mark.parametrize("value", [0, -2, 1.5, True, False, None, "layers", ["layer"]])
def test_remat_refused(value):
    with pytest.raises(
        ConfigError, match="remat=.* must be 'none', 'dots', 'layer', 'stage', a positive number.*policy"
    ):
        Config(remat=value)


@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf"), True, "1.0", "auto"])
def test_gradient_clipping_refused(value):
    with pytest.raises(ConfigError, match="gradient_clipping=.* finite number above 0.*None for no clipping"):
        Config(gradient_clipping=value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "10"])
def test_steps_per_print_refused(value):
    with pytest.raises(ConfigError, match="steps_per_print=.* integer, 1 or more. Use None"):
        Config(steps_per_print=value)


def test_zero_stage():
    assert Config(zero_stage=np.int64(1)).zero_stage == 1
    for value in (2, 3, None, False, True, "1", 1.0):
        with pytest.raises(ConfigError, match=f"zero_stage={value!r}: it is 0, or 1"):
            Config(zero_stage=value)


def test_replace_checks_again():
    with pytest.raises(ConfigError, match="num_micro_batches=0"):
        dataclasses.replace(Config(), num_micro_batches=0)


def test_make():
    config = Config(num_micro_batches=3)
    assert Config.make(None) == Config()
    assert Config.make(config) is config
    assert Config.make({"num_micro_batches": 3}) == config
    assert Config.make({}) == Config()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"num_microbatches": 3}, "unknown key 'num_microbatches'. Did you mean 'num_micro_batches'.*steps_per_print"),
        ({"Remat": 3}, "unknown key 'Remat'. Did you mean 'remat'"),
        ({"xyz": 3}, "unknown key 'xyz'. Known keys: num_micro_batches, schedule, remat"),
        ({1: 3}, "unknown key 1. Known keys"),
        ({"num_micro_batches": 0}, "num_micro_batches=0 must be"),
        ("ds_config.json", "config is a str: it must be a jaxpipe.Config, a dict.*from_deepspeed"),
        ([("remat", "none")], "config is a list"),
    ],
)
def test_make_refuses(value, message):
    with pytest.raises(ConfigError, match=message):
        Config.make(value)


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint32, np.array, jnp.int32])
def test_integers_of_other_libraries(kind):
    config = Config(num_micro_batches=kind(4), steps_per_print=kind(10), remat=kind(2), gradient_clipping=kind(3))
    assert config == Config(num_micro_batches=4, steps_per_print=10, remat=2, gradient_clipping=3)
    assert {type(config.num_micro_batches), type(config.steps_per_print), type(config.remat)} == {int}
    assert Config.from_deepspeed({"gradient_accumulation_steps": kind(4)}, data=kind(1)).num_micro_batches == 4


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.array, jnp.asarray, Fraction])
def test_floats_of_other_libraries(kind):
    clip = Config(gradient_clipping=kind(0.5)).gradient_clipping
    assert clip == 0.5 and type(clip) is float


@pytest.mark.parametrize("name", ["num_micro_batches", "steps_per_print"])
@pytest.mark.parametrize(
    "value", [np.bool_(True), np.float32(4), 4.5, np.array([4]), np.int64(0), "4", -1, 1j], ids=repr
)
def test_what_is_no_count(name, value):
    with pytest.raises(ConfigError, match=rf"{name}=.* must be an integer, 1 or more"):
        Config(**{name: value})


@pytest.mark.parametrize(
    "value", numbered(*[(x,) for x in (10**400, 10**5000, np.nan, np.inf, 0, -1, True, np.bool_(True), "1", [1.0], 1j)])
)
def test_what_is_no_norm(value):
    with pytest.raises(ConfigError, match=r"gradient_clipping=.* must be a finite number above 0"):
        Config(gradient_clipping=value)


POLICIES = jax.checkpoint_policies


@pytest.mark.parametrize(
    ("remat", "message"),
    numbered(
        (print, "It is a builtin function"),
        (len, "It is a builtin function"),
        (functools.partial(print, 1), "It is a builtin function"),
        (dict, "dict is a class"),
        (np.add, "remat="),
        (jax.nn.relu, "A policy is called as policy"),
        (lambda x: x, "A policy is called as policy"),
        (lambda primitive, *arrays: True, "A policy is called as policy"),
        (POLICIES.save_only_these_names, "save_only_these_names makes a policy: call it"),
        (POLICIES.save_any_names_but_these, "save_any_names_but_these makes a policy"),
        (POLICIES.save_from_both_policies, "save_from_both_policies makes a policy"),
        ("layers", "Did you mean 'layer'"),
        (0, "remat=0"),
        (True, "remat=True"),
        (1.0, "remat=1.0"),
        (None, "remat=None"),
    ),
)
def test_what_is_no_policy(remat, message):
    with pytest.raises(ConfigError, match=message):
        Config(remat=remat)


def test_policies():
    for remat in (
        POLICIES.dots_saveable,
        POLICIES.everything_saveable,
        POLICIES.nothing_saveable,
        POLICIES.checkpoint_dots_with_no_batch_dims,
        POLICIES.save_only_these_names("a"),
        POLICIES.save_from_both_policies(POLICIES.dots_saveable, POLICIES.save_only_these_names("a")),
        lambda primitive, *_, **__: False,
        functools.partial(lambda flag, primitive, *_, **__: flag, True),
    ):
        assert Config(remat=remat).remat is remat


@pytest.mark.parametrize(("field", "value"), [("compute_dtype", "float64"), ("loss_scale", 0), ("float32_params", "(")])
def test_precision_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}="):
        Config(**{field: value})


def test_precision_is_stored_as_names_and_floats():
    config = Config(compute_dtype=jnp.bfloat16, loss_scale=np.int32(8))
    assert config == Config(compute_dtype="bfloat16", loss_scale=8.0) and type(config.loss_scale) is float
    assert Config(compute_dtype="float32").compute_dtype is None


@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_local_rows_refused(value):
    with pytest.raises(ConfigError, match="local_rows=.*: it is True or False"):
        Config(local_rows=value)
