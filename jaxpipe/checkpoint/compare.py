"""Compares the arrays that a checkpoint has with those that the model expects, before any of them is read."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.checkpoint.homes import OPT_STATE, PARAMS, layer_item
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
      module_only: whether to load the params and nothing else.
    """

    strict: bool
    optimizer: bool
    module_only: bool

    def takes(self, name: str) -> bool:
        """Whether the array of this name is asked for."""
        head = name.split("/")[0]
        if head == PARAMS:
            return True
        return not self.module_only and (head != OPT_STATE or self.optimizer)


def wanted_arrays(path: Path, made: Manifest, expected: Wanted, selection: Selection) -> Wanted:
    """Which arrays to read of each item: those that the model expects and the checkpoint has.

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
        missing += [_Odd(title, name, mine[name]) for name in mine if name not in theirs]
        extra += [_Odd(title, name, theirs[name]) for name in theirs if name not in mine]
        wanted[item] = {name: spec for name, spec in theirs.items() if name in mine}
    if missing or extra:
        _misfit(path, missing, extra, selection)
    if selection.strict and (unlisted := sorted(p.name for p in path.glob("layer_*") if p.name not in there)):
        raise CheckpointError(
            f"{path}: expected the items of {len(made.layers)} layers, as its manifest says, found {', '.join(unlisted)} "
            "beside them. Remove what does not belong there, or pass load_module_strict=False."
        )
    return wanted


class _Odd(NamedTuple):
    """An array that only the model or only the checkpoint has."""

    item: str
    name: str
    spec: ArraySpec


def _misfit(path: Path, missing: list[_Odd], extra: list[_Odd], selection: Selection) -> None:
    found = "; ".join(
        f"{what} {_some(arrays)}" for what, arrays in (("it lacks", missing), ("it also has", extra)) if arrays
    )
    if not selection.strict:
        warnings.warn(f"{path} does not fit the model: {found}. The rest was loaded.", stacklevel=7)
        return
    optimizer = all(odd.name.split("/")[0] == OPT_STATE for odd in missing + extra)
    what, way_out = (
        ("optimizer", "Use the optimizer that wrote it, or pass load_optimizer_states=False.")
        if optimizer
        else ("model", "Load it into the model that wrote it, or pass load_module_strict=False to load what fits.")
    )
    raise CheckpointError(f"{path}: expected the arrays of this {what}, found others: {found}. {way_out}")


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
