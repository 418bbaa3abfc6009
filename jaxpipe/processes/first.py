"""Which of several processes prints what is the same on all of them."""

import jax
from jax.sharding import Mesh

from jaxpipe.processes.group import Group


def is_first(mesh: Mesh | None = None) -> bool:
    """Whether this process is the one that prints.

    Args:
      mesh: what is printed is about work on this mesh, and the first process that has a part of it prints. Without a mesh
        it is process 0 of all. Then JAX does not look for devices unless several processes were started, so this may be
        asked before a program has chosen its devices.
    """
    if mesh is not None:
        return Group.of(mesh).first
    return not jax.distributed.is_initialized() or jax.process_index() == 0
