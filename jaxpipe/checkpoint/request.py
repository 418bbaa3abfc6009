"""Checks what `save_checkpoint` and `load_checkpoint` were asked for, and that all processes were asked for the same."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import manifest
from jaxpipe.checkpoint.manifest import Json
from jaxpipe.checkpoint.write import Order
from jaxpipe.checks import as_count
from jaxpipe.errors import CheckpointError
from jaxpipe.processes.group import Group


class Request(NamedTuple):
    """The arguments of `Engine.save_checkpoint`, as they were passed."""

    directory: str | os.PathLike[str]
    tag: str | None
    client_state: dict[str, Any] | None
    save_latest: bool
    blocking: bool
    keep: int | None
    data_iter: Any


class Accepted(NamedTuple):
    """A request that can be met.

    Attributes:
      order: what to write, and where; the same on all processes.
      client_state: that of this process, copied, because it may be written later.
      data_state, data_states: for the manifest.
    """

    order: Order
    client_state: dict[str, Any]
    data_state: Json
    data_states: list[Json] | None


def accept(request: Request, default_tag: str, group: Group) -> Accepted:
    """Checks a request before anything is written. A collective: every process calls it with its own request.

    Raises:
      CheckpointError: on all processes, if a request cannot be met, or the requests differ.
    """

    def check() -> tuple[Order, dict[str, Any], Json]:
        check_flags({"save_latest": request.save_latest, "blocking": request.blocking})
        client_state = _client_state(request.client_state)
        keep = None if request.keep is None else as_count(request.keep)
        if keep is None and request.keep is not None:
            raise CheckpointError(
                f"keep={request.keep!r}: expected how many checkpoints to keep, 1 or more, or None for all."
            )
        directory = folders.as_directory(request.directory)
        tag = folders.check_tag(default_tag if request.tag is None else request.tag)
        order = Order(directory, tag, request.save_latest, keep, request.blocking)
        return order, client_state, data_state(request.data_iter)

    order, client_state, state = group.together(check)
    agree(group, "save_checkpoint", order._asdict() | {"data_iter": request.data_iter is not None})
    states = group.gather(state)
    same = all(each == states[0] for each in states)
    return Accepted(order, client_state, states[0] if same else None, None if same else states)


def check_flags(flags: Mapping[str, object]) -> None:
    """Raises CheckpointError if a flag is not True or False."""
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise CheckpointError(f"{flag}={value!r}: expected True or False.")


def _client_state(given: object) -> dict[str, Any]:
    state = {} if given is None else given
    if not isinstance(state, dict):
        raise CheckpointError(f"client_state is a {type(state).__name__}: expected a dict.")
    try:
        manifest.check_json(state, "client_state")
    except RecursionError:
        raise CheckpointError("client_state contains itself, or is nested too deep: JSON cannot hold that.") from None
    return copy.deepcopy(state)


def data_state(data_iter: Any) -> dict[str, Json] | None:
    """What a data iterator says about where it stands, as a JSON value; None if there is no iterator.

    Raises:
      CheckpointError: the iterator has no `get_state`, or what it returns cannot be stored.
    """
    if data_iter is None:
        return None
    if not hasattr(data_iter, "get_state"):
        raise CheckpointError(
            f"data_iter is a {type(data_iter).__name__} without get_state(): expected an iterator that knows where it "
            "stands, such as grain's. Leave it out; engine.micro_batches_seen is stored in any case."
        )
    return manifest.encode_data_state(data_iter.get_state())


def agree(group: Group, call: str, arguments: Mapping[str, object]) -> None:
    """Compares arguments over the processes. A collective.

    Args:
      call: the name of the function that they were passed to.

    Raises:
      CheckpointError: on all processes, if they differ. The message says which process passed what.
    """
    found = group.gather({name: _text(value) for name, value in arguments.items()})
    for name in arguments:
        for member, said in zip(group.members, found, strict=True):
            if said[name] != found[0][name]:
                raise CheckpointError(
                    f"{call} was called with {name}={found[0][name]} on process {group.members[0]} and with "
                    f"{name}={said[name]} on process {member}: expected the same on all processes."
                )


def _text(value: object) -> str:
    return repr(str(value) if isinstance(value, Path) else value)
