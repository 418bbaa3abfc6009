"""Says in words which axes of a mesh cross processes."""

import numpy as np
from jax.sharding import Mesh

from jaxpipe.columns import counted, listed, ranges


def where(mesh: Mesh) -> list[str]:
    """Lines about the devices of a mesh and their processes, and about each axis that has more than one place."""
    owner = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    processes = sorted(set(owner.flat))
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = counted(mesh.devices.size, f"{mesh.devices.flat[0].platform} device")
    lines = [f"{shape}: {devices} in {counted(len(processes), 'process', 'processes')}"]
    if len(processes) > 1:
        lines += [_axis(name, owner, at) for at, (name, size) in enumerate(mesh.shape.items()) if size > 1]
    return lines


def _axis(name: str, owner: np.ndarray, at: int) -> str:
    """What is said about one axis; `owner` has the process of each device."""
    if (owner == owner.take([0], at)).all():
        return f"{name} stays inside a process"
    parts: list[tuple[list[int], list[int]]] = []  # (processes, the ranks in a row that are there)
    for rank in range(owner.shape[at]):
        held = sorted(set(owner.take(rank, at).flat))
        if not parts or parts[-1][0] != held:
            parts.append((held, []))
        parts[-1][1].append(rank)
    said = [
        f"{'rank' if len(ranks) == 1 else 'ranks'} {ranges(ranks)} in "
        f"{'process' if len(held) == 1 else 'processes'} {ranges(held)}"
        for held, ranks in parts
    ]
    return f"{name} crosses processes: {listed(said, between='; ')}"
