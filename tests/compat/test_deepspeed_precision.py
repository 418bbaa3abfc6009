"""bf16 and fp16 of a DeepSpeed configuration."""

import warnings

import pytest

import jaxpipe
from jaxpipe.errors import ConfigError
from jaxpipe.training.config import Config


def read(**config):
    return Config.from_deepspeed(config)


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_bf16(name):
    config = read(**{name: {"enabled": True}})
    assert (config.compute_dtype, config.loss_scale) == ("bfloat16", None)


def test_fp16_is_dynamic_with_the_numbers_of_deepspeed():
    config = read(fp16={"enabled": True}, bf16={"enabled": False})
    assert config.compute_dtype == "float16"
    assert config.loss_scale == jaxpipe.DynamicScale(initial=2.0**16, window=1000, minimum=1.0, hysteresis=2)


def test_its_numbers_are_taken():
    section = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 500, "hysteresis": 3}
    found = read(fp16={**section, "min_loss_scale": 4, "auto_cast": True}).loss_scale
    assert found == jaxpipe.DynamicScale(initial=256.0, window=500, minimum=4.0, hysteresis=3)
    assert read(fp16={"enabled": True, "hysteresis": 1, "consecutive_hysteresis": True}).loss_scale.hysteresis == 1


def test_a_fixed_scale():
    with pytest.warns(UserWarning, match="fp16.hysteresis: fp16.loss_scale is a fixed number") as told:
        config = read(fp16={"enabled": True, "loss_scale": 128, "hysteresis": 4, "loss_scale_window": 1000})
    assert (config.compute_dtype, config.loss_scale) == ("float16", 128.0)
    assert "window" not in str(told[0].message) and told[0].filename == __file__


@pytest.mark.parametrize(
    "config", [{"bf16": {"enabled": False}}, {"fp16": {}}, {"bf16": None}, {"fp16": {"enabled": None}}, {"bf16": False}]
)
def test_what_is_switched_off(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Config.from_deepspeed(config) == Config(gradient_clipping=1.0)


def test_a_section_that_does_not_say_enabled_is_switched_off():
    with pytest.warns(UserWarning, match="fp16.loss_scale: fp16 is switched off"):
        assert read(fp16={"loss_scale": 128}).compute_dtype is None


def test_what_has_no_effect_is_named():
    with pytest.warns(UserWarning, match="bf16.immediate_grad_update.*bf16.check_grad_overflow: every step is checked"):
        read(bf16={"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": False}}, "one section, and disagree"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled='auto' must be true or false. Write the value that the trainer"),
        ({"fp16": {"enabled": 1}}, "fp16.enabled=1 must be true or false"),
        ({"fp16": True}, "fp16=True must be a section"),
        (
            {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
            "bf16.bf16_optimizer_states=True is not available",
        ),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16_master_weights_and_grads=True is not",
        ),
        (
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
            "fp16_master_weights_and_grads=True is not",
        ),
        ({"fp16": {"enabled": True, "consecutive_hysteresis": True}}, "consecutive_hysteresis=True is not available"),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "fp16.loss_scale=-1 must be a number above 0, or 0"),
        ({"fp16": {"enabled": True, "loss_scale": "auto"}}, "fp16.loss_scale='auto' must be"),
        ({"fp16": {"enabled": True, "initial_scale_power": 0.5}}, "fp16.initial_scale_power=0.5 must be an integer"),
        ({"fp16": {"enabled": True, "initial_scale_power": 200}}, "fp16.initial_scale_power=200 must be an integer"),
        ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "fp16.loss_scale_window=0 must be an integer, 1 or more"),
        ({"fp16": {"enabled": True, "hysteresis": -1}}, "fp16.hysteresis=-1 must be an integer, 1 or more"),
        ({"fp16": {"enabled": True, "min_loss_scale": 0}}, "fp16.min_loss_scale=0 must be a number above 0"),
        ({"fp16": {"enabled": True, "initial_scale_power": 1, "min_loss_scale": 4}}, "not above 2 .. initial.* = 2"),
        (
            {"fp16": {"enabled": True, "loss_scales": 1}},
            "section fp16: unknown key 'loss_scales'. Did you mean 'loss_scale",
        ),
    ],
)
def test_what_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_deepspeed(config)
