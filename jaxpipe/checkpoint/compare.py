"""Compares the arrays that a checkpoint has with those that the model expects, before any of them is read."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.checkpoint.homes import LAYER_STATE, LOSS_SCALE, OPT_STATE, PARAMS, STATE, layer_item
from jaxpipe.checkpoint.manifest import ArraySpec, Manifest
from jaxpipe.checkpoint.verify import stored
from jaxpipe.errors import CheckpointError
from jaxpipe.training.state import TrainState

Wanted = Mapping[str, Mapping[str, ArraySpec]]  # by item and name


class Selection(NamedTuple):
    """What to load of a checkpoint; see `Engine.load_checkpoint`.

    Attributes:
      strict: whether arrays that only the model or only the checkpoint has are an error.
      optimizer: whether to load the state of the optimizer.
      module_only: whether to load the params and the state of the layers, and nothing else.
    """

    strict: bool
    optimizer: bool
    module_only: bool

    def takes(self, name: str) -> bool:
        """Whether the array of this name is asked for."""
        head = name.split("/")[0]
        if head in (PARAMS, LAYER_STATE):
            return True
        return not self.module_only and (head != OPT_STATE or self.optimizer)


def wanted_arrays(
    path: Path,
    made: Manifest,
    expected: Wanted,
    selection: Selection,
    frozen: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> tuple[Wanted, str | None]:
    """Which arrays to read of each item: those that the model expects and the checkpoint has.

    Args:
      frozen: for each item, the paths of the params that are frozen now. What an optimizer once kept about them is of no
        use, and is left where it is.

    Returns:
      The arrays, by item and name; and a warning if these are not all, which happens only if loading is not strict.

    Raises:
      CheckpointError: shapes or dtypes differ, or (if loading is strict) one of both has arrays that the other lacks.
    """
    there = stored(made)
    names = {layer_item(index): layer.name for index, layer in enumerate(made.layers)}
    wanted: dict[str, dict[str, ArraySpec]] = {}
    missing: list[_Odd] = []
    extra: list[_Odd] = []
    for item in sorted(there.keys() | expected.keys()):
        title = f"{item} ({names[item]})" if item in names else item
        mine = {name: spec for name, spec in expected.get(item, {}).items() if selection.takes(name)}
        theirs = {name: spec for name, spec in there.get(item, {}).items() if selection.takes(name)}
        for name in mine:
            if name in theirs and mine[name] != theirs[name]:
                raise CheckpointError(
                    f"{path / item}: {title} {name}: expected {mine[name]}, found {theirs[name]}. The checkpoint is of a "
                    "model with other shapes or dtypes."
                )
        missing += [
            _Odd(title, name, mine[name]) for name in mine if name not in theirs and not _may_differ(item, name)
        ]
        extra += [
            _Odd(title, name, theirs[name])
            for name in theirs
            if name not in mine and not _may_differ(item, name) and not _is_about(name, frozen.get(item, ()))
        ]
        wanted[item] = {name: spec for name, spec in theirs.items() if name in mine}
    warning = _misfit(path, missing, extra, selection) if missing or extra else None
    if selection.strict and (unlisted := sorted(p.name for p in path.glob("layer_*") if p.name not in there)):
        raise CheckpointError(
            f"{path}: expected the items of {len(made.layers)} layers, as its manifest says, found {', '.join(unlisted)} "
            "beside them. Remove what does not belong there, or pass load_module_strict=False."
        )
    return wanted, warning


def _may_differ(item: str, name: str) -> bool:
    """Whether only one of both may have an array: a run may go on in another precision, with a scale of its own then."""
    return item == STATE and name.split("/")[0] == LOSS_SCALE


def _is_about(name: str, params: Collection[str]) -> bool:
    """Whether an array of an item is what an optimizer keeps about one of some params of the layer."""
    head, *parts = name.split("/")
    return head == OPT_STATE and any("/".join(parts[start:]) in params for start in range(len(parts) + 1))


class _Odd(NamedTuple):
    """An array that only the model or only the checkpoint has."""

    item: str
    name: str
    spec: ArraySpec


def _misfit(path: Path, missing: list[_Odd], extra: list[_Odd], selection: Selection) -> str:
    found = "; ".join(
        f"{what} {_some(arrays)}" for what, arrays in (("it lacks", missing), ("it also has", extra)) if arrays
    )
    if not selection.strict:
        return f"{path} does not fit the model: {found}. The rest was loaded."
    optimizer = all(odd.name.split("/")[0] == OPT_STATE for odd in missing + extra)
    what, way_out = (
        ("optimizer", _OPTIMIZER)
        if optimizer
        else ("model", "Load it into the model that wrote it, or pass load_module_strict=False to load what fits.")
    )
    raise CheckpointError(f"{path}: expected the arrays of this {what}, found others: {found}. {way_out}")


_OPTIMIZER = (
    "Use the optimizer that wrote it, and train no params that were frozen then; or pass load_optimizer_states=False, with "
    "which the optimizer begins afresh, or load_module_strict=False, with which it does so for what is missing."
)


def _some(arrays: list[_Odd], most: int = 4) -> str:
    more = f" and {len(arrays) - most} more" if len(arrays) > most else ""
    return ", ".join(f"{odd.item} {odd.name} {odd.spec}" for odd in arrays[:most]) + more


def check_key(path: Path, made: Manifest, state: TrainState) -> None:
    """Checks that the PRNG key of the checkpoint is of the same kind as that of the state.

    Raises:
      CheckpointError: it is of another kind.
    """
    typed = jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    mine = str(jax.random.key_impl(state.key)) if typed else None
    if mine != made.key_impl:
        raise CheckpointError(
            f"{path}: expected a PRNG key of kind {mine or 'uint32'}, found {made.key_impl or 'uint32'}. Pass such a key "
            "to jaxpipe.initialize, or load_module_only=True."
        )
