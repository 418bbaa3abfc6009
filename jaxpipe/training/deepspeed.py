"""Reads a DeepSpeed configuration: the fields of a `Config` that mean the same.

    train_batch_size                            checked against the next two and the number of data ranks
    train_micro_batch_size_per_gpu              as above
    gradient_accumulation_steps                 num_micro_batches; derived from the two above where absent, else 1
    gradient_clipping                           gradient_clipping; 0 is no clipping. Absent is 1.0, the default of
                                                recent releases; older ones did not clip: write 0.0 to get that
    steps_per_print                             steps_per_print
    pipeline.activation_checkpoint_interval     remat: k > 0 is the interval k, 0 is "none". Absent leaves jaxpipe's own
                                                default: there DeepSpeed looks at its PipelineModule, not at this file.
                                                It decides about memory and speed, never about results

Three things can happen to any other key. It is *ignored* with a warning if its job is done elsewhere or not needed;
*refused* if leaving it out would silently train something else; *unknown* otherwise. DeepSpeed itself takes any key
without a word, so a misspelt one has no effect there; here it is an error. Keys that are switched off
(`false`, `null`, `{"enabled": false}`) pass in silence.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpipe.errors import ConfigError
from jaxpipe.training.checks import did_you_mean, is_count

__all__ = ["read"]

MAPPED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "pipeline",
    "zero_optimization",
)

PROFILE, LOG, DATA = "use jax.profiler", "log the values train_batch returns", "prepare the data before train_batch"
NETWORK, CHECKPOINT = "XLA plans the communication", "see save_checkpoint and load_checkpoint"
MESH, NO_NEED = "give make_mesh further axes", "not needed in JAX"

IGNORED = {
    "optimizer": "pass an optax optimizer to initialize",
    "scheduler": "give the optax optimizer a learning rate schedule",
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor", "log_level"), LOG),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "flops_profiler", "comms_logger"), PROFILE),
    **dict.fromkeys(("timers", "dump_state", "autotuning", "eigenvalue"), PROFILE),
    **dict.fromkeys(("dataloader_drop_last", "data_efficiency", "curriculum_learning"), DATA),
    **dict.fromkeys(("communication_data_type", "seq_parallel_comm_data_type", "prescale_gradients"), NETWORK),
    **dict.fromkeys(("gradient_predivide_factor", "sparse_gradients", "disable_allgather"), NETWORK),
    **dict.fromkeys(("checkpoint", "nebula"), CHECKPOINT),
    **dict.fromkeys(("tensor_parallel", "sequence_parallel_size", "use_data_before_expert_parallelism"), MESH),
    **dict.fromkeys(("aio", "compile", "graph_harvesting", "hybrid_engine", "vocabulary_size"), NO_NEED),
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), NO_NEED),
    "activation_checkpointing": "use Config's remat",
}

PIPELINE_IGNORED = {
    "stages": "DeepSpeed does not read it either; make_mesh(pipe=...) decides",
    "partition": "DeepSpeed does not read it either; PipelineModule(partition_method=...) decides",
    "seed_layers": "DeepSpeed does not read it either; every layer draws from its own key here",
    "pipe_partitioned": NETWORK,
    "grad_partitioned": NETWORK,
    "use_reentrant": NO_NEED,
}

REFUSED = (
    "fp16",
    "bf16",
    "bfloat16",
    "amp",
    "torch_autocast",
    "progressive_layer_drop",
    "compression_training",
    "quantize_training",
    "weight_quantization",
    "sparse_attention",
    "elasticity",
)

# Their usual values are spelt out in many files; every other value trains something else.
ONLY = {"managed_gradient_accumulation": (True,), "gradient_allreduce_op": ("mean",)}


def read(source: Mapping[str, Any] | str | os.PathLike[str], *, data: int = 1) -> dict[str, Any]:
    """Keyword arguments for `Config`; the arguments and errors are described at `Config.from_deepspeed`."""
    if not is_count(data):
        raise ConfigError(f"data={data!r} must be the number of data ranks, 1 or more.")
    config = source if isinstance(source, Mapping) else _load(Path(source))
    ignored: dict[str, str] = {}

    known = (*MAPPED, *IGNORED, *REFUSED, *ONLY, "data_types")
    for key, value in config.items():
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"DeepSpeed configuration: unknown key {key!r}.{hint} Correct it, or take it out.")
        if key in REFUSED and _is_on(value):
            raise _not_available(f"{key}={value!r}", 'Take it out, or set "enabled": false in it')
        if key in ONLY and value not in ONLY[key]:
            raise _not_available(f"{key}={value!r}", f"Take it out, or use {ONLY[key][0]!r}")
        if key in IGNORED and _is_on(value):
            ignored[key] = IGNORED[key]

    fields: dict[str, Any] = {
        "num_micro_batches": _num_micro_batches(config, data),
        # `or None`: DeepSpeed's way to switch clipping off is 0.
        "gradient_clipping": config.get("gradient_clipping", 1.0) or None,
        "steps_per_print": config.get("steps_per_print"),
    }
    _check_precision(config)
    pipeline = _section(config, "pipeline")
    for key, value in pipeline.items():
        if key == "activation_checkpoint_interval":
            fields["remat"] = _remat(value)
        elif key not in PIPELINE_IGNORED:
            known = ("activation_checkpoint_interval", *PIPELINE_IGNORED)
            hint = did_you_mean(key, known)
            raise ConfigError(f"DeepSpeed configuration, section pipeline: unknown key {key!r}.{hint} Take it out.")
        elif _is_on(value):
            ignored[f"pipeline.{key}"] = PIPELINE_IGNORED[key]

    if ignored:
        listed = "; ".join(f"{key}: {reason}" for key, reason in ignored.items())
        # Level 3 is the caller of Config.from_deepspeed.
        warnings.warn(f"ignored in the DeepSpeed configuration: {listed}", stacklevel=3)
    return fields


def _load(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key in (keys := [key for key, _ in pairs]):
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: key {key!r} is given {keys.count(key)} times. Keep one of them.")
        return dict(pairs)

    try:
        loaded = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Comments and trailing commas are not allowed.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a JSON {type(loaded).__name__}; a DeepSpeed configuration is an object.")
    return loaded


def _num_micro_batches(config: Mapping[str, Any], data: int) -> int:
    def size(name: str) -> int | None:
        value = config.get(name)
        if value is not None and not is_count(value):
            # "auto" is common: another library fills it in before DeepSpeed sees it.
            raise ConfigError(f"DeepSpeed configuration: {name}={value!r} must be an integer, 1 or more.")
        return value

    total = size("train_batch_size")
    micro = size("train_micro_batch_size_per_gpu")
    steps = size("gradient_accumulation_steps")
    if steps is None:
        # Without both sizes DeepSpeed takes one step, too.
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


def _check_precision(config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization")
    # Early DeepSpeed wrote true for stage 1.
    stage = int(zero) if isinstance(zero, bool) else _section(config, "zero_optimization").get("stage", 0)
    if stage != 0:
        raise _not_available(f"zero_optimization.stage={stage!r}", "Use stage 0")
    for key, value in _section(config, "data_types").items():
        if value not in (None, "fp32", "float32"):
            raise _not_available(f"data_types.{key}={value!r}", "Use 'fp32'")


def _remat(interval: object) -> str | int:
    if interval == 0 and interval is not False:
        return "none"
    if isinstance(interval, int) and is_count(interval):
        return interval
    raise ConfigError(
        f"DeepSpeed configuration: pipeline.activation_checkpoint_interval={interval!r} must be an integer, 0 or more."
    )


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"DeepSpeed configuration: {key}={value!r} must be a section {{...}}.")
    return value or {}


def _is_on(value: object) -> bool:
    """Whether a key does anything: `false`, `null`, an empty section and one that is not enabled do nothing."""
    return bool(value.get("enabled", True)) if isinstance(value, Mapping) and value else bool(value)


def _not_available(what: str, way_out: str) -> ConfigError:
    return ConfigError(f"DeepSpeed configuration: {what} is not available yet in this version of jaxpipe. {way_out}.")
