"""Which devices a mesh takes, and in which order: what talks much is put close together.

All mesh axes but "pipe" and "data" are *inner* ones: devices that differ only there are the closest. Then comes the axis
that is asked to stay *inside* a process, and the other one of the two is *outer*. The data axis is inside by default,
because the sum of the gradients is heavy, and neighbours on "pipe" exchange activations only.

    2 processes of 4 devices, pipe 4 x data 2       inside="data"          inside="pipe"
    (the process that holds each device)            data 0  0 0 1 1        data 0  0 0 0 0
                                                    data 1  0 0 1 1        data 1  1 1 1 1
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from jaxpipe.errors import MeshError

Devices = Sequence[Any]  # of jax.Device, or of anything with the same attributes


def choose(devices: Devices, needed: int) -> list[Any]:
    """So many of the devices, equally many of each process.

    Raises:
      MeshError: that is not possible.
    """
    processes = _grouped(devices, "process_index")
    if len(processes) == 1 or len(devices) == needed:
        return list(devices[:needed])
    each, rest = divmod(needed, len(processes))
    fewest = min(map(len, processes))
    if not rest and 0 < each <= fewest:
        return [device for own in processes for device in own[:each]]
    if needed < len(processes):
        why = "all processes must have a part, and some would have none"
    elif rest:
        why = f"all processes must have equally many of them, and {len(processes)} does not divide {needed}"
    else:
        why = f"all processes must have equally many of them, {each}, and one has {fewest} only"
    raise MeshError(
        f"make_mesh: {needed} of {len(devices)} devices in {len(processes)} processes are needed: {why}. Use sizes whose "
        f"product is {len(processes)} times the devices that each process is to give, or say which devices, "
        "devices=[...]; processes that have none of them then have no part in what runs on the mesh."
    )


def arrange(devices: Devices, sizes: Mapping[str, int], outer: str, inside: str) -> np.ndarray:
    """The devices as the array of a mesh.

    Args:
      devices: as many as the mesh has places.
      sizes: of the mesh axes, in their order.
      outer, inside: those of the axes that are not inner ones. With one process, and not on a TPU, the devices stay in the
        order in which they are, whatever these are.

    Returns:
      The devices in an array of the shape `sizes`. A process or a slice is a block of it wherever all have equally many
      devices. On a TPU, neighbours along "pipe" are neighbours on the torus where that can be had.
    """
    order = [outer, inside, *(axis for axis in sizes if axis not in (outer, inside))]
    on_torus = all(device.platform == "tpu" and hasattr(device, "coords") for device in devices)
    # Slices of TPUs are joined by a slower network than that between the chips of a slice, whatever process they are of.
    groups = _grouped(devices, "slice_index" if on_torus else "process_index")
    if len(groups) == 1 and not on_torus:
        return _array(devices).reshape(tuple(sizes.values()))
    if len(set(map(len, groups))) > 1:
        groups = [[device for own in groups for device in own]]
    block = _block({axis: sizes[axis] for axis in order}, len(groups[0]))
    blocks = [_on_torus(own, block) if on_torus else _array(own).reshape(tuple(block.values())) for own in groups]
    counts = [sizes[axis] // block[axis] for axis in order]
    # [groups of axis 0, 1, ..., places of axis 0, 1, ...] to [group and place of axis 0, of axis 1, ...]
    tiles = np.stack(blocks).reshape(*counts, *block.values())
    mixed = tiles.transpose([place for n in range(len(order)) for place in (n, n + len(order))])
    return mixed.reshape([sizes[axis] for axis in order]).transpose([order.index(axis) for axis in sizes])


def _grouped(devices: Devices, attribute: str) -> list[list[Any]]:
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, attribute, None) or 0, []).append(device)
    return [groups[key] for key in sorted(groups)]


def _array(devices: Devices) -> np.ndarray:
    array = np.empty(len(devices), dtype=object)
    array[:] = devices
    return array


def _block(sizes: Mapping[str, int], room: int) -> dict[str, int]:
    """The shape of the part of a mesh that `room` devices hold; `room` divides the number of places.

    It is as long as possible along the last axis, then along the one before it. Because `room` divides the product of the
    sizes, taking the common divisor with each of them uses it up.
    """
    block: dict[str, int] = {}
    for axis in reversed(list(sizes)):
        block[axis] = math.gcd(sizes[axis], room)
        room //= block[axis]
    assert room == 1
    return {axis: block[axis] for axis in sizes}


# ------------------------------------------------------------------------------------------------------------- TPU


def _on_torus(devices: Devices, block: Mapping[str, int]) -> np.ndarray:
    """The devices of one TPU slice in the shape of a block, so that steps along "pipe" are as short as can be had."""
    at = list(block).index("pipe")
    shortest: tuple[int, np.ndarray] | None = None
    for grid in _proposals(devices, block):
        grid = np.moveaxis(_straightened(np.moveaxis(grid, at, 0)), 0, at)
        longest = int(_steps(np.moveaxis(grid, at, 0)).max(initial=0))
        if shortest is None or longest < shortest[0]:
            shortest = longest, grid
    assert shortest is not None
    return shortest[1]


def _proposals(devices: Devices, block: Mapping[str, int]) -> Iterator[np.ndarray]:
    """Orders of devices, the best ones for the other axes first, and the plain order last."""
    shape = tuple(block.values())
    at = list(block).index("pipe")
    others = tuple(size for axis, size in block.items() if axis != "pipe")
    for wanted, split in ((shape, False), (shape, True), ((math.prod(others), block["pipe"]), True)):
        try:
            grid = mesh_utils.create_device_mesh(wanted, list(devices), allow_split_physical_axes=split)
        except (
            Exception
        ):  # it refuses shapes in many ways, and devices that are no box; there is always the plain order
            continue
        yield grid if wanted is shape else np.moveaxis(grid.reshape(*others, block["pipe"]), -1, at)
    yield _array(devices).reshape(shape)


def _steps(grid: np.ndarray) -> np.ndarray:
    """[pipe - 1] The length of each step along the first axis of a grid, in links of the torus; the longest of all rows.

    Links that close a ring are not counted, because not all slices have them.
    """
    coords = np.asarray([device.coords for device in grid.flat]).reshape(*grid.shape, -1)
    return np.abs(np.diff(coords, axis=0)).sum(-1).max(tuple(range(1, grid.ndim)))


def _straightened(grid: np.ndarray) -> np.ndarray:
    """The grid with its first axis in another order, so that it winds through the torus instead of jumping back.

    `mesh_utils` numbers the places of several torus dims like digits: 00 01 02 10 11 12. Every second run of short steps
    is reversed, 00 01 02 12 11 10, and the same again for runs of runs, as long as that leaves fewer jumps.
    """
    while (jumps := np.flatnonzero(_steps(grid) > 1) + 1).size:
        runs = np.split(grid, jumps)
        turned = np.concatenate([run[::-1] if number % 2 else run for number, run in enumerate(runs)])
        if (_steps(turned) > 1).sum() >= jumps.size:
            break
        grid = turned
    return grid
