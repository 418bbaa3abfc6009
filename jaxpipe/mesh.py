"""Makes device meshes, which no other module does, and answers questions about them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxpipe.checks import as_count, show
from jaxpipe.errors import MeshError

PIPE = "pipe"
DATA = "data"


def make_mesh(pipe: int = 1, data: int = 1, *, devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """Makes the mesh that a pipeline runs on.

    Args:
      pipe: the number of ranks of the pipeline. One rank holds one stage.
      data: the number of data ranks. The rows of each micro-batch are split over them.
      devices: the devices to use, in the order of the mesh; by default the first `pipe * data * ...` of `jax.devices()`.
      **axes: further mesh axes with their sizes, such as `model=2`. They are left to the compiler: shard params over them
        with sharding annotations.

    Returns:
      A `jax.sharding.Mesh` with the axes `("pipe", "data", *axes)`, all of `AxisType.Auto`.

    Raises:
      MeshError: a size is no integer of at least 1, there are too few devices, or `devices` holds something else.
    """
    sizes: dict[str, int] = {}
    for axis, size in {PIPE: pipe, DATA: data, **axes}.items():
        if (number := as_count(size)) is None:
            raise MeshError(f"make_mesh({axis}={show(size)}): the size of a mesh axis is an integer of at least 1.")
        sizes[axis] = number
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


def manual_axes(mesh: Mesh) -> frozenset[str]:
    """The mesh axes that the compiled loop handles itself, and does not leave to the compiler.

    The data axis is one of them, because the compiler would put the all-reduce of the gradients inside the loop, once per
    micro-batch.
    """
    return frozenset({PIPE, DATA} & set(mesh.axis_names))


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
