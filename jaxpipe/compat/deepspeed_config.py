"""Reads a DeepSpeed configuration, and makes the fields of a `Config` that mean the same.

    train_batch_size                            is checked against the next two and the number of data ranks
    train_micro_batch_size_per_gpu              is checked in the same way
    gradient_accumulation_steps                 becomes num_micro_batches. If it is absent, it is derived from the two
                                                above if both are given, and is 1 otherwise
    gradient_clipping                           becomes gradient_clipping; 0 does not clip. If it is absent it is 1.0, the
                                                default of recent releases; write 0.0 for the older ones, which did not clip
    steps_per_print                             becomes steps_per_print
    zero_optimization.stage                     becomes zero_stage if it is 0 or 1; other stages are refused
    pipeline.activation_checkpoint_interval     becomes remat: k > 0 is the interval k, and 0 is "none". If it is absent,
                                                remat keeps its own default, because DeepSpeed then looks at its
                                                PipelineModule and not at this file. Results do not depend on it, only
                                                memory and speed do
    bf16, fp16                                  become compute_dtype and loss_scale; see
                                                `jaxpipe.compat.deepspeed_precision`

One of three things happens to every other key, also to a key inside a section (`jaxpipe.compat.deepspeed_keys` lists them).
It is *ignored* with a warning if its job is done elsewhere or not needed. It is *refused* if leaving it out would silently
train something else. Otherwise it is *unknown*, which is an error; DeepSpeed itself accepts any key at the top silently, so
that a misspelt one has no effect. Keys that ask for nothing (`false`, `null`, `{"enabled": false}`, the default of
DeepSpeed) are accepted without a warning.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpipe.checks import as_count, as_integer, as_number, did_you_mean, show
from jaxpipe.compat import deepspeed_precision
from jaxpipe.compat.deepspeed_keys import IGNORED, KEYS, MAPPED, NETWORK, ONLY, REFUSED, SWITCHED_OFF
from jaxpipe.errors import ConfigError
from jaxpipe.layout.zero import WHY_NOT
from jaxpipe.processes.first import is_first

__all__ = ["read"]


def read(source: Mapping[str, Any] | str | os.PathLike[str], *, data: int = 1) -> dict[str, Any]:
    """Returns keyword arguments for `Config`. See `Config.from_deepspeed` for the arguments and the errors."""
    ranks = as_count(data)
    if ranks is None:
        raise ConfigError(f"data={show(data)} must be the number of data ranks, 1 or more.")
    if not isinstance(source, (Mapping, str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"from_deepspeed({show(source)}): expected a DeepSpeed configuration as a dict, or the path of its JSON file."
        )
    config = source if isinstance(source, Mapping) else _load(source)
    ignored: dict[str, str] = {}
    tops = [name for name in (*MAPPED, *IGNORED, *REFUSED, *ONLY) if "." not in name]
    for key, value in config.items():
        if key not in tops:
            hint = did_you_mean(key, tops)
            raise ConfigError(f"DeepSpeed configuration: unknown key {show(key)}.{hint} Correct it, or take it out.")
        _judge(key, value, ignored)

    interval = _section(config, "pipeline").get("activation_checkpoint_interval")
    fields: dict[str, Any] = {
        "num_micro_batches": _num_micro_batches(config, ranks),
        "gradient_clipping": _clipping(config.get("gradient_clipping", 1.0)),
        "steps_per_print": _never(config.get("steps_per_print")),
        **({} if interval is None else {"remat": _remat(interval)}),
        **deepspeed_precision.fields(config, ignored),
        **({"zero_stage": 1} if _zero_stage(config.get("zero_optimization")) else {}),
    }
    if ignored and is_first():
        listed = "; ".join(f"{key}: {reason}" for key, reason in ignored.items())
        # Level 3 is the caller of Config.from_deepspeed.
        warnings.warn(f"ignored in the DeepSpeed configuration: {listed}", stacklevel=3)
    return fields


def _judge(name: str, value: Any, ignored: dict[str, str]) -> None:
    """Decides what happens to a key: raises ConfigError, or adds it to `ignored` with the reason, or does nothing.

    Args:
      name: inside a section it is `section.key`.
    """
    reasons = SWITCHED_OFF
    if name == "zero_optimization" and _zero_stage(value):
        reasons = {name: NETWORK}
    if name == "data_types" and value is not None:
        _check_section(name, value)
        for key, dtype in value.items():
            if dtype not in (None, "fp32", "float32"):
                raise _not_available(f"data_types.{key}={show(dtype)}", "Use 'fp32'")
    elif name in REFUSED and _is_on(value):
        raise _not_available(f"{name}={show(value)}", 'Take it out, or set "enabled": false in it')
    elif name in ONLY and value not in ONLY[name]:
        raise _not_available(f"{name}={show(value)}", f"Take it out, or use {ONLY[name][0]!r}")
    if name in KEYS and isinstance(value, Mapping):
        _check_section(name, value)
    elif name == "pipeline" and value is not None:
        _check_section(name, value)
    if name in IGNORED:
        if _is_on(value) and not (name in KEYS and _asks_for_nothing(name, value)):
            ignored[name] = IGNORED[name]
    elif name in deepspeed_precision.SECTIONS and deepspeed_precision.is_enabled(name, value):
        return
    elif isinstance(value, Mapping) and (name == "pipeline" or name in SWITCHED_OFF):
        for key, inner in value.items():
            path, default = f"{name}.{key}", KEYS.get(name, {}).get(key)
            if key not in ("enabled", "stage") and inner and not _same(inner, default):
                _judge(path, inner, ignored)
                if name in reasons and not (path in KEYS and _asks_for_nothing(path, inner)):
                    ignored[path] = reasons[name]


def _check_section(name: str, value: Any) -> None:
    """Raises ConfigError if the value is no section, or has a key that DeepSpeed does not know in this section."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"DeepSpeed configuration: {name}={show(value)} must be a section {{...}}.")
    for key in value:
        if key not in KEYS[name]:
            hint = did_you_mean(key, KEYS[name])
            raise ConfigError(
                f"DeepSpeed configuration, section {name}: unknown key {show(key)}.{hint} Correct it, or take it out."
            )


def _asks_for_nothing(name: str, section: object) -> bool:
    return isinstance(section, Mapping) and all(
        not _is_on(value) or _same(value, KEYS[name].get(key)) for key, value in section.items()
    )


def _same(value: object, default: object) -> bool:
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)


def _load(source: str | os.PathLike[str]) -> dict[str, Any]:
    path = os.fspath(source)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key in (keys := [key for key, _ in pairs]):
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: key {key!r} is given {keys.count(key)} times. Keep one of them.")
        return dict(pairs)

    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, a path with a zero byte
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"from_deepspeed({show(path)}): the file cannot be read: {why}. Pass the path of a JSON file, or a dict."
        ) from error
    try:
        loaded = json.loads(text, object_pairs_hook=unique)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits are a ValueError, too
        raise ConfigError(f"{path} is not JSON: {error}. Comments and trailing commas are not allowed.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a JSON {type(loaded).__name__}; a DeepSpeed configuration is an object.")
    return loaded


def _num_micro_batches(config: Mapping[str, Any], data: int) -> int:
    def size(name: str) -> int | None:
        value = config.get(name)
        if value is None:
            return None
        number = as_count(value)
        if number is None:
            # "auto" is common: another library fills it in before DeepSpeed sees it.
            auto = " Write the number that the trainer would have filled in." if value == "auto" else ""
            raise ConfigError(f"DeepSpeed configuration: {name}={show(value)} must be an integer, 1 or more.{auto}")
        return number

    total = size("train_batch_size")
    micro = size("train_micro_batch_size_per_gpu")
    steps = size("gradient_accumulation_steps")
    if steps is None:
        # If one of both sizes is missing, DeepSpeed takes one step too.
        steps = max(1, total // (micro * data)) if total and micro else 1
    unit = (micro or 1) * steps
    if total is None or (total == unit * data if micro else total % (unit * data) == 0):
        return steps
    product = f"{steps} micro-batches x {data} data ranks" + (f" x {micro} rows = {unit * data}" if micro else "")
    pass_data = f"pass data={total // unit}, if the mesh has as many data ranks, or " if total % unit == 0 else ""
    raise ConfigError(
        f"DeepSpeed configuration: train_batch_size={total} is not {product}. It must be "
        "train_micro_batch_size_per_gpu x gradient_accumulation_steps x number of data ranks: "
        f"{pass_data}change one of the three."
    )


def _clipping(value: object) -> object:
    """The value for jaxpipe, in which None switches clipping off; DeepSpeed writes 0 for that."""
    return None if value is None or value is False or as_number(value) == 0 else value


def _never(steps: object) -> object:
    """The value for jaxpipe, in which None never prints; other libraries write infinity for that."""
    return None if isinstance(steps, float) and math.isinf(steps) and steps > 0 else steps


def _zero_stage(zero: Any) -> int:
    """The stage of ZeRO; raises ConfigError if it is not there."""
    if zero is not None and not isinstance(zero, (bool, Mapping)):
        raise ConfigError(f"DeepSpeed configuration: zero_optimization={show(zero)} must be a section {{...}}.")
    # Early DeepSpeed wrote true for stage 1.
    stage = int(zero) if isinstance(zero, bool) else (zero or {}).get("stage", 0)
    number = as_integer(stage)
    if number not in (0, 1):
        why = f" ({WHY_NOT[number]})" if number in WHY_NOT else ""
        raise _not_available(f"zero_optimization.stage={show(stage)}", f"Use stage 0 or 1{why}")
    return number


def _remat(interval: object) -> str | int:
    number = as_integer(interval)
    if number is None or number < 0:
        raise ConfigError(
            f"DeepSpeed configuration: pipeline.activation_checkpoint_interval={show(interval)} must be an integer, 0 or "
            "more."
        )
    return number or "none"


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return config.get(key) or {}


def _is_on(value: object) -> bool:
    """Whether a value does anything; `false`, `null`, an empty section and a section that is not enabled do nothing."""
    if isinstance(value, Mapping) and value:
        return bool(value.get("enabled", value.get("device", True) != "none"))
    return bool(value)


def _not_available(what: str, way_out: str) -> ConfigError:
    return ConfigError(f"DeepSpeed configuration: {what} is not available yet in this version of jaxpipe. {way_out}.")
