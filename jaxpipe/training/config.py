"""The settings of a training run, in one frozen dataclass that refuses what it does not understand.

`initialize` calls `Config.make` on its argument `config=`. `Config.from_deepspeed` reads a DeepSpeed configuration: keys
that have a meaning here are translated, keys whose job is done elsewhere (such as the optimizer) are ignored with a
warning, and keys that would silently change the result are refused.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from jaxpipe.checks import count, did_you_mean, number_above_0, show
from jaxpipe.compat import deepspeed_config
from jaxpipe.errors import ConfigError
from jaxpipe.executor.remat import check_remat
from jaxpipe.layout.zero import check_zero_stage
from jaxpipe.model.precision import as_compute_dtype, as_rule
from jaxpipe.schedules.on_ranks import check_num_chunks
from jaxpipe.schedules.registry import TRAINING
from jaxpipe.schedules.table import Schedule, is_path
from jaxpipe.training.loss_scale import DynamicScale, LossScale, as_loss_scale

__all__ = ["Config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a training run.

    Every field is checked when the object is made.

    Attributes:
      num_micro_batches: M, the number of micro-batches per training step, 1 or more.
      schedule: a name (`"1f1b"`), a `Schedule`, or the path of a CSV file that holds one.
      remat: what the forward pass saves for the backward pass. `"layer"` saves the input of each layer, `"stage"` the input
        of each stage, a positive integer k the input of every k-th layer, and `"none"` everything. `"dots"` saves the input
        of each layer and its products of activations and weights (those without batch dims). A callable is a
        `jax.checkpoint` policy, and saves what it says.
      gradient_clipping: the largest norm of the whole gradient, over all ranks; `None` does not clip.
      compute_dtype: `"bfloat16"` or `"float16"`: what params and float inputs are cast to for a step. Params stay float32
        in `engine.state`, gradients are added up in float32, and outputs are float32 before `loss_fn` sees them. `None`
        computes in the dtypes of params and inputs.
      float32_params: a regular expression; params are not cast if `re.search` finds it in their path, such as
        `layer_003/norm/scale`. `initialize` refuses one that finds none.
      loss_scale: the backward pass starts from so many times the gradient of the loss, and its result is divided by it, so
        that float16 holds small gradients. A number, `"dynamic"`, or a `jaxpipe.DynamicScale`, which halves the scale and
        skips the step on overflow and doubles it after a while without; `None` does not scale.
      zero_stage: 1 cuts weights and optimizer state over the data ranks, too: each stores a part, the weights are gathered
        once per step, and the gradients reach each in parts. Results are those of 0. Without data ranks it is the same as
        0. Stages 2 and 3 are refused.
      local_rows: what each of several processes yields of a micro-batch. False: all of it, the same in every process, and
        jaxpipe takes the rows that belong to its devices. True: only its own rows, `jaxpipe.local_rows(mesh, rows)`. With
        one process there is no difference.
      num_chunks: the number of stages of a rank, for the schedules `"interleaved"`, `"looped_bfs"` and
        `"interleaved_zero_bubble"`. The model is then cut into so many times more stages as there are ranks. `"zbv"` always
        has 2, a table brings its own number, and all others have 1.
      steps_per_print: the loss is printed every so many steps; `None` never prints.

    Raises:
      ConfigError: a field is wrong.
    """

    num_micro_batches: int = 1
    schedule: str | Schedule | os.PathLike[str] = "1f1b"
    remat: str | int | Callable[..., Any] = "layer"
    gradient_clipping: float | None = None
    compute_dtype: Any = None
    float32_params: str | None = None
    loss_scale: LossScale = None
    zero_stage: int = 0
    local_rows: bool = False
    num_chunks: int = 1
    steps_per_print: int | None = None

    def __post_init__(self):
        self._set("num_micro_batches", count("num_micro_batches", self.num_micro_batches))
        self._check_schedule()
        self._set("num_chunks", check_num_chunks(self.schedule, self.num_chunks))
        self._set("remat", check_remat(self.remat))
        if self.gradient_clipping is not None:
            more = ", the largest norm a gradient may have. Use None for no clipping."
            self._set("gradient_clipping", number_above_0("gradient_clipping", self.gradient_clipping, more))
        if self.steps_per_print is not None:
            more = " Use None to print nothing."
            self._set("steps_per_print", count("steps_per_print", self.steps_per_print, more))
        if not isinstance(self.local_rows, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"local_rows={show(self.local_rows)}: it is True or False.")
        self._set("compute_dtype", as_compute_dtype(self.compute_dtype))
        self._set("float32_params", as_rule("float32_params", self.float32_params))
        self._set("loss_scale", as_loss_scale(self.loss_scale))
        self._set("zero_stage", check_zero_stage(self.zero_stage))

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
            jaxpipe does not do (ZeRO, for one).
        """
        found = deepspeed_config.read(source, data=data)
        if isinstance(found.get("loss_scale"), dict):
            found["loss_scale"] = DynamicScale(**found["loss_scale"])
        return cls(**found)
