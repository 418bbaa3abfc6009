"""Makes device meshes, which no other module does, and answers questions about them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxpipe.checks import as_count, did_you_mean, show
from jaxpipe.device_order import arrange, choose
from jaxpipe.errors import MeshError

PIPE = "pipe"
DATA = "data"


def make_mesh(
    pipe: int = 1,
    data: int = 1,
    *,
    devices: Sequence[Any] | None = None,
    inside: str = DATA,
    **axes: int,
) -> Mesh:
    """Makes the mesh that a pipeline runs on.

    Args:
      pipe: the number of ranks of the pipeline. A rank holds one stage, or several with some schedules.
      data: the number of data ranks. The rows of each micro-batch are split over them.
      devices: the devices to use, in the order of the mesh; by default so many of `jax.devices()`, the first ones of each
        process.
      inside: with several processes, the axis that stays inside a process as far as its devices suffice: "data", so that
        gradients are summed inside, and activations go from process to process; or "pipe", the other way round. Further
        axes stay inside before both. On a TPU this orders the axes by how close their devices are on the torus, and
        neighbours on "pipe" are neighbours there in any case that its shape allows.
      **axes: further mesh axes with their sizes, such as `model=2`, `expert=4` or `sequence=2`. The computation along them
        is left to the compiler; which params are cut over them is said by annotations of flax, or by the rules of a
        `PipelineModule`.

    Returns:
      A `jax.sharding.Mesh` with the axes `("pipe", "data", *axes)`, all of `AxisType.Auto`.

    Raises:
      MeshError: a size is no integer of at least 1, there are too few devices, not all processes can have equally many,
        `devices` holds something else, or `inside` is no such axis.
    """
    sizes: dict[str, int] = {}
    for axis, size in {PIPE: pipe, DATA: data, **axes}.items():
        if (number := as_count(size)) is None:
            raise MeshError(f"make_mesh({axis}={show(size)}): the size of a mesh axis is an integer of at least 1.")
        sizes[axis] = number
    if not isinstance(inside, str) or inside not in (PIPE, DATA):  # pyright: ignore[reportUnnecessaryIsInstance]
        hint = did_you_mean(inside, (PIPE, DATA)) if isinstance(inside, str) else ""
        raise MeshError(
            f'make_mesh(inside={show(inside)}): it is the axis that stays inside a process, "data" or "pipe".{hint}'
        )
    found = list(jax.devices()) if devices is None else _as_devices(devices)
    needed = math.prod(sizes.values())
    if len(found) < needed:
        shape = " x ".join(f"{axis}={show(size)}" for axis, size in sizes.items())
        there = f"there are {len(found)}" if devices is None else f"devices= holds {len(found)}"
        raise MeshError(
            f"make_mesh: {shape} needs {show(needed)} devices, but {there}"
            f"{f' ({found[0].platform})' if found else ''}. Use smaller axes, or simulate devices on the CPU: "
            f'jax.config.update("jax_num_cpu_devices", {show(needed)}) right after `import jax`, or '
            f"XLA_FLAGS=--xla_force_host_platform_device_count={show(needed)} in the environment."
        )
    if devices is None:
        grid = arrange(choose(found, needed), sizes, outer=DATA if inside == PIPE else PIPE, inside=inside)
    else:
        grid = np.asarray(found[:needed], dtype=object).reshape(tuple(sizes.values()))
    # With Explicit axes, the default of jax.make_mesh, users' layers would have to state the sharding of every array.
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _as_devices(devices: Any) -> list[Any]:  # of jax.Device, which type checkers take for a variable
    """A flat list of the devices in a sequence or an array; raises MeshError if it holds something else, or one twice."""
    try:
        found = list(np.asarray(list(devices), dtype=object).flat)
    except TypeError:
        found = [devices]
    odd = next((device for device in found if not hasattr(device, "platform")), None)
    if odd is not None:
        raise MeshError(
            f"make_mesh(devices=...) holds {show(odd)}: expected a sequence of devices, as jax.devices() is."
        )
    if len(set(found)) < len(found):
        raise MeshError("make_mesh(devices=...) holds a device twice: each can have one place in the mesh.")
    return found


def pipe_size(mesh: Mesh) -> int:
    """The number of pipeline ranks of a mesh.

    Raises:
      MeshError: it is no mesh, has no axis named "pipe", or has axes of other types than Auto.
    """
    if not isinstance(mesh, Mesh):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not be typed
        raise MeshError(f"mesh={show(mesh)}: expected a jax.sharding.Mesh, such as jaxpipe.make_mesh(pipe=2, data=2).")
    if PIPE not in mesh.shape:
        raise MeshError(
            f'The mesh has the axes {tuple(mesh.shape)}, but stages live on an axis named "pipe". '
            "Make it with jaxpipe.make_mesh(pipe=..., data=...)."
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise MeshError(
            f"The mesh axes {mesh.axis_names} have the types {mesh.axis_types}, but layers are written without "
            "shardings in their types. Make the mesh with jaxpipe.make_mesh, or pass axis_types=(AxisType.Auto, ...)."
        )
    return mesh.shape[PIPE]


def data_size(mesh: Mesh) -> int:
    """The number of data ranks of a mesh; 1 if it has no axis named "data"."""
    return mesh.shape.get(DATA, 1)


def data_ranks_of(mesh: Mesh, process: int) -> tuple[int, ...]:
    """The data ranks of which a process holds devices, in order."""
    if DATA not in mesh.axis_names:
        return (0,)
    by_rank = np.moveaxis(mesh.devices, mesh.axis_names.index(DATA), 0)
    return tuple(
        rank for rank, devices in enumerate(by_rank) if any(device.process_index == process for device in devices.flat)
    )


def on_tpu(mesh: Mesh) -> bool:
    """Whether the devices are TPUs, also ones that are described only and not there."""
    return mesh.devices.flat[0].platform == "tpu"


def permutes_block(mesh: Mesh) -> bool:
    """Whether a device stands still from the time it comes to a permute until the other devices have come to it, too.

    XLA's programs for CPUs do one thing after another. Those for accelerators go on with ops that do not need the result.
    """
    return mesh.devices.flat[0].platform == "cpu"


def manual_axes(mesh: Mesh) -> frozenset[str]:
    """The mesh axes that the compiled loop handles itself, and does not leave to the compiler.

    The data axis is one of them, because the compiler would put the all-reduce of the gradients inside the loop, once per
    micro-batch.
    """
    return frozenset({PIPE, DATA} & set(mesh.axis_names))


def further_axes(mesh: Any) -> dict[str, int]:
    """The mesh axes beside "pipe" and "data", with their sizes: they are left to the compiler.

    The mesh may also be an abstract one, such as `jax.sharding.get_abstract_mesh()`.
    """
    return {axis: size for axis, size in mesh.shape.items() if axis not in (PIPE, DATA)}


def rank_mesh(mesh: Mesh, rank: int) -> Mesh:
    """The devices of one pipeline rank, as a mesh with the other axes, or with the axis "data" if there are no others."""
    axis = mesh.axis_names.index(PIPE)
    names = tuple(name for name in mesh.axis_names if name != PIPE)
    devices = np.take(mesh.devices, [rank], axis=axis)
    if not names:
        names = (DATA,)
    else:
        devices = devices.squeeze(axis)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def one_device_mesh(device: Any, axes: Iterable[str]) -> Mesh:
    """A mesh of one device, with the given axes, or with "data" if there are none."""
    names = tuple(sorted(axes)) or (DATA,)
    grid = np.asarray([device], dtype=object).reshape((1,) * len(names))
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def process_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh of the axes "process" and "device", one row for each process that has some of the devices.

    All rows are as long as the shortest one, so some devices may be left out.
    """
    rows: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        rows.setdefault(device.process_index, []).append(device)
    shortest = min(map(len, rows.values()))
    grid = np.asarray([row[:shortest] for row in rows.values()], dtype=object)
    return Mesh(grid, ("process", "device"), axis_types=(AxisType.Auto,) * 2)
