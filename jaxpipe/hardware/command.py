"""What `python -m jaxpipe compile` does: finds the user's function, makes the mesh, and prints the report."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxpipe.checks import did_you_mean, show
from jaxpipe.errors import ConfigError
from jaxpipe.hardware.compile import compile
from jaxpipe.hardware.report import Report
from jaxpipe.hardware.topology import platforms, topology
from jaxpipe.mesh import make_mesh


@dataclass(frozen=True)
class Command:
    """The arguments of the command line.

    Attributes:
      function: `package.module:function`; called without arguments, it returns (module, optimizer, example, config).
      topology: as for `jaxpipe.topology`; None takes the devices of this machine.
      pipe, data: sizes of the mesh axes.
      axes: further ones, `name=size` each.
      evaluation: whether to compile an evaluation.
    """

    function: str
    topology: str | None = None
    pipe: int = 1
    data: int = 1
    axes: Sequence[str] = ()
    evaluation: bool = False

    def run(self) -> Report:
        """Compiles what the function returns.

        Raises:
          JaxpipeError: the function cannot be found or returns something else, or what `jaxpipe.compile` raises.
        """
        further = _axes(self.axes)
        if self.topology is not None and not platforms():
            jax.config.update("jax_platforms", "cpu")  # a TPU or GPU that is there has no part in it
        found = called(self.function)
        devices = None if self.topology is None else topology(self.topology)
        module, optimizer, example, config = found
        mesh = make_mesh(self.pipe, self.data, devices=devices, **further)  # type: ignore[arg-type]
        return compile(module, optimizer, mesh=mesh, example=example, config=config, evaluation=self.evaluation)


def _axes(given: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in given:
        name, _, size = text.partition("=")
        if not name.isidentifier() or not size.isdigit() or name in found or name in ("pipe", "data"):
            raise ConfigError(
                f"--axis {text}: write the name of a further mesh axis and its size, such as --axis model=4; pipe and data "
                "have options of their own."
            )
        found[name] = int(size)
    return found


def called(spec: str) -> tuple[Any, Any, Any, Any]:
    """What the function of a user, `package.module:function`, returns: (module, optimizer, example, config).

    Raises:
      ConfigError: it cannot be found, or returns something else.
    """
    path, _, name = spec.partition(":")
    if not path or not name.isidentifier():
        raise ConfigError(f"{show(spec)}: write package.module:function, such as my_project.model:training.")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
            raise  # it imports something that is not installed: the traceback says what
        raise ConfigError(
            f"{show(spec)}: there is no module {error.name!r}. Start the command where `import {path}` works."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{show(spec)}: {path} has no function {name!r}.{did_you_mean(name, vars(module))}")
    found = function()
    if isinstance(found, Mapping) or not isinstance(found, (tuple, list)) or len(found) != 4:
        raise ConfigError(
            f"{show(spec)} returned {show(found)}: it must return (module, optimizer, example, config), what "
            "jaxpipe.initialize is given; config may be None."
        )
    return found[0], found[1], found[2], found[3]
