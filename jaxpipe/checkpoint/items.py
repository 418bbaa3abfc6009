"""One item of a checkpoint: named arrays, written and read by Orbax. The only import of orbax, and a late one: it is slow.

Every item is an Orbax checkpoint of its own, a nested dict of arrays, so any program that knows Orbax can open a layer
without jaxpipe.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpipe.checkpoint.manifest import ArraySpec
from jaxpipe.checkpoint.plain import plain

# Named arrays; "/" in a name nests: {"params/up/kernel": a} is {"params": {"up": {"kernel": a}}} on disk.
Arrays = dict[str, Any]

# What separates the parts of a name, here (/), in Orbax (.) and in paths of the optimizer state (:): written %xx in a part.
_RESERVED = re.compile(r"[%./:]")


def write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes jax or numpy arrays; what is on devices goes from there to the disk.

    Arrays without elements are left out (Orbax refuses them); the manifest has their shapes.
    """
    import orbax.checkpoint as ocp

    nested = nest({name: array for name, array in arrays.items() if array.size})
    if not nested:
        path.mkdir()  # Orbax refuses empty items; the folder says that the item was not forgotten
        return
    # A third of the item at a time is on its way from a device to the disk. Not compressed: that makes trained weights a
    # tenth smaller, for as much memory again and more time than the disk needs.
    sizes = [array.nbytes for array in arrays.values()]
    limit = max(max(sizes), sum(sizes) // 3) + 1
    handler = ocp.PyTreeCheckpointHandler(
        handler_impl=ocp.BasePyTreeCheckpointHandler(
            save_concurrent_bytes=limit, save_device_host_concurrent_bytes=limit, use_compression=False
        )
    )
    with ocp.Checkpointer(handler) as checkpointer, plain(path.parent) as folder:
        checkpointer.save(folder / path.name, args=ocp.args.PyTreeSave(nested))


def described(path: Path) -> dict[str, ArraySpec]:
    """What an item holds, from the descriptions of its arrays on disk; no array is read. Without empty arrays."""
    import orbax.checkpoint as ocp

    if not any(path.iterdir()):
        return {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, plain(path.parent) as folder:
        tree = _tree(checkpointer, folder / path.name)
    return {name: ArraySpec(str(np.dtype(leaf.dtype)), tuple(leaf.shape)) for name, leaf in _named(tree).items()}


def read(path: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The arrays of an item whose names are wanted, on the host. The rest is not read."""
    import orbax.checkpoint as ocp

    if not any(path.iterdir()):
        return {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, plain(path.parent) as folder:
        tree = _tree(checkpointer, folder / path.name)
        item = nest({name: leaf for name, leaf in _named(tree).items() if wanted(name)})
        if not item:
            return {}
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        restored = checkpointer.restore(
            folder / path.name, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        )
    return _named(restored)


def _tree(checkpointer: Any, path: Path) -> Any:
    """The nested dict of an item, with descriptions instead of arrays."""
    found = checkpointer.metadata(path).item_metadata
    if found is None:
        raise ValueError("Orbax finds no description of arrays in it")
    return found.tree


def joined(path: tuple[Any, ...], separator: str) -> str:
    """The name of a leaf in a tree, by its path; no two paths of strings have one name."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return separator.join(_RESERVED.sub(lambda found: f"%{ord(found[0]):02X}", part) for part in parts)


def unescaped(part: str) -> str:
    """A part of a name as the key that it was."""
    return re.sub("%([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), part)


def nest(arrays: Mapping[str, Any], separator: str = "/", key: Callable[[str], str] = str) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}, with each part made a key by `key`."""
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = map(key, name.split(separator))
        here = nested
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = array
    return nested


def _named(tree: Any) -> Arrays:
    """The inverse of `nest`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}
