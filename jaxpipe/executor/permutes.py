"""Refuses programs in which XLA permutes something inside of an op, before they hang; see `whole_dims`."""

import re
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh

from jaxpipe.errors import ShardingError
from jaxpipe.executor import scopes
from jaxpipe.mesh import PIPE, further_axes
from jaxpipe.model.shapes import signature

_PERMUTE = re.compile(r" collective-permute(?:-start)?\(.*op_name=\"([^\"]*)\"")


class Checked:
    """A jitted function whose program is looked at before it runs for the first time on such shapes.

    Only on CPUs, where such a program ends the process after a minute, and if the mesh has several ranks and further axes.
    It is compiled once: the call finds what was compiled to be looked at.
    """

    def __init__(self, jitted: Any, mesh: Mesh):
        self.jitted = jitted
        on_cpu, several = mesh.devices.flat[0].platform == "cpu", any(n > 1 for n in further_axes(mesh).values())
        self._looks = on_cpu and several and mesh.shape.get(PIPE, 1) > 1
        self._seen: set[Any] = set()

    def __call__(self, *args: Any, **static: Any) -> Any:
        if self._looks and not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args)):
            shapes = signature(args), *static.values()
            if shapes not in self._seen:
                refuse_permutes(self.jitted.lower(*args, **static).compile().as_text() or "")
                self._seen.add(shapes)
        return self.jitted(*args, **static)

    def lower(self, *args: Any, **static: Any) -> jax.stages.Lowered:
        """As that of the jitted function."""
        return self.jitted.lower(*args, **static)

    def trace(self, *args: Any, **static: Any) -> jax.stages.Traced:
        """As that of the jitted function."""
        return self.jitted.trace(*args, **static)


def refuse_permutes(text: str) -> None:
    """Looks at the text of a compiled program.

    Raises:
      ShardingError: it has a permute inside of an op.
    """
    for name in _PERMUTE.findall(text):
        if scopes.read(name).kind is not None:
            raise ShardingError(
                f"The compiler makes {name.rpartition('/')[2]!r} (of {name}) with a permute between the devices of one "
                "rank. It would wait for ever, because all devices of the mesh take part in a permute, and the ranks run "
                "different layers at one time. It comes from a dim that is cut over one further axis in one place and over "
                "another one in the next. Say how that dim is cut with jaxpipe.parallel.constrain, or cut params over "
                "fewer axes (sharding=, axis_rules=)."
            )
