"""Compares what lies on the disk with the manifest. A save succeeds when that comparison does, not when no call failed.

The reason is that libraries have lost files, or not merged them, without raising an error. The comparison reads only the
descriptions of the arrays, so it takes a few milliseconds per item and no memory.
"""

from collections.abc import Mapping
from pathlib import Path

from jaxpipe.checkpoint import items, manifest
from jaxpipe.checkpoint.homes import STATE, layer_item
from jaxpipe.checkpoint.manifest import ArraySpec, Manifest
from jaxpipe.errors import CheckpointError


def stored(made: Manifest) -> dict[str, dict[str, ArraySpec]]:
    """The arrays of each item that the manifest names. Layers that hold nothing have an entry too, but no item on disk."""
    return {**{layer_item(index): layer.arrays for index, layer in enumerate(made.layers)}, STATE: made.state}


def check_written(folder: Path, made: Manifest, name: Path) -> None:
    """Compares a checkpoint on the disk with its manifest.

    Args:
      folder: where the checkpoint lies, with its manifest.
      made: the manifest that was written.
      name: where the checkpoint is going to be, for messages.

    Raises:
      CheckpointError: an item is missing, or holds other arrays than the manifest says.
    """
    if manifest.read(folder).id != made.id:
        raise CheckpointError(f"{name}: expected the manifest that was just written, found another one.")
    for item, specs in stored(made).items():
        if specs:
            _check_item(folder / item, specs, name)


def _check_item(path: Path, specs: Mapping[str, ArraySpec], name: Path) -> None:
    expected = {name: spec for name, spec in specs.items() if spec.size}  # only the manifest has empty arrays
    where = f"{name}: the checkpoint was not saved: its item {path.name} was written, but"
    way_out = "Earlier checkpoints and the state of training are as they were: save again, or somewhere else."
    try:
        found = items.described(path)
    except Exception as error:  # Orbax and tensorstore raise many kinds of exceptions
        text = str(error).strip().splitlines() or ["no message"]
        raise CheckpointError(
            f"{where} cannot be read back: expected {len(expected)} arrays, found {type(error).__name__}: "
            f"{text[0][:200]}. {way_out}"
        ) from error
    for array in sorted(expected.keys() | found.keys()):
        if expected.get(array) != found.get(array):
            raise CheckpointError(
                f"{where} what is there is something else: {array}: expected {expected.get(array, 'no such array')}, found "
                f"{found.get(array, 'no such array')}. {way_out}"
            )
