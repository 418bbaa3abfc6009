"""The sections bf16 and fp16 of a DeepSpeed configuration, as fields of a `Config`.

    bf16.enabled (also bfloat16)                compute_dtype="bfloat16"
    fp16.enabled                                compute_dtype="float16"
    fp16.loss_scale                             becomes loss_scale; 0, the default, is a dynamic one, made of
      .initial_scale_power                        initial = 2 ** initial_scale_power
      .loss_scale_window, .min_loss_scale         window, minimum
      .hysteresis                                 hysteresis

A section without `enabled` is switched off, as in DeepSpeed. What would keep masters or optimizer state short is refused.
"""

from collections.abc import Mapping
from typing import Any

from jaxpipe.checks import as_integer, as_number, show
from jaxpipe.compat.deepspeed_keys import KEYS
from jaxpipe.errors import ConfigError

__all__ = ["fields", "is_enabled"]

SECTIONS = ("bf16", "bfloat16", "fp16")
_DYNAMIC = ("initial_scale_power", "loss_scale_window", "min_loss_scale", "hysteresis", "consecutive_hysteresis")
_IGNORED = {
    "immediate_grad_update": "gradients are added up in place",
    "check_grad_overflow": "every step is checked; one that is not finite changes nothing, and train_batch says so",
}


def is_enabled(section: str, value: Any) -> bool:
    """Whether a section is switched on.

    Raises:
      ConfigError: it is no section, or does not say so by true or false.
    """
    if not isinstance(value, Mapping):
        if value is None or value is False:
            return False
        raise ConfigError(f"DeepSpeed configuration: {section}={show(value)} must be a section {{...}}.")
    enabled = value.get("enabled", False)
    if enabled is None or isinstance(enabled, bool):
        return bool(enabled)
    # "auto" is common: another library fills it in before DeepSpeed sees it.
    auto = " Write the value that the trainer would have filled in." if enabled == "auto" else ""
    raise ConfigError(f"DeepSpeed configuration: {section}.enabled={show(enabled)} must be true or false.{auto}")


def fields(config: Mapping[str, Any], ignored: dict[str, str]) -> dict[str, Any]:
    """The fields of a `Config`; a dynamic loss scale as the keywords of a `DynamicScale`.

    Args:
      config: the whole configuration; keys that no section knows have been refused.
      ignored: gets the keys that have no effect, with the reason.

    Raises:
      ConfigError: two sections contradict each other, a value is wrong, or it asks for what jaxpipe does not do.
    """
    on = [name for name in SECTIONS if is_enabled(name, config.get(name))]
    spelt = [name for name in ("bf16", "bfloat16") if config.get(name) is not None]
    if "fp16" in on and len(on) > 1:
        raise ConfigError(f"DeepSpeed configuration: {on[0]} and fp16 are both enabled. Switch one of them off.")
    if len(spelt) > 1 and len({name in on for name in spelt}) > 1:
        raise ConfigError(
            "DeepSpeed configuration: bf16 and bfloat16 are one section, and disagree. Leave one of them out."
        )
    for name in on:
        _check(name, config[name], ignored)
    if "fp16" in on:
        return {"compute_dtype": "float16", "loss_scale": _loss_scale(config["fp16"], ignored)}
    return {"compute_dtype": "bfloat16"} if on else {}


def _check(section: str, values: Mapping[str, Any], ignored: dict[str, str]) -> None:
    """Refuses what would compute something else, and notes what has no effect."""
    for key, value in values.items():
        if not value or value == KEYS[section].get(key):
            continue
        name = f"{section}.{key}"
        if key in ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads"):
            raise ConfigError(
                f"DeepSpeed configuration: {name}={show(value)} is not available: master weights, sums of gradients and "
                "optimizer state are float32. Take it out."
            )
        if key in _IGNORED:
            ignored[name] = _IGNORED[key]


def _loss_scale(values: Mapping[str, Any], ignored: dict[str, str]) -> float | dict[str, Any]:
    def given(key: str) -> Any:
        value = values.get(key)
        return KEYS["fp16"][key] if value is None else value

    def wrong(key: str, rule: str) -> ConfigError:
        return ConfigError(f"DeepSpeed configuration: fp16.{key}={show(given(key))} must be {rule}.")

    fixed = as_number(given("loss_scale"))
    if fixed is None or fixed < 0:
        raise wrong("loss_scale", "a number above 0, or 0 for a dynamic loss scale")
    if fixed:
        other = [key for key in _DYNAMIC if given(key) != KEYS["fp16"][key]]
        ignored.update({f"fp16.{key}": "fp16.loss_scale is a fixed number" for key in other})
        return float(fixed)
    power = as_integer(given("initial_scale_power"))
    if power is None or not 0 <= power <= 127:
        raise wrong("initial_scale_power", "an integer from 0 to 127")
    for key in ("loss_scale_window", "hysteresis"):
        number = as_integer(given(key))
        if number is None or number < 1:
            raise wrong(key, "an integer, 1 or more")
    least = as_number(given("min_loss_scale"))
    if least is None or not 0 < least <= 2**power:
        raise wrong("min_loss_scale", f"a number above 0, and not above 2 ** initial_scale_power = {2**power}")
    if given("consecutive_hysteresis") and given("hysteresis") > 1:
        raise ConfigError(
            f"DeepSpeed configuration: fp16.consecutive_hysteresis={show(given('consecutive_hysteresis'))} is not "
            "available: the hysteresis begins again when the scale is doubled, and not with every good step. Take it out, "
            "or use hysteresis 1."
        )
    window, hysteresis = given("loss_scale_window"), given("hysteresis")
    return {"initial": 2.0**power, "window": window, "minimum": float(least), "hysteresis": hysteresis}
