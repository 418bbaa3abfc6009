"""The manifest of a checkpoint, `checkpoint.json`: what the items hold, and everything about the run that is no array.

It is written last, so a folder that has one is complete. No JAX.
"""

import base64
import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jaxpipe.errors import CheckpointError

NAME = "checkpoint.json"
PROGRAM = "jaxpipe"  # others use the name of the file, too
# Raised when a reader of an older version could no longer understand what is written.
FORMAT = 1


@dataclass(frozen=True)
class ArraySpec:
    """Dtype and shape of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class LayerRecord:
    """A layer: its name, the layer that holds its weights if that is another one, and the arrays of its item."""

    name: str
    tied_to: int | None
    arrays: dict[str, ArraySpec]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
      id: of this very save, so that a reader notices if another one takes its place.
      layers, state: the items; see `homes`.
      step: optimizer steps. train_calls: calls of `train_batch`, those without a step included.
      micro_batches_seen: how far the data was read. data_state: what the iterator said about that, if it was asked.
      key_impl: kind of the PRNG key, None for an untyped one.
      files: size of every file of the items, by its path in the checkpoint: what is cut short is noticed.
      config, partition, mesh, versions, saved_at: of the writing run, for whoever looks; loading depends on none of them.
    """

    id: str
    layers: list[LayerRecord]
    state: dict[str, ArraySpec]
    step: int
    train_calls: int
    micro_batches_seen: int
    data_state: Any
    key_impl: str | None
    client_state: dict[str, Any]
    config: dict[str, Any]
    partition: list[int]
    mesh: dict[str, int]
    versions: dict[str, str]
    saved_at: str
    files: dict[str, int] = field(default_factory=dict)
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        """The text of the file."""
        layers = [{**vars(layer), "arrays": _texts(layer.arrays)} for layer in self.layers]
        found = {"program": PROGRAM, **vars(self), "layers": layers, "state": _texts(self.state)}
        return json.dumps(found, indent=1) + "\n"

    @property
    def num_params(self) -> int:
        """Of all layers."""
        return sum(size_of(layer.arrays) for layer in self.layers)


def size_of(arrays: Mapping[str, ArraySpec]) -> int:
    """How many numbers the params among the arrays hold."""
    return sum(spec.size for name, spec in arrays.items() if name.split("/")[0] == "params")


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
      CheckpointError: there is none, it is damaged, or of a newer format.
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
    kinds: dict[str, Any] = {"id": str, "step": int, "train_calls": int, "micro_batches_seen": int, "saved_at": str}
    kinds |= {"client_state": dict, "config": dict, "mesh": dict, "versions": dict, "files": dict, "partition": list}
    for name, kind in kinds.items():
        if not isinstance(found[name], kind):
            raise TypeError(f"{name} is {found[name]!r:.50}")
    if not all(isinstance(size, int) for size in found["files"].values()):
        raise TypeError("a size in files is no integer")
    layers = [LayerRecord(each["name"], each["tied_to"], _specs(each["arrays"])) for each in found["layers"]]
    # Fields that are not known are those of a newer version that this one can do without: the format says so.
    rest = {each.name: found[each.name] for each in fields(Manifest) if each.name not in ("layers", "state")}
    return Manifest(layers=layers, state=_specs(found["state"]), **rest)


def _texts(specs: dict[str, ArraySpec]) -> dict[str, str]:
    return {name: str(spec) for name, spec in specs.items()}


def _specs(found: dict[str, str]) -> dict[str, ArraySpec]:
    """From `float32[8,16]`."""
    made = {}
    for name, text in found.items():
        dtype, shape = text.rstrip("]").split("[")
        made[name] = ArraySpec(dtype, tuple(map(int, shape.split(","))) if shape else ())
    return made


def check_json(value: Any, what: str) -> None:
    """Raises CheckpointError unless `value` comes back from JSON as it is."""
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


def encode_data_state(state: Any) -> Any:
    """What `data_iter.get_state()` returned, as JSON: bytes or a JSON value."""
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode("ascii")}
    check_json(state, "data_iter.get_state()")
    return {"json": copy.deepcopy(state)}


def decode_data_state(encoded: Any) -> Any:
    """The inverse."""
    return base64.b64decode(encoded["bytes"]) if "bytes" in encoded else encoded["json"]
