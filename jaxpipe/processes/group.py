"""`Group`: the processes that hold the devices of a mesh, and what they tell each other.

Everything here is a collective of the devices, so all processes of a group call it, in one order, from their main thread.
With one process there is nothing to tell, and nothing of it runs on a device.
"""

import functools
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe import errors
from jaxpipe.mesh import process_mesh
from jaxpipe.processes import watchdog

Result = TypeVar("Result")
P = PartitionSpec
PROCESS = "process"


class Group:
    """The processes that hold devices of a mesh.

    Args:
      devices: those of the mesh, in any order; all processes pass the same ones.

    Attributes:
      members: their numbers, in order.
      me: the number of this process.
      several: whether there is more than one. If not, this process is alone, whatever other processes do.
      first: whether this process is the first of them. It decides for all, and it alone prints.
    """

    def __init__(self, devices: tuple[Any, ...]):
        self.members = tuple(sorted({device.process_index for device in devices}))
        self.several = len(self.members) > 1
        self.me = jax.process_index()
        self.first = self.me == self.members[0]
        if self.several:
            self._mesh = process_mesh(devices)
            self._same = jax.jit(lambda rows: rows, out_shardings=NamedSharding(self._mesh, P()))
            self._one = jax.jit(
                lambda rows, at: jax.lax.dynamic_index_in_dim(rows, at, keepdims=False),
                out_shardings=NamedSharding(self._mesh, P()),
            )

    @classmethod
    def of(cls, mesh: Mesh) -> "Group":
        """The group of a mesh."""
        return _group_of(mesh)

    @classmethod
    def everyone(cls) -> "Group":
        """All processes of the program."""
        return _group(tuple(jax.devices()))

    def gather(self, value: Any) -> list[Any]:
        """What each of the processes passes, in the order of `members`; it is sent as JSON."""
        if not self.several:
            return [value]
        with watchdog.waiting(self.members, "exchange", "an exchange of the processes", timed=False):
            return self._gather(json.dumps(value).encode())

    def _gather(self, text: bytes) -> list[Any]:
        lengths = np.asarray(self._gathered(np.asarray([len(text)], np.int32)))[:, 0]
        room = 1 << int(lengths.max() - 1).bit_length()  # a power of two, so that few programs are compiled
        padded = np.frombuffer(text.ljust(room), np.uint8)
        rows = np.asarray(self._gathered(padded)).astype(np.uint8)
        return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """What the first process passes; it is sent as JSON."""
        return self.gather(value if self.first else None)[0]

    def together(self, attempt: Callable[[], Result]) -> Result:
        """Calls `attempt` on every process, and raises on all of them if it raised on one.

        Without it the others would go on, and wait for ever in the next collective. `attempt` must not contain one itself,
        unless no process can fail before it.

        Raises:
          Exception: what `attempt` raised here.
          JaxpipeError: what it raised elsewhere, of the same class if it is one of jaxpipe's; the message says where.
        """
        if not self.several:
            return attempt()
        result, error = None, None
        try:
            result = attempt()
        except Exception as caught:
            error = caught
        found = self.gather(None if error is None else [_public_name(error), str(error)])
        if error is not None:
            raise error
        for member, said in zip(self.members, found, strict=True):
            if said is not None:
                raise _as_error(*said, process=member)
        return result  # type: ignore[return-value]

    def from_one(self, array: np.ndarray | None, shape: tuple[int, ...], dtype: Any, member: int) -> np.ndarray:
        """An array of one process on the host of all of them, bit for bit; the others pass None."""
        if not self.several:
            assert array is not None
            return array
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if not size:
            return np.empty(shape, dtype)
        # As integers: the devices add the rows of all processes up, and -0.0 + 0.0 is 0.0.
        unit = np.dtype(np.uint32 if size % 4 == 0 else np.uint8)
        if array is None:
            words = np.zeros(size // unit.itemsize, unit)
        else:
            words = np.ascontiguousarray(array).reshape(-1).view(np.uint8).view(unit)
        with watchdog.waiting(self.members, "exchange", "an exchange of the processes", timed=False):
            found = np.asarray(settled(self._one(self._rows(words), self.members.index(member))).addressable_data(0))
        return np.ascontiguousarray(found).view(np.uint8).view(dtype).reshape(shape)

    def holders(self, leaves: Sequence[Any]) -> list[list[int]]:
        """Which processes hold each of the arrays; none for what every process has as its own.

        An array whose devices are all here may be one of this process, or a global one of which the others have no part. To
        tell them apart, the processes compare what they see.
        """
        own = [holders_of(leaf) for leaf in leaves]
        if not self.several:
            return own
        said = self.gather(own)
        return [held if all(other[index] == held for other in said) else [] for index, held in enumerate(own)]

    def fetch(self, leaf: Any, holders: list[int], needed: Collection[int] | None = None) -> Any:
        """An array of JAX on the hosts of the processes. A PRNG key stays a key, and anything else as it is.

        Args:
          leaf: the array. All processes pass the same one, unless it is each one's own.
          holders: what `Group.holders` says about it.
          needed: the processes that need it. If they all hold the whole of it, nothing is sent, and the others get None.
        """
        if not self.several or not holders:
            return _on_host(leaf)
        here, everyone = jax.process_index(), set(self.members)
        if needed is not None and leaf.is_fully_replicated and set(needed) <= set(holders):
            return _on_host(leaf.addressable_data(0)) if here in needed else None
        assert set(holders) <= everyone, "an array of processes that do not take part"
        words = jax.eval_shape(_words, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        whole = np.empty(words.shape, words.dtype)
        parts, local = _parts(leaf), {shard.device: shard.data for shard in leaf.addressable_shards}
        # Part by part, by way of the devices of all processes. One collective of the devices that hold the array would be
        # less to send, but see `settled`: others of all devices may be on their way.
        for corners, devices in parts.items():
            index = tuple(slice(*corner) for corner in corners)
            mine = [local[device] for device in devices if device in local]
            part = np.asarray(_words(mine[0])) if mine else None
            if not everyone <= (owners := {device.process_index for device in devices}):
                one = min(owners)
                sent = self.from_one(part if here == one else None, whole[index].shape, whole.dtype, one)
                part = sent if part is None else part
            whole[index] = part
        return _as_key(whole, leaf) if _is_key(leaf) else whole

    def _rows(self, row: np.ndarray) -> jax.Array:
        """[processes, ...], of which each one brings its own row."""
        sharding = NamedSharding(self._mesh, P(PROCESS))
        return jax.make_array_from_callback((len(self.members), *row.shape), sharding, lambda _: row[None])

    def _gathered(self, row: np.ndarray) -> jax.Array:
        return settled(self._same(self._rows(row))).addressable_data(0)


@functools.lru_cache(maxsize=64)  # it is asked for several times per step, and a mesh may have thousands of devices
def _group_of(mesh: Mesh) -> Group:
    return _group(tuple(sorted(mesh.devices.flat, key=lambda device: device.id)))


@functools.lru_cache(maxsize=64)
def _group(devices: tuple[Any, ...]) -> Group:
    return Group(devices)


def _public_name(error: Exception) -> str:
    """The name of the class of an exception, or of the class of jaxpipe that it is made of."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if name in errors.__all__), names[0])


def _as_error(name: str, text: str, process: int) -> Exception:
    """What another process raised, as an exception of this one."""
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if kind is None:
        return errors.JaxpipeError(f"Process {process} failed: {name}: {text}")
    return kind(f"Process {process}: {text}")


def settled(tree: Any) -> Any:
    """Waits, on CPUs, until all devices of this process have computed some arrays, and returns them.

    To be called on what was computed on some devices of a process only, or where only one of them is read. XLA orders
    computations on one CPU device of a process, and those on several, but not the former among the latter. Two that overlap
    mix up what they send to other processes. On other devices one waits for the other.
    """
    local = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)]
    if any(device.platform == "cpu" for leaf in local for device in leaf.sharding.device_set):
        jax.block_until_ready(local)
    return tree


def fetch(tree: Any) -> Any:
    """Brings arrays to the host of every process.

    All processes call it with the same tree: global arrays, such as the outputs of `Engine.eval_batch` or the layers of
    `Engine.to_layers`, which may lie on the devices of other processes. It takes one array after the other, so that
    besides the result no more than one of them is in memory.

    Args:
      tree: any pytree of arrays. What is no array of JAX stays as it is.

    Returns:
      The tree with NumPy arrays in the place of those of JAX. PRNG keys, which NumPy does not know, stay keys, on a device
      of this process. An array that each process has made on devices of its own is not moved: every process gets its own
      one.
    """
    everyone = Group.everyone()
    leaves, structure = jax.tree.flatten(tree)
    found = [everyone.fetch(leaf, held) for leaf, held in zip(leaves, everyone.holders(leaves), strict=True)]
    return jax.tree.unflatten(structure, found)


def holders_of(leaf: Any) -> list[int]:
    """The processes with devices that hold an array of JAX; none for anything else."""
    if not isinstance(leaf, jax.Array):
        return []
    return sorted({device.process_index for device in leaf.sharding.device_set})


def _is_key(leaf: jax.Array) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _words(leaf: jax.Array) -> jax.Array:
    """An array of plain numbers: a PRNG key is made of integers."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _parts(leaf: jax.Array) -> dict[tuple[tuple[int, int], ...], list[Any]]:
    """The parts that an array is cut into, and the devices that hold them; in the same order everywhere.

    A part is where it begins and ends, along each dim.
    """
    found: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        corners = tuple(dim.indices(size)[:2] for dim, size in zip(index, leaf.shape, strict=True))
        found.setdefault(corners, []).append(device)
    return dict(sorted(found.items()))


def _as_key(words: np.ndarray, like: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(jax.numpy.asarray(words), impl=jax.random.key_impl(like))


def _on_host(leaf: Any) -> Any:
    """An array of JAX that this process can read, on its host; anything else as it is."""
    if not isinstance(leaf, jax.Array):
        return leaf
    if _is_key(leaf):
        return _as_key(np.asarray(jax.random.key_data(leaf)), leaf)
    return np.asarray(leaf)
