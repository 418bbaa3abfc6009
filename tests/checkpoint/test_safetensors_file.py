"""The file format: what the library would have written, and maps of what it has written."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.checkpoint.manifest import ArraySpec
from jaxpipe.checkpoint.safetensors_file import _NAMES, Writer, mapped
from jaxpipe.errors import CheckpointError
from tests.compare import assert_close

safetensors = pytest.importorskip("safetensors.numpy")
rng = np.random.default_rng(0)
ARRAYS = {f"of {name}": rng.integers(0, 2, (3, n)).astype(jnp.dtype(name)) for n, name in enumerate(_NAMES)} | {
    'a."name"ü': np.float32(5),
    "columns": np.asfortranarray(rng.normal(size=(4, 3))),
    "strided": rng.normal(size=(5, 4))[::2, 1:],
    "foreign": np.arange(3, dtype=">i4"),
}


def write(path, arrays):
    specs = {name: ArraySpec(array.dtype.name, array.shape) for name, array in arrays.items()}
    with Writer(path, specs, {"format": "jaxpipe"}) as writer:
        for name in sorted(arrays):  # another order than that in the file
            writer.write(name, np.asarray(arrays[name]))


def test_files_are_those_of_the_library(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    write(mine, ARRAYS)
    plain = {name: np.asarray(a, a.dtype.newbyteorder("="), order="C") for name, a in ARRAYS.items()}
    safetensors.save_file(plain, theirs, {"format": "jaxpipe"})
    assert mine.read_bytes() == theirs.read_bytes()
    for file in (mine, theirs):
        assert_close(mapped(file), plain, 0)


def test_maps_are_not_read_before_they_are_used_and_do_not_write(tmp_path):
    file = tmp_path / "file"
    write(file, {"a": np.arange(8, dtype=np.float32)})
    found = mapped(file)["a"]
    before = bytearray(file.read_bytes())
    with file.open("r+b") as open_file:  # in its place, where nobody should write: only to see when it is read
        open_file.seek(-4, 2)
        open_file.write(np.float32(99).tobytes())
    assert found[-1] == 99
    found[0] = 7
    before[-4:] = np.float32(99).tobytes()
    assert file.read_bytes() == bytes(before)


def test_arrays_that_other_programs_put_anywhere(tmp_path):
    header = json.dumps(
        {
            "one": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "two": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    data = b"\5" + np.asarray([1, 2], np.float32).tobytes()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert_close(
        mapped(tmp_path / "file"), {"one": np.asarray([5], np.uint8), "two": np.asarray([1, 2], np.float32)}, 0
    )


def test_dtypes_that_the_format_does_not_have(tmp_path):
    with pytest.raises(CheckpointError, match="x is complex128, which safetensors does not know: it knows .*float32"):
        write(tmp_path / "file", {"x": np.zeros(2, complex)})
    header = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "odd").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(CheckpointError, match="x is F6_E2M3; known are"):
        mapped(tmp_path / "odd")
