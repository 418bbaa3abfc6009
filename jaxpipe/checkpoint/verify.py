"""Compares what lies on disk with the manifest: a save is reported when that has been seen, not when nobody complained.

Libraries have merged no files, or lost some, without raising anything. The comparison reads the descriptions of the
arrays, not the arrays, so it takes a few milliseconds per item and no memory.
"""

from collections.abc import Mapping
from pathlib import Path

from jaxpipe.checkpoint import items, manifest
from jaxpipe.checkpoint.homes import STATE, layer_item
from jaxpipe.checkpoint.manifest import ArraySpec, Manifest
from jaxpipe.errors import CheckpointError


def stored(made: Manifest) -> dict[str, dict[str, ArraySpec]]:
    """Per item that the manifest names, the arrays in it. Layers that hold nothing have an entry, too, and no item."""
    return {**{layer_item(index): layer.arrays for index, layer in enumerate(made.layers)}, STATE: made.state}


def check_written(folder: Path, made: Manifest, name: Path) -> None:
    """Raises CheckpointError unless every item that the manifest names is there, with the arrays it names and no others.

    Args:
      folder: where the checkpoint lies, its own manifest included.
      name: where it is going to be.
    """
    if manifest.read(folder).id != made.id:
        raise CheckpointError(f"{name}: expected the manifest that was just written, found another one.")
    for item, specs in stored(made).items():
        if specs:
            _check_item(folder / item, specs, name)


def _check_item(path: Path, specs: Mapping[str, ArraySpec], name: Path) -> None:
    expected = {name: spec for name, spec in specs.items() if spec.size}  # empty arrays are in the manifest alone
    where = f"{name}: the checkpoint was not saved: its item {path.name} was written, but"
    way_out = "Earlier checkpoints and the state of training are as they were: save again, or somewhere else."
    try:
        found = items.described(path)
    except Exception as error:  # Orbax and tensorstore have many kinds
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
