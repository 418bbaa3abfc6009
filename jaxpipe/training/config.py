"""The settings of a training run, in one frozen dataclass that refuses what it does not understand.

`initialize` calls `Config.make` on its argument `config=`. `Config.from_deepspeed` reads a DeepSpeed configuration: keys
that have a meaning here are translated, keys whose job is done elsewhere (such as the optimizer) are ignored with a
warning, and keys that would silently change the result are refused.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from jaxpipe.checks import as_integer, count, did_you_mean, number_above_0, show
from jaxpipe.compat import deepspeed_config
from jaxpipe.errors import ConfigError
from jaxpipe.executor.remat import check_remat
from jaxpipe.schedules.registry import TRAINING
from jaxpipe.schedules.table import Schedule, is_path

__all__ = ["Config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a training run.

    Every field is checked when the object is made.

    Attributes:
      num_micro_batches: M, the number of micro-batches per training step, 1 or more.
      schedule: a name (`"1f1b"`), a `Schedule`, or the path of a CSV file that holds one.
      remat: what the forward pass saves for the backward pass. `"layer"` saves the input of each layer, `"stage"` the input
        of each stage, a positive integer k the input of every k-th layer, and `"none"` everything. A callable is a
        `jax.checkpoint` policy, and saves what it says.
      gradient_clipping: the largest norm of the whole gradient, over all ranks; `None` does not clip.
      compute_dtype, loss_scale, zero_stage: reserved for mixed precision and sharded optimizer state. They are not
        implemented yet, so only the defaults are accepted.
      steps_per_print: the loss is printed every so many steps; `None` never prints.

    Raises:
      ConfigError: a field is wrong.
    """

    num_micro_batches: int = 1
    schedule: str | Schedule | os.PathLike[str] = "1f1b"
    remat: str | int | Callable[..., Any] = "layer"
    gradient_clipping: float | None = None
    compute_dtype: None = None
    loss_scale: None = None
    zero_stage: int = 0
    steps_per_print: int | None = None

    def __post_init__(self):
        self._set("num_micro_batches", count("num_micro_batches", self.num_micro_batches))
        self._check_schedule()
        self._set("remat", check_remat(self.remat))
        if self.gradient_clipping is not None:
            more = ", the largest norm a gradient may have. Use None for no clipping."
            self._set("gradient_clipping", number_above_0("gradient_clipping", self.gradient_clipping, more))
        if self.steps_per_print is not None:
            more = " Use None to print nothing."
            self._set("steps_per_print", count("steps_per_print", self.steps_per_print, more))
        self._refuse("compute_dtype", None, "leave it out, and cast inside the layers where lower precision is wanted")
        self._refuse("loss_scale", None, "leave it out; float32 and bfloat16 need no loss scale")
        self._refuse("zero_stage", 0, "leave it out; every data rank keeps the whole optimizer state of its stage")
        self._set("zero_stage", 0)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    def _check_schedule(self) -> None:
        # Whether the table fits the mesh is not decided here, because the number of stages is not a setting.
        schedule = self.schedule
        if not isinstance(schedule, str | os.PathLike | Schedule):
            problem = f"is a {type(schedule).__name__}."
        elif isinstance(schedule, str) and not is_path(schedule) and schedule not in TRAINING:
            problem = f"is not a known schedule.{did_you_mean(schedule, TRAINING)}"
        else:
            return
        raise ConfigError(
            f"schedule={show(schedule)} {problem} It must be one of {', '.join(map(repr, TRAINING))}, a Schedule "
            "(jaxpipe.schedules makes them), or the path of a .csv file."
        )

    def _refuse(self, name: str, default: int | None, way_out: str) -> None:
        value = getattr(self, name)
        # No `==`: False == 0, and a dtype may compare in odd ways.
        if value is not default and (default is None or as_integer(value) != default):
            raise ConfigError(
                f"{name}={show(value)} is not available yet in this version of jaxpipe: only {default!r} is. "
                f"The name is reserved; {way_out}."
            )

    @classmethod
    def make(cls, value: "Config | Mapping[str, Any] | None") -> Self:
        """Makes a `Config` of what a user may pass for one: nothing, a `Config`, or a dict of its fields.

        Raises:
          ConfigError: a key is unknown (the message names the nearest known one), a value is wrong, or it is none of these.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"config is a {type(value).__name__}: it must be a jaxpipe.Config, a dict of its fields, or None. "
                "Config.from_deepspeed reads DeepSpeed's files."
            )
        known = [field.name for field in fields(cls)]
        for key in value:
            if key not in known:
                hint = did_you_mean(key, known)
                raise ConfigError(f"config: unknown key {show(key)}.{hint} Known keys: {', '.join(known)}.")
        return cls(**value)

    @classmethod
    def from_deepspeed(cls, source: "Mapping[str, Any] | str | os.PathLike[str]", *, data: int = 1) -> Self:
        """Makes a `Config` that means the same as a DeepSpeed configuration.

        One warning names all keys that are ignored, and where their job is done instead. `jaxpipe.compat.deepspeed_config`
        says what becomes of each key.

        Args:
          source: the configuration as a dict, or the path of its JSON file.
          data: the number of data ranks. It matters only if the number of micro-batches is derived from `train_batch_size`,
            which counts all data ranks, or checked against it.

        Raises:
          ConfigError: a key is unknown, batch sizes contradict each other, or the configuration asks for something that
            jaxpipe does not do yet (bf16, fp16, ZeRO).
        """
        return cls(**deepspeed_config.read(source, data=data))
