"""One item of a checkpoint: named arrays, which Orbax writes and reads.

Every item is an Orbax checkpoint of its own, a nested dict of arrays, so any program that knows Orbax can open a layer
without jaxpipe. No other module imports Orbax. It is imported only when it is needed, because importing it is slow.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpipe.checkpoint.manifest import ArraySpec
from jaxpipe.checkpoint.plain import plain
from jaxpipe.types import AnyArray, KeyPath, Tree

# JAX or NumPy arrays by name. A "/" in a name nests: {"params/up/kernel": a} is {"params": {"up": {"kernel": a}}} on disk.
Arrays = Mapping[str, AnyArray]

# These characters separate the parts of a name: "/" here, "." in Orbax, ":" in paths of the optimizer state. Inside of a
# part they are written as %xx.
_RESERVED = re.compile(r"[%./:]")


def write(path: Path, arrays: Arrays) -> None:
    """Writes an item. Arrays on devices go from there to the disk.

    Arrays without elements are left out, because Orbax refuses them. The manifest has their shapes.
    """
    import orbax.checkpoint as ocp

    nested = nest({name: array for name, array in arrays.items() if array.size})
    if not nested:
        path.mkdir()  # Orbax refuses empty items; the folder shows that the item was not forgotten
        return
    # Up to a third of the item is on its way from a device to the disk at a time. Nothing is compressed: that would make
    # trained weights a tenth smaller, but needs as much memory again and more time than the disk does.
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
    """The dtypes and shapes of the arrays of an item, as they are described on the disk. No array is read.

    Arrays without elements are not among them, because they are not written.
    """
    import orbax.checkpoint as ocp

    if not any(path.iterdir()):
        return {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, plain(path.parent) as folder:
        tree = _tree(checkpointer, folder / path.name)
    return {name: ArraySpec(str(np.dtype(leaf.dtype)), tuple(leaf.shape)) for name, leaf in _named(tree).items()}


def read(path: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Reads those arrays of an item, onto the host, whose names are `wanted`. The others are not read."""
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


def _tree(checkpointer: Any, path: Path) -> Tree:
    """The nested dict of an item, with descriptions in the place of the arrays."""
    found = checkpointer.metadata(path).item_metadata
    if found is None:
        raise ValueError("Orbax finds no description of arrays in it")
    return found.tree


def joined(path: KeyPath, separator: str) -> str:
    """Makes a name of the path of a leaf in a tree. Different paths of strings have different names."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return separator.join(_RESERVED.sub(lambda found: f"%{ord(found[0]):02X}", part) for part in parts)


def unescaped(part: str) -> str:
    """The key that a part of a name was made of; the inverse of the escaping in `joined`."""
    return re.sub("%([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), part)


def nest(arrays: Mapping[str, object], separator: str = "/", key: Callable[[str], str] = str) -> dict[str, Any]:
    """Makes {"a": {"b": x}} of {"a/b": x}; `key` makes a key of each part."""
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = map(key, name.split(separator))
        here = nested
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = array
    return nested


def _named(tree: Tree) -> dict[str, Any]:
    """The inverse of `nest`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}
