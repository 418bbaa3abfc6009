"""What a `Config` accepts and refuses, and how a DeepSpeed configuration becomes one."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from jaxpipe import schedules
from jaxpipe.errors import ConfigError
from jaxpipe.training.config import Config


def keep_dots(primitive, *_, **__):
    """A stand-in for a policy of `jax.checkpoint`."""
    return primitive == "dot"


# Fields -------------------------------------------------------------------------------------------------------------


def test_defaults():
    assert dataclasses.asdict(Config()) == {
        "num_micro_batches": 1,
        "schedule": "1f1b",
        "remat": "layer",
        "gradient_clipping": None,
        "compute_dtype": None,
        "loss_scale": None,
        "zero_stage": 0,
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
        ("1f1", "is not a known schedule. Did you mean '1f1b'.*'gpipe', a Schedule"),
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
    with pytest.raises(ConfigError, match="remat=.* must be 'none', 'layer', 'stage', a positive number.*policy"):
        Config(remat=value)


@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf"), True, "1.0", "auto"])
def test_gradient_clipping_refused(value):
    with pytest.raises(ConfigError, match="gradient_clipping=.* finite number above 0.*None for no clipping"):
        Config(gradient_clipping=value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "10"])
def test_steps_per_print_refused(value):
    with pytest.raises(ConfigError, match="steps_per_print=.* integer, 1 or more. Use None"):
        Config(steps_per_print=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compute_dtype", "bfloat16"),
        ("compute_dtype", 0),
        ("loss_scale", 1.0),
        ("loss_scale", 0),
        ("zero_stage", 1),
        ("zero_stage", None),
        ("zero_stage", False),
    ],
)
def test_reserved_fields_say_that_they_are_not_implemented(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value!r} is not available yet in this version of jaxpipe"):
        Config(**{field: value})


def test_replace_checks_again():
    with pytest.raises(ConfigError, match="num_micro_batches=0"):
        dataclasses.replace(Config(), num_micro_batches=0)


# make ---------------------------------------------------------------------------------------------------------------


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


# from_deepspeed -----------------------------------------------------------------------------------------------------


def test_a_usual_file(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(
        json.dumps(
            {
                "train_batch_size": 64,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_clipping": 0.5,
                "steps_per_print": 10,
                "pipeline": {"activation_checkpoint_interval": 2},
                "zero_optimization": {"stage": 0},
                "fp16": {"enabled": False},
                "wall_clock_breakdown": False,
            }
        )
    )
    expected = Config(num_micro_batches=8, gradient_clipping=0.5, steps_per_print=10, remat=2)
    assert Config.from_deepspeed(path, data=2) == expected
    assert Config.from_deepspeed(str(path), data=2) == expected


@pytest.mark.parametrize(
    ("total", "micro", "steps", "data", "expected"),
    [
        (None, None, None, 1, 1),
        (None, None, 6, 4, 6),
        (32, None, None, 4, 1),
        (None, 4, None, 4, 1),
        (32, 4, None, 1, 8),
        (32, 4, None, 4, 2),
        (32, None, 8, 4, 8),
        (None, 4, 8, 4, 8),
        (32, 4, 2, 4, 2),
    ],
)
def test_number_of_micro_batches(total, micro, steps, data, expected):
    config = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    assert Config.from_deepspeed(config, data=data).num_micro_batches == expected
    given = {key: value for key, value in config.items() if value is not None}
    assert Config.from_deepspeed(given, data=data).num_micro_batches == expected


@pytest.mark.parametrize(
    ("total", "micro", "steps", "data", "message"),
    [
        (32, 4, 2, 1, r"32 is not 2 micro-batches x 1 data ranks x 4 rows = 8.*pass data=4.*or change one"),
        (30, 4, 2, 1, r"30 is not 2 micro-batches x 1 data ranks x 4 rows = 8.*data ranks: change one of the three"),
        (30, 4, None, 4, r"30 is not 1 micro-batches x 4 data ranks x 4 rows = 16"),
        (4, 8, None, 1, r"4 is not 1 micro-batches x 1 data ranks x 8 rows = 8"),
        (30, None, 4, 1, r"30 is not 4 micro-batches x 1 data ranks\."),
        (8, None, 4, 4, r"8 is not 4 micro-batches x 4 data ranks\..*pass data=2"),
        ("auto", 4, None, 1, r"train_batch_size='auto' must be an integer, 1 or more"),
        (32, 0, None, 1, r"train_micro_batch_size_per_gpu=0 must be"),
        (32, None, True, 1, r"gradient_accumulation_steps=True must be"),
        (32, None, None, 0, r"data=0 must be the number of data ranks"),
    ],
)
def test_batch_sizes_that_contradict_each_other(total, micro, steps, data, message):
    config = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    with pytest.raises(ConfigError, match=message):
        Config.from_deepspeed(config, data=data)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 1.0),
        ({"gradient_clipping": 0}, None),
        ({"gradient_clipping": 0.0}, None),
        ({"gradient_clipping": None}, None),
        ({"gradient_clipping": 2}, 2),
    ],
)
def test_clipping_is_on_unless_switched_off(config, expected):
    assert Config.from_deepspeed(config).gradient_clipping == expected


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        ({}, "layer"),
        ({"activation_checkpoint_interval": 0}, "none"),
        ({"activation_checkpoint_interval": 1}, 1),
        ({"activation_checkpoint_interval": 5}, 5),
    ],
)
def test_activation_checkpoint_interval(pipeline, expected):
    assert Config.from_deepspeed({"pipeline": pipeline}).remat == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bf16": {"enabled": True}}, "bf16={'enabled': True} is not available yet"),
        ({"fp16": {"enabled": "auto"}}, "fp16={'enabled': 'auto'} is not available yet.*set \"enabled\": false"),
        ({"amp": {"enabled": True}}, "amp=.*not available yet"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage=1 is not available yet.*Use stage 0"),
        ({"zero_optimization": True}, "zero_optimization.stage=1 is not available yet"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype='bf16' is not available yet"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation=False is not available yet"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op='sum' is not available yet.*use 'mean'"),
        ({"compression_training": {"layer_reduction": {}}}, "compression_training=.*not available yet"),
    ],
)
def test_what_would_change_the_result_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_deepspeed(config)


@pytest.mark.parametrize(
    "config",
    [
        {"bf16": {"enabled": False}, "fp16": {"enabled": False, "loss_scale": 0}, "amp": {}},
        {"zero_optimization": {"stage": 0, "reduce_bucket_size": 5e8}},
        {"zero_optimization": {}},
        {"zero_optimization": False},
        {"data_types": {"grad_accum_dtype": "fp32"}},
        {"managed_gradient_accumulation": True, "gradient_allreduce_op": "mean"},
        {"tensorboard": {"enabled": False}, "dump_state": False, "optimizer": None},
        {"pipeline": {"seed_layers": False}},
    ],
)
def test_what_is_switched_off_passes_in_silence(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Config.from_deepspeed(config) == Config(gradient_clipping=1.0)


def test_ignored_keys_are_named_in_one_warning():
    config = {
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        "wall_clock_breakdown": True,
        "wandb": {"enabled": True},
        "pipeline": {"stages": 4, "partition": "best", "activation_checkpoint_interval": 1},
    }
    with pytest.warns(UserWarning) as caught:
        assert Config.from_deepspeed(config) == Config(gradient_clipping=1.0, remat=1)
    (warning,) = caught
    message = str(warning.message)
    assert warning.filename == __file__, "the warning must point at the caller"
    assert "optimizer: pass an optax optimizer to initialize" in message
    assert "wall_clock_breakdown: use jax.profiler" in message
    assert "wandb: log the values train_batch returns" in message
    assert "pipeline.stages: DeepSpeed does not read it either; make_mesh(pipe=...) decides" in message
    assert "pipeline.partition: " in message and "activation_checkpoint_interval" not in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"grandient_accumulation_steps": 4}, "'grandient_.*'. Did you mean 'gradient_accumulation_steps'"),
        ({"xyz": 4}, "unknown key 'xyz'. Correct it, or take it out"),
        ({"pipeline": {"activation_checkpoint": 1}}, "section pipeline.*Did you mean 'activation_checkpoint_interval'"),
        ({"pipeline": True}, r"pipeline=True must be a section \{...\}"),
        ({"zero_optimization": 1}, r"zero_optimization=1 must be a section \{...\}"),
        ({"pipeline": {"activation_checkpoint_interval": -1}}, "interval=-1 must be an integer, 0 or more"),
        ({"pipeline": {"activation_checkpoint_interval": False}}, "interval=False must be an integer, 0 or more"),
        ({"gradient_clipping": "auto"}, "gradient_clipping='auto' must be a finite number"),
        ({"steps_per_print": "auto"}, "steps_per_print='auto' must be an integer"),
    ],
)
def test_wrong_keys_and_values(config, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_deepspeed(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', r"ds.json is not JSON: .*line 1 column.*trailing commas"),
        ("[1]", r"ds.json holds a JSON list"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', r"key 'steps_per_print' is given 2 times"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Config.from_deepspeed(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Config.from_deepspeed(tmp_path / "none.json")
