"""The safetensors format, one array at a time.

    8 bytes      the length of the header, little-endian
    header       JSON, filled up with spaces: {name: {"dtype": ..., "shape": ..., "data_offsets": [start, end]}}
    arrays       row by row, without gaps; offsets count from here

The library wants all arrays in memory when it writes, and copies them when it reads. With this the largest model passes
through a process that has room for one array of it. `weights.py` lets the library judge each file, those written here too.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from jaxpipe.checkpoint.manifest import ArraySpec
from jaxpipe.errors import CheckpointError

# The names of dtypes, the ones that need the strictest alignment first: in this order the library puts arrays.
_NAMES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {short: np.dtype(name) for name, short in _NAMES.items()}  # importing JAX has made the short floats known
_ORDER = {name: number for number, name in enumerate(_NAMES)}
_METADATA = "__metadata__"


class Writer:
    """Writes a file; a context manager.

    Args:
      path: of the file.
      arrays: what will be written. The arrays come in any order.
      metadata: texts by name.

    Raises:
      CheckpointError: safetensors has no such dtype.
    """

    def __init__(self, path: Path, arrays: Mapping[str, ArraySpec], metadata: Mapping[str, str]):
        for name, spec in arrays.items():
            if spec.dtype not in _NAMES:
                raise CheckpointError(
                    f"{name} is {spec.dtype}, which safetensors does not know: it knows {', '.join(_NAMES)}."
                )
        header: dict[str, Any] = {_METADATA: dict(metadata)}
        end = 0
        for name in sorted(arrays, key=lambda name: (_ORDER[arrays[name].dtype], name)):
            spec, start = arrays[name], end
            end += math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._path, self._arrays, self._header, self._begin = path, arrays, header, 8 + len(text)
        self._head = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> Self:
        self._file: BinaryIO = self._path.open("wb")
        self._file.write(self._head)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one of the arrays."""
        spec = self._arrays[name]
        assert spec == ArraySpec(array.dtype.name, array.shape), f"{name} is {array.dtype}{array.shape}, not {spec}"
        self._file.seek(self._begin + self._header[name]["data_offsets"][0])
        plain = np.ascontiguousarray(array, np.dtype(spec.dtype))  # in the byte order of this machine
        self._file.write(plain.reshape(-1).view(np.uint8).data)


def mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a well-formed file. They are read from it when they are used; writing to them does not change it.

    Raises:
      CheckpointError: an array has a dtype that is not known here.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop(_METADATA, None)
    whole = np.asarray(np.memmap(path, np.uint8, "c"))[8 + length :]
    found: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{name} is {entry['dtype']}; known are {', '.join(_DTYPES)}.")
        start, end = entry["data_offsets"]
        array = whole[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        found[name] = array if array.flags.aligned else array.copy()  # other programs may put arrays anywhere
    return found
