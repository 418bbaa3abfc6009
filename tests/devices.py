"""Devices that are not there, with the attributes that the order of a mesh is made of."""

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    platform: str = "cpu"


@dataclass(frozen=True)
class Chip(Device):
    coords: tuple[int, int, int] = (0, 0, 0)
    slice_index: int = 0
    core_on_chip: int = 0
    device_kind: str = "TPU v5"


def cpus(*per_process):
    """So many devices in each process."""
    owners = [process for process, count in enumerate(per_process) for _ in range(count)]
    return [Device(number, process) for number, process in enumerate(owners)]


def chips(shape, host=(2, 2, 1), slices=1, kind="TPU v5"):
    """The chips of TPU slices, hosts of 2 x 2 x 1 chips one after the other, as `jax.devices()` gives them."""
    found = []
    hosts = [range(size // part) for size, part in zip(shape, host, strict=True)]
    for number, place in enumerate(itertools.product(range(slices), *reversed(hosts))):
        for inner in itertools.product(*map(range, reversed(host))):
            coords = [h * size + i for h, size, i in zip(place[1:], reversed(host), inner, strict=True)]
            found.append(Chip(len(found), number, "tpu", tuple(reversed(coords)), place[0], device_kind=kind))
    return found


def owners(grid):
    """The process of each device of an array."""
    return np.vectorize(lambda device: device.process_index, otypes=[int])(grid)
