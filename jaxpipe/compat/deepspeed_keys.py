"""The keys of a DeepSpeed configuration: what happens to each, and the value with which it asks for nothing.

Source: https://github.com/deepspeedai/DeepSpeed, deepspeed/runtime/config.py and the files beside it that it reads.
"""

from collections.abc import Mapping

MAPPED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "pipeline",
    "zero_optimization",
    "data_types",
    "bf16",
    "bfloat16",
    "fp16",
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
    "pipeline.stages": "DeepSpeed does not read it either; make_mesh(pipe=...) decides",
    "pipeline.partition": "DeepSpeed does not read it either; PipelineModule(partition_method=...) decides",
    "pipeline.seed_layers": "DeepSpeed does not read it either; every layer draws from its own key here",
    "pipeline.pipe_partitioned": NETWORK,
    "pipeline.grad_partitioned": NETWORK,
    "pipeline.use_reentrant": NO_NEED,
}

REFUSED = (
    "amp",
    "torch_autocast",
    "progressive_layer_drop",
    "compression_training",
    "quantize_training",
    "weight_quantization",
    "sparse_attention",
    "elasticity",
    "zero_optimization.offload_param",
    "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload",
    "zero_optimization.cpu_offload_param",
    "zero_optimization.zenflow",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zeropp_loco_param",
)

# A key in one of these sections is ignored, for this reason, if its value is not the default.
SWITCHED_OFF = {
    **{
        section: f"{section} is switched off"
        for section in ("bf16", "bfloat16", "fp16", *REFUSED)
        if "." not in section
    },
    "zero_optimization": "ZeRO is switched off",
}

# Keys that are refused unless they have their usual value, which many files spell out: other values train something else.
ONLY = {"managed_gradient_accumulation": (True,), "gradient_allreduce_op": ("mean",)}

_BF16 = {
    "enabled": False,
    "immediate_grad_update": False,
    "check_grad_overflow": False,
    "bf16_master_weights_and_grads": False,
    "bf16_optimizer_states": False,
}
_OFFLOAD = {"device": "none", "nvme_path": None, "buffer_count": None, "pin_memory": False}
_MONITOR = {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"}

# For each section, its keys with their defaults in DeepSpeed. A default asks for nothing, and so do false and null.
# Sections that are not listed here belong to other programs, or are ignored or refused as a whole.
KEYS: Mapping[str, Mapping[str, object]] = {
    "fp16": {
        "enabled": False,
        "auto_cast": False,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
        "fp16_master_weights_and_grads": False,
    },
    "bf16": _BF16,
    "bfloat16": _BF16,
    "torch_autocast": {"enabled": False, "dtype": None, "lower_precision_safe_modules": None},
    "data_types": {"grad_accum_dtype": None},
    "pipeline": dict.fromkeys(
        ("stages", "partition", "seed_layers", "activation_checkpoint_interval")
        + ("pipe_partitioned", "grad_partitioned", "use_reentrant")
    ),
    "activation_checkpointing": {
        "partition_activations": False,
        "contiguous_memory_optimization": False,
        "cpu_checkpointing": False,
        "number_checkpoints": None,
        "synchronize_checkpoint_boundary": False,
        "profile": False,
    },
    "optimizer": {"type": None, "params": None, "legacy_fusion": False},
    "scheduler": {"type": None, "params": None},
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": {"enabled": False, "group": None, "team": None, "project": "deepspeed"},
    "flops_profiler": {
        "enabled": False,
        "recompute_fwd_factor": 0.0,
        "profile_step": 1,
        "module_depth": -1,
        "top_modules": 1,
        "detailed": True,
        "output_file": None,
    },
    "comms_logger": {"enabled": False, "prof_all": True, "prof_ops": [], "verbose": False, "debug": False},
    "zero_optimization": {
        "stage": 0,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "use_multi_rank_bucket_allreduce": True,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": None,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "offload_param": None,
        "offload_optimizer": None,
        "zenflow": None,
        "sub_group_size": 1e9,
        "cpu_offload": None,
        "cpu_offload_param": None,
        "cpu_offload_use_pin_memory": None,
        "ignore_unused_parameters": True,
        "legacy_stage1": False,
        "round_robin_gradients": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "zeropp_loco_param": None,
        "mics_shard_size": -1,
        "mics_hierarchical_params_gather": False,
        "memory_efficient_linear": True,
        "pipeline_loading_checkpoint": False,
        "override_module_apply": True,
        "log_trace_cache_warnings": False,
        "enable_sanity_checks": False,
        "save_muon_momentum_buffer_in_memory": False,
        "leaf_module": None,
        "stage3_gather_fp16_weights_on_model_save": False,
        **{
            f"{prefix}{key}": default
            for prefix in ("", "stage3_")
            for key, default in {
                "prefetch_bucket_size": 5e7,
                "param_persistence_threshold": 1e5,
                "model_persistence_threshold": None,
                "max_live_parameters": 1e9,
                "max_reuse_distance": 1e9,
                "gather_16bit_weights_on_model_save": False,
                "module_granularity_threshold": 0,
                "use_all_reduce_for_fetch_params": False,
                "allgather_sequential": False,
                "partition_stream_chunk_size": 0,
            }.items()
        },
    },
    "zero_optimization.offload_param": {**_OFFLOAD, "buffer_size": None, "max_in_cpu": None},
    "zero_optimization.offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read": False,
        "pipeline_write": False,
        "fast_init": False,
        "ratio": 1.0,
        "super_offload": False,
        "convert_grad_on_cpu": True,
        "cpuadam_cores_perc": 0.8,
    },
}
