"""One item of a checkpoint: named arrays, which Orbax writes and reads.

Every item is an Orbax checkpoint of its own, a nested dict of arrays, so any program that knows Orbax can open a layer
without jaxpipe. No other module imports Orbax. It is imported only when it is needed, because importing it is slow.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
    options: dict[str, Any] = _alone()
    if jax.process_count() > 1:
        nested = jax.tree.map(_as_first_of_two, nested)
        options["type_handler_registry"] = ocp.type_handlers.create_type_handler_registry(
            (
                jax.Array,
                ocp.type_handlers.ArrayHandler(primary_host=jax.process_index(), use_replica_parallel=False),
            )
        )
    handler = ocp.PyTreeCheckpointHandler(
        handler_impl=ocp.BasePyTreeCheckpointHandler(
            save_concurrent_bytes=limit, save_device_host_concurrent_bytes=limit, use_compression=False, **options
        )
    )
    with ocp.Checkpointer(handler, **_alone()) as checkpointer, plain(path.parent) as folder:
        checkpointer.save(folder / path.name, args=ocp.args.PyTreeSave(nested))


def described(path: Path) -> dict[str, ArraySpec]:
    """The dtypes and shapes of the arrays of an item, as they are described on the disk. No array is read.

    Arrays without elements are not among them, because they are not written.
    """
    import orbax.checkpoint as ocp

    if not any(path.iterdir()):
        return {}
    handler = ocp.PyTreeCheckpointHandler(**_alone())
    with ocp.Checkpointer(handler, **_alone()) as checkpointer, plain(path.parent) as folder:
        tree = _tree(checkpointer, folder / path.name)
    return {name: ArraySpec(str(np.dtype(leaf.dtype)), tuple(leaf.shape)) for name, leaf in _named(tree).items()}


def read(path: Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Reads those arrays of an item, onto the host, whose names are `wanted`. The others are not read."""
    import orbax.checkpoint as ocp

    if not any(path.iterdir()):
        return {}
    handler = ocp.PyTreeCheckpointHandler(**_alone())
    with ocp.Checkpointer(handler, **_alone()) as checkpointer, plain(path.parent) as folder:
        tree = _tree(checkpointer, folder / path.name)
        item = nest({name: leaf for name, leaf in _named(tree).items() if wanted(name)})
        if not item:
            return {}
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        restored = checkpointer.restore(
            folder / path.name, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        )
    return _named(restored)


def _alone() -> dict[str, Any]:
    """Options that make Orbax read or write without waiting for other processes; none if there are no others.

    Its own way of writing with several processes is a collective of the devices, several times per item: it could not run
    in the background, and would let each item wait for all processes.
    """
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return {}
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"jaxpipe_{me}"
    )
    return {"multiprocessing_options": alone}


def _as_first_of_two(array: AnyArray) -> jax.Array:
    """An array of this process as the first one of two copies, of which the other is on a device of another process.

    In a program of several processes Orbax refuses arrays that lie on devices of one process, and it lets process 0 alone
    write arrays of NumPy. Of copies it writes the first one. Nobody looks for the other one, which does not exist.
    """
    mine = array.addressable_data(0) if isinstance(array, jax.Array) else jax.device_put(array, _host_device())
    (device,) = mine.devices()
    other = next(each for each in jax.devices(device.platform) if each.process_index != device.process_index)
    pair = Mesh(np.array([device, other], dtype=object), ("copy",))
    return jax.make_array_from_single_device_arrays(mine.shape, NamedSharding(pair, PartitionSpec()), [mine])


@functools.cache
def _host_device() -> Any:
    """A CPU device of this process, or one of another kind if JAX knows no CPU devices of other processes."""
    with contextlib.suppress(RuntimeError):  # there are no CPU devices at all
        if len({device.process_index for device in jax.devices("cpu")}) > 1:
            return jax.local_devices(backend="cpu")[0]
    return jax.local_devices()[0]


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
