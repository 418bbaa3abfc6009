"""How a DeepSpeed configuration becomes a `Config`."""

import json
import warnings

import pytest

from jaxpipe.compat.deepspeed_keys import KEYS
from jaxpipe.errors import ConfigError
from jaxpipe.training.config import Config


def numbered(*cases):
    """Cases that have nothing to be named after."""
    return [pytest.param(*case, id=str(number)) for number, case in enumerate(cases)]


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
        ({"amp": {"enabled": True}}, "amp=.*not available yet"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2 is not available yet.*Use stage 0 or 1"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3 is not available yet.*twice per micro-batch"),
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


@pytest.mark.parametrize(
    ("write", "message"),
    numbered(
        (
            lambda path: None,
            r"ds\.json'\): the file cannot be read: No such file or directory. Pass the path of a JSON",
        ),
        (lambda path: path.mkdir(), "the file cannot be read: Is a directory"),
        (lambda path: path.write_bytes('{"steps_per_print": 1}'.encode("utf-16")), "cannot be read: 'utf-8' codec"),
        (lambda path: path.write_text(""), "is not JSON"),
        (lambda path: path.write_text('{"steps_per_print": ' + "9" * 5000 + "}"), "is not JSON"),
        (lambda path: path.write_text("[" * 100_000), "is not JSON"),
        (lambda path: path.write_text('{"gradient_clipping": 1e400}'), "gradient_clipping=inf must be a finite number"),
        (lambda path: path.write_text('{"gradient_clipping": NaN}'), "gradient_clipping=nan must be a finite number"),
        (lambda path: path.write_text('{"fp16": {"enabled": false, "enabled": true}}'), "'enabled' is given 2 times"),
    ),
)
def test_files_that_cannot_be_read(tmp_path, write, message):
    path = tmp_path / "ds.json"
    write(path)
    for name in (path, str(path)):
        with pytest.raises(ConfigError, match=message):
            Config.from_deepspeed(name)


@pytest.mark.parametrize("source", [5, None, ["a.json"], b"ds.json", 1.5, "a\0b"])
def test_what_is_no_deepspeed_configuration(source):
    with pytest.raises(ConfigError, match=r"from_deepspeed\("):
        Config.from_deepspeed(source)


# In every section: what is misspelt, what would change the result, what is ignored, what asks for nothing.
@pytest.mark.parametrize(
    ("config", "message"),
    numbered(
        (
            {"fp16": {"enabled": False, "auto_casts": True}},
            "section fp16: unknown key 'auto_casts'. Did you mean",
        ),
        (
            {"bf16": {"enable": False}},
            "section bf16: unknown key 'enable'. Did you mean 'enabled'",
        ),
        (
            {"activation_checkpointing": {"profiles": True}},
            "section activation_checkpointing: .*Did you mean 'profile'",
        ),
        ({"optimizer": {"tipe": "Adam"}}, "section optimizer: unknown key 'tipe'. Did you mean 'type'"),
        ({"scheduler": {"parms": {}}}, "section scheduler: .*Did you mean 'params'"),
        ({"flops_profiler": {"enabled": False, "profil_step": 1}}, "section flops_profiler: .*'profile_step'"),
        ({"data_types": {"grad_accum_type": "fp32"}}, "section data_types: .*Did you mean 'grad_accum_dtype'"),
        ({"data_types": 5}, r"data_types=5 must be a section \{...\}"),
        ({"zero_optimization": {"stage": 0, "overlap_com": True}}, "section zero_optimization: .*'overlap_comm'"),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none", "x": 1}}},
            "unknown key 'x'",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer=.*not available",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param=.*not available",
        ),
        ({"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload=True is not available yet"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients=True is not available"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage='auto' is not available yet"),
        ({"zero_optimization": {"stage": False}}, "zero_optimization.stage=False is not available yet"),
        ({"train_batch_size": "auto"}, "train_batch_size='auto' must be .* Write the number that the trainer would"),
        ({5: 1}, "unknown key 5"),
        ({"gradient_clipping": 10**400}, "gradient_clipping=.* must be a finite number"),
        ({"gradient_clipping": []}, r"gradient_clipping=\[\] must be a finite number"),
    ),
)
def test_keys_inside_of_sections(config, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_deepspeed(config)


def test_keys_inside_of_sections_are_ignored_with_a_warning():
    config = {
        "fp16": {"enabled": False, "auto_cast": True, "loss_scale": 128, "initial_scale_power": 16},
        "bf16": {"enabled": False, "check_grad_overflow": True},
        "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
        "zero_optimization": {
            "stage": 0,
            "overlap_comm": True,
            "stage3_max_live_parameters": 1e8,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "offload_param": {"device": "none"},
        },
        "activation_checkpointing": {"cpu_checkpointing": True},
        "elasticity": {"enabled": False, "max_train_batch_size": 2000},
    }
    with pytest.warns(UserWarning) as caught:
        assert Config.from_deepspeed(config) == Config(gradient_clipping=1.0)
    (warning,) = caught
    named = {part.split(": ")[0] for part in str(warning.message).split("configuration: ")[1].split("; ")}
    assert named == {
        "fp16.auto_cast",
        "fp16.loss_scale",
        "bf16.check_grad_overflow",
        "torch_autocast.dtype",
        "zero_optimization.overlap_comm",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.offload_optimizer",
        "activation_checkpointing",
        "elasticity.max_train_batch_size",
    }


def test_stage_1_of_zero():
    for asked in ({"stage": 1}, True):
        assert Config.from_deepspeed({"zero_optimization": asked}).zero_stage == 1
    with pytest.warns(UserWarning, match="zero_optimization.reduce_bucket_size: XLA plans the communication$"):
        Config.from_deepspeed(
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e7, "contiguous_gradients": True}}
        )


def test_defaults_of_deepspeed_ask_for_nothing():
    config = {
        section: {key: value for key, value in keys.items() if section != "pipeline"}
        for section, keys in KEYS.items()
        if "." not in section
    }
    config["steps_per_print"] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Config.from_deepspeed(config) == Config(gradient_clipping=1.0)
