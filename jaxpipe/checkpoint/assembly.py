"""Puts a training state together from the items of a checkpoint: on the host first, and then on the devices.

A process puts together what its own devices hold, and nothing else: of each leaf the pieces that lie on them.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxpipe.checkpoint.homes import Home
from jaxpipe.layout.placement import fit
from jaxpipe.model.shapes import aval, is_key
from jaxpipe.model.values import raw_aval, typed
from jaxpipe.training.state import TrainState

Bounds: TypeAlias = tuple[tuple[int, int], ...]  # where a piece of an array lies: (start, stop) per dim
Pieces: TypeAlias = dict[Bounds, np.ndarray]


class Assembly:
    """A training state that is being put together on the host.

    Args:
      homes: of each leaf of the state.
      state: the present state. Rows of a stack for which no item comes, and its padding, are copied from there.
      shardings: of the new state, one per leaf.
      wanted: for each item, the names of the arrays that will come, on this process or on another one.
    """

    def __init__(
        self,
        homes: Sequence[Home],
        state: TrainState,
        shardings: TrainState,
        wanted: Mapping[str, Collection[str]],
    ):
        self._homes, self._wanted = homes, wanted
        self._present, structure = jax.tree.flatten(state)
        self._shardings: list[jax.sharding.Sharding] = structure.flatten_up_to(shardings)
        # What each device of this process holds of a leaf; devices that hold the same share a piece.
        self._bounds = [
            _bounds_here(sharding, raw_aval(aval(leaf)).shape)
            for leaf, sharding in zip(self._present, self._shardings, strict=True)
        ]
        self._pieces: list[Pieces] = [{} for _ in homes]

    def put(self, item: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes the arrays of an item, by name, in the shapes that the layer made."""
        for index, home in enumerate(self._homes):
            name = home.names.get(item)
            if name is None or name not in arrays:
                continue
            pieces, whole = self._pieces[index], arrays[name]
            distinct = dict.fromkeys(self._bounds[index].values())
            if home.places is None:
                pieces.update((each, _cut(whole, each)) for each in distinct)
                continue
            if not pieces:
                pieces.update((each, self._blank(index, each)) for each in distinct)
            rank, slot = home.places[item]
            for bounds, piece in pieces.items():
                first, end = bounds[0]
                if first <= rank < end:
                    piece[rank - first, slot] = _cut(whole, bounds[2:])

    def _blank(self, index: int, bounds: Bounds) -> np.ndarray:
        """A piece of a stack, with what lies there at present unless all of it is going to be replaced."""
        home, present = self._homes[index], self._present[index]
        (first, end), *_ = bounds
        places = home.places or {}
        coming = sum(
            first <= places[item][0] < end and name in self._wanted.get(item, ()) for item, name in home.names.items()
        )
        if coming == (end - first) * home.slots:
            return np.empty([stop - start for start, stop in bounds], present.dtype)
        for shard in present.addressable_shards:
            if _as_bounds(shard.index, present.shape) == bounds:
                return np.array(shard.data)
        return np.array(_cut(np.asarray(present), bounds))  # lies elsewhere, which only one process can be asked for

    def place(self, state: TrainState) -> tuple[TrainState, BaseException | None]:
        """Puts the new leaves on the mesh, one by one in the place of those of the present state, which are deleted.

        Never more than one leaf is on the devices twice. A leaf for which no item came stays as it is. There are no
        collectives in it.

        Returns:
          The new state, and None. If something goes wrong on the way: a state in which only some leaves are new, and the
          error.
        """
        leaves, structure = jax.tree.flatten(state)
        self._present.clear()
        try:
            for index, old in enumerate(leaves):
                pieces, self._pieces[index] = self._pieces[index], {}
                if pieces:
                    leaves[index] = _on_devices(pieces, self._bounds[index], self._shardings[index], old)
                    old.delete()
        except BaseException as error:  # also an interrupt from the keyboard
            return jax.tree.unflatten(structure, leaves), error
        return jax.tree.unflatten(structure, leaves), None


def _on_devices(
    pieces: Pieces, bounds: Mapping[Any, Bounds], sharding: jax.sharding.Sharding, old: jax.Array
) -> jax.Array:
    """An array like an old one, made of the pieces that the devices of this process hold. The pieces are used up."""
    last = {each: device for device, each in bounds.items()}
    shards: list[jax.Array] = []
    for device, each in bounds.items():
        piece = pieces.pop(each) if last[each] == device else pieces[each]
        shard = jax.block_until_ready(jax.device_put(piece, device))
        shards.append(typed(shard, aval(old)) if is_key(old) else shard)
        del piece
    return jax.make_array_from_single_device_arrays(old.shape, sharding, shards)


def _bounds_here(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[Any, Bounds]:
    """What each device of this process holds of an array, in the order of the devices in the sharding."""
    found = sharding.addressable_devices_indices_map(shape)
    return {device: _as_bounds(index or (), shape) for device, index in found.items()}


def _as_bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    whole = [slice(None)] * (len(shape) - len(index))
    return tuple(part.indices(size)[:2] for part, size in zip([*index, *whole], shape, strict=True))


def _cut(whole: np.ndarray, bounds: Bounds) -> np.ndarray:
    """A piece of an array, in memory of its own unless it is the whole; zeros where it reaches beyond the array."""
    piece = whole[tuple(slice(start, stop) for start, stop in bounds)]
    piece = fit(piece, [stop - start for start, stop in bounds])
    return piece if piece.size == whole.size or piece.base is None else piece.copy()
