"""Which rows of a micro-batch a process holds."""

import jax
from jax.sharding import Mesh

from jaxpipe.checks import as_count, show
from jaxpipe.errors import MeshError
from jaxpipe.mesh import data_ranks_of, data_size, pipe_size


def local_rows(mesh: Mesh, rows: int) -> slice:
    """The rows of a micro-batch that lie on the devices of this process.

    Processes that hold different stages of the same data ranks hold the same rows.

    Args:
      mesh: as `make_mesh` makes it.
      rows: those of a micro-batch on all data ranks.

    Returns:
      The slice of them, with a start, a stop and no step; all rows where no data rank is on another process only.

    Raises:
      MeshError: the data ranks do not divide the rows, this process has no device of the mesh, or its rows are not one
        slice.
    """
    return rows_of_process(mesh, rows, jax.process_index())


def rows_of_process(mesh: Mesh, rows: int, process: int) -> slice:
    """What `local_rows` is on a process of that number; every process can ask for every other one."""
    pipe_size(mesh)  # it must be a mesh of ours
    number, ranks = as_count(rows), data_size(mesh)
    if number is None:
        raise MeshError(f"local_rows(rows={show(rows)}): the rows of a micro-batch are an integer of at least 1.")
    if number % ranks:
        raise MeshError(
            f"local_rows: {number} rows cannot be split over {ranks} data ranks: they must be a multiple of it."
        )
    members = sorted({device.process_index for device in mesh.devices.flat})
    if process not in members:
        raise MeshError(
            f"local_rows: process {process} has no device of the mesh, so it holds no rows. Only the processes {members} "
            "have a part in it."
        )
    held = data_ranks_of(mesh, process)
    if held[-1] - held[0] + 1 != len(held):
        raise MeshError(
            f"local_rows: process {process} holds the data ranks {', '.join(map(str, held))} of {ranks}, so its rows are "
            "not one slice. Let each process yield whole micro-batches, or make the mesh with jaxpipe.make_mesh in another "
            'shape or with inside="data".'
        )
    each = number // ranks
    return slice(held[0] * each, (held[-1] + 1) * each)
