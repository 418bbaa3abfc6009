"""`topology`: devices of a TPU slice or of GPU machines that are not there, for compilers that need none."""

import importlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from jaxpipe.checks import did_you_mean, show
from jaxpipe.errors import HardwareError
from jaxpipe.hardware.chips import CHIPS

_EXAMPLES = '"v5e:2x4", "v5p:4x4x4", "v6e:4x4" (chips of a TPU slice along its axes), or "h100:8" (GPUs)'
_GPUS_PER_MACHINE = 8
_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@dataclass(frozen=True)
class _Gpu:
    """What XLA wants to know about a GPU.

    Attributes:
      name: of the device.
      capability: the compute capability, (major, minor).
      cores: streaming multiprocessors.
      fpus: float32 units in each of them.
      shared, block: bytes of shared memory per multiprocessor, and of that what one block may have.
      bandwidth: of the memory, bytes per second.
      cache: level 2, bytes.
      clock: GHz.
      memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    shared: int
    block: int
    bandwidth: int
    cache: int
    clock: float
    memory: int


# By NVIDIA's white papers of the architectures and the CUDA programming guide (table of compute capabilities).
_GPUS = {
    "a100": _Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167_936, 166_912, 2_039_000_000_000, 41_943_040, 1.41, 85_097_971_712
    ),
    "h100": _Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233_472, 232_448, 3_352_320_000_000, 52_428_800, 1.98, 84_942_979_072
    ),
    "h200": _Gpu(
        "NVIDIA H200", (9, 0), 132, 128, 233_472, 232_448, 4_800_000_000_000, 62_914_560, 1.98, 150_754_820_096
    ),
}


def topology(name: str) -> list[Any]:
    """The devices of hardware that this machine does not have, for `make_mesh` and `compile`.

    Nothing runs on them, and a process with one CPU device can make them: only the compiler is needed.

    Args:
      name: a TPU slice as Cloud TPU writes it, version and chips along each axis: "v5e:4x4", "v5p:4x4x4". Or a GPU and how
        many of them: "h100:8"; machines hold 8 each. A v4 or v5p chip is one device, both of its cores together.

    Returns:
      A list of devices, in the order of the compiler: `jaxpipe.make_mesh(pipe=4, data=4, devices=jaxpipe.topology(...))`.

    Raises:
      HardwareError: the compiler is not installed (the message says what to install), or it knows no such topology.
    """
    found = re.fullmatch(r"([A-Za-z0-9]+):(\d+(?:x\d+)*)", name) if isinstance(name, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if found is None:
        raise HardwareError(f"topology({show(name)}): expected a name such as {_EXAMPLES}.")
    kind, sizes = found[1].lower(), [int(size) for size in found[2].split("x")]
    if kind not in CHIPS:
        raise HardwareError(
            f"topology({show(name)}): {found[1]!r} is not a chip that is known here.{did_you_mean(kind, CHIPS)} Known: "
            f"{', '.join(CHIPS)}; write for example {_EXAMPLES}."
        )
    if not all(sizes):
        raise HardwareError(f"topology({show(name)}): there is no axis of 0 chips. Write for example {_EXAMPLES}.")
    return _gpus(name, kind, sizes) if kind in _GPUS else _tpus(name, kind, sizes)


def _tpus(name: str, kind: str, sizes: list[int]) -> list[Any]:
    if not _installed("libtpu"):
        raise HardwareError(
            f"topology({show(name)}) needs the TPU compiler, libtpu, which is not installed: pip install jaxpipe[tpu], on "
            "any Linux machine with x86-64, with or without a TPU."
        )
    # Without these libtpu asks a metadata server of Google Cloud what it runs on, for minutes if there is none, and allows
    # one process at a time, because a TPU can have one. Nothing here opens a TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # what Cloud TPU runs: one device for both cores
    if math.prod(sizes) < 4 or sizes == [1, 4]:
        options["chips_per_host_bounds"] = [*sizes, 1, 1][:3]  # less than what a machine holds
    try:
        return list(topologies.get_topology_desc(f"{kind}:{'x'.join(map(str, sizes))}", "tpu", **options).devices)
    except Exception as error:
        raise HardwareError(
            f"topology({show(name)}): the TPU compiler refuses it: {_first_line(error)} Slices of {kind} have "
            f"{'three axes' if kind in ('v4', 'v5p') else 'two axes'}; write for example {_EXAMPLES}."
        ) from error


def _gpus(name: str, kind: str, sizes: list[int]) -> list[Any]:
    if len(sizes) > 1:
        raise HardwareError(f'topology({show(name)}): GPUs are counted, as in "{kind}:{math.prod(sizes)}".')
    plugin = next(filter(_installed, _CUDA_PLUGINS), None)
    if plugin is None:
        raise HardwareError(
            f"topology({show(name)}) needs XLA's compiler for CUDA, which is not installed: pip install jaxpipe[cuda], on "
            "any Linux machine, with or without a GPU."
        )
    (count,) = sizes
    machines, rest = divmod(count, _GPUS_PER_MACHINE)
    if machines and rest:
        raise HardwareError(
            f"topology({show(name)}): machines hold {_GPUS_PER_MACHINE} GPUs each, so the number is at most "
            f"{_GPUS_PER_MACHINE}, or a multiple of it."
        )
    shape = f"1x{machines}x{_GPUS_PER_MACHINE}" if machines else f"1x1x{count}"
    try:
        return _made(plugin, kind, shape)
    except Exception as error:
        raise HardwareError(
            f"topology({show(name)}): XLA's compiler for CUDA cannot be used: {_first_line(error)} pip install --upgrade "
            "jaxpipe[cuda] installs one that fits."
        ) from error


def _made(plugin: str, kind: str, shape: str) -> list[Any]:
    """The devices.

    The plugin of JAX for CUDA looks for a GPU when it is loaded, and is not there for any use if it finds none, unless JAX
    was told to use other platforms. So JAX is told so for the time of the call; and if the plugin has been loaded in vain
    before, it is loaded again.
    """
    before = platforms()
    jax.config.update("jax_platforms", before or "cpu")
    options = {"target_config": _target(_GPUS[kind]), "topology": shape}
    try:
        try:
            return list(topologies.get_topology_desc(kind, "cuda", **options).devices)
        except NotImplementedError:
            importlib.import_module(plugin).initialize()
            return list(topologies.get_topology_desc(kind, "cuda", **options).devices)
    finally:
        jax.config.update("jax_platforms", before)


def _target(gpu: _Gpu) -> str:
    """The description that XLA reads, a `GpuTargetConfigProto` as text."""
    major, minor = gpu.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": gpu.shared,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "shared_memory_per_block_optin": gpu.block,
        "cuda_compute_capability": f"{{ major: {major} minor: {minor} }}",
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    info = " ".join(f"{key}{'' if str(value).startswith('{') else ':'} {value}" for key, value in fields.items())
    return (
        f'gpu_device_info {{ {info} }}\nplatform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 8 }}\n'
        f'runtime_version {{ major: 12 minor: 9 }}\ndevice_description_str: "{gpu.name}"\n'
    )


def platforms() -> str | None:
    """The platforms that JAX was told to use, if any."""
    return jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # not declared


def _installed(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    return (not parent or _installed(parent)) and importlib.util.find_spec(module) is not None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if text.endswith(".") else f"{text}."
