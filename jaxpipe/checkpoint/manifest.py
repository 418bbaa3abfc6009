"""The manifest of a checkpoint, `checkpoint.json`: what the items hold, and everything about the run that is no array.

It is written last, so a folder that has one is complete. This module does not use JAX.
"""

import base64
import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from jaxpipe.errors import CheckpointError

Json: TypeAlias = None | bool | int | float | str | list[Any] | dict[str, Any]

NAME = "checkpoint.json"
PROGRAM = "jaxpipe"  # written into the file, because other programs use the name of the file too
# The number of the format. Raise it when older readers would misunderstand what is written.
FORMAT = 1
# Fields that older files of this format do not have. Older readers do without them.
LATER = ("data_states",)


@dataclass(frozen=True)
class ArraySpec:
    """The dtype and the shape of an array; as text, `float32[8,16]`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class LayerRecord:
    """A layer in a checkpoint.

    Attributes:
      name: its name in the module.
      tied_to: index of the layer that holds its weights, if that is another one.
      arrays: what its item holds, by name.
    """

    name: str
    tied_to: int | None
    arrays: dict[str, ArraySpec]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
      id: unique for every save, so that a reader notices if another checkpoint takes its place.
      layers, state: what the items hold; see `homes`.
      step: number of optimizer steps.
      train_calls: number of calls of `train_batch`, including those that did not change the state.
      micro_batches_seen: how many micro-batches were read.
      data_state: what the data iterator said about where it stands, if it was asked; see `encode_data_state`.
      data_states: the same of each process, in order, if they stand at different places; then there is no `data_state`.
      key_impl: the kind of the PRNG key; None for an untyped one.
      client_state: what the user stores with the checkpoint, a JSON value.
      config, partition, mesh, versions, saved_at: facts about the run that wrote it, for people. Loading does not depend
        on them.
      files: the size in bytes of every file of the items, by its path in the checkpoint. It shows when a file was cut
        short.
      format: the number of the format; see `FORMAT`.
    """

    id: str
    layers: list[LayerRecord]
    state: dict[str, ArraySpec]
    step: int
    train_calls: int
    micro_batches_seen: int
    data_state: Json
    key_impl: str | None
    client_state: dict[str, Any]
    config: dict[str, Json]
    partition: list[int]
    mesh: dict[str, int]
    versions: dict[str, str]
    saved_at: str
    files: dict[str, int] = field(default_factory=dict)
    data_states: list[Json] | None = None  # older versions do not write it
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        """The text of the file `checkpoint.json`."""
        layers = [{**vars(layer), "arrays": _texts(layer.arrays)} for layer in self.layers]
        found = {"program": PROGRAM, **vars(self), "layers": layers, "state": _texts(self.state)}
        return json.dumps(found, indent=1) + "\n"

    @property
    def num_params(self) -> int:
        """The number of parameters of all layers."""
        return sum(size_of(layer.arrays) for layer in self.layers)


def size_of(arrays: Mapping[str, ArraySpec], what: str = "params") -> int:
    """The number of elements of those arrays that are params, or `what` else: "opt_state", "layer_state"."""
    return sum(spec.size for name, spec in arrays.items() if name.split("/")[0] == what)


def read(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint folder.

    Raises:
      CheckpointError: there is none, it is damaged, or its format is newer than this version of jaxpipe.
    """
    path = folder / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder}: expected a checkpoint of jaxpipe, found no {NAME} in it. It is the folder of something else, or "
            "its writing was never finished."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected a readable manifest, found: {error}.") from error
    try:
        return _parse(path, json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: expected the manifest of a checkpoint, found something else or a part of one "
            f"({type(error).__name__}: {error}). Load another tag."
        ) from error


def _parse(path: Path, found: dict[str, Any]) -> Manifest:
    if found["program"] != PROGRAM:
        raise ValueError(f"it is of the program {found['program']!r}")
    version = found["format"]
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT} or older, found {version}, written by jaxpipe "
            f"{found.get('versions', {}).get('jaxpipe', '?')}. Read it with that version of jaxpipe, or a later one."
        )
    kinds: dict[str, type] = {"id": str, "step": int, "train_calls": int, "micro_batches_seen": int, "saved_at": str}
    kinds |= {"client_state": dict, "config": dict, "mesh": dict, "versions": dict, "files": dict, "partition": list}
    for name, kind in kinds.items():
        if not isinstance(found[name], kind):
            raise TypeError(f"{name} is {found[name]!r:.50}")
    if not isinstance(found.get("data_states"), (list, type(None))):
        raise TypeError("data_states is no list")
    if not all(isinstance(size, int) for size in found["files"].values()):
        raise TypeError("a size in files is no integer")
    layers = [LayerRecord(each["name"], each["tied_to"], _specs(each["arrays"])) for each in found["layers"]]
    # Fields that are not known come from a newer version. This one can do without them, or the format would be newer too.
    rest = {each.name: found[each.name] for each in fields(Manifest) if each.name not in ("layers", "state", *LATER)}
    rest |= {name: found.get(name) for name in LATER}
    return Manifest(layers=layers, state=_specs(found["state"]), **rest)


def _texts(specs: dict[str, ArraySpec]) -> dict[str, str]:
    return {name: str(spec) for name, spec in specs.items()}


def _specs(found: dict[str, str]) -> dict[str, ArraySpec]:
    """Reads texts such as `float32[8,16]`."""
    made = {}
    for name, text in found.items():
        dtype, shape = text.rstrip("]").split("[")
        made[name] = ArraySpec(dtype, tuple(map(int, shape.split(","))) if shape else ())
    return made


def check_json(value: object, what: str) -> None:
    """Checks that a value comes back from JSON unchanged.

    Args:
      what: the name of the value in messages.

    Raises:
      CheckpointError: it does not.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return
    if isinstance(value, list):
        for index, each in enumerate(value):
            check_json(each, f"{what}[{index}]")
    elif isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{what} has the key {key!r}: expected a string. Write {str(key)!r}.")
            check_json(each, f"{what}[{key!r}]")
    else:
        raise CheckpointError(
            f"{what} is a {type(value).__name__}: expected numbers, strings, booleans, None, and lists and dicts of them, "
            "which are stored as JSON. Turn it into those (`.item()`, `.tolist()`)."
        )


def encode_data_state(state: Any) -> dict[str, Json]:
    """Makes a JSON value of what `data_iter.get_state()` returned, which may be bytes or a JSON value.

    Raises:
      CheckpointError: it is neither.
    """
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode("ascii")}
    check_json(state, "data_iter.get_state()")
    return {"json": copy.deepcopy(state)}


def decode_data_state(encoded: Any) -> bytes | Json:
    """The inverse of `encode_data_state`."""
    return base64.b64decode(encoded["bytes"]) if "bytes" in encoded else encoded["json"]
