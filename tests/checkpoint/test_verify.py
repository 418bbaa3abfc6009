"""What lies on disk is compared with the manifest before a save is reported."""

import dataclasses

import numpy as np
import pytest

from jaxpipe.checkpoint import items
from jaxpipe.checkpoint.manifest import ArraySpec
from jaxpipe.checkpoint.verify import check_written, stored
from jaxpipe.errors import CheckpointError
from tests.checkpoint.manifests import MADE
from tests.checkpoint.states import homes, state

ARRAYS = {"params/w": np.ones((2, 3), np.float32), "params/none": np.ones((0, 3), np.float32)}


@pytest.fixture
def written(tmp_path):
    """`written(arrays)`: a checkpoint of one layer, in which these arrays lie."""
    specs = {name: ArraySpec(str(a.dtype), a.shape) for name, a in ARRAYS.items()}
    layers = [dataclasses.replace(MADE.layers[0], arrays=specs), MADE.layers[1]]
    made = dataclasses.replace(MADE, layers=layers, state={"step": ArraySpec("int32", ())})

    def write(arrays, manifest=made):
        items.write(tmp_path / "layer_000", arrays)
        items.write(tmp_path / "state", {"step": np.asarray(1, np.int32)})
        (tmp_path / "checkpoint.json").write_text(manifest.to_json())
        check_written(tmp_path, made, tmp_path / "tag")

    return write


def test_every_layer_has_an_entry():
    of, _ = state()
    assert stored(MADE) == {"layer_000": MADE.layers[0].arrays, "layer_001": {}, "state": MADE.state}
    assert homes(of).expected(of).keys() == {f"layer_00{i}" for i in range(6)} | {"state"}


def test_what_was_written(written):
    written(ARRAYS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "params/w: expected float32\\[2,3\\], found no such array"),
        ({**ARRAYS, "params/b": np.ones(2)}, "params/b: expected no such array, found float64\\[2\\]"),
        ({"params/w": np.ones((3, 2), np.float32)}, "expected float32\\[2,3\\], found float32\\[3,2\\]"),
        ({"params/w": np.ones((2, 3), np.float16)}, "expected float32\\[2,3\\], found float16\\[2,3\\]"),
    ],
)
def test_other_arrays(written, arrays, message):
    with pytest.raises(
        CheckpointError, match=f"layer_000 was written, but what is there is something else: .*{message}"
    ):
        written(arrays)


def test_another_manifest(written):
    with pytest.raises(CheckpointError, match="tag: expected the manifest that was just written, found another one"):
        written(ARRAYS, dataclasses.replace(MADE, id="other"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # callbacks of tensorstore
def test_an_item_that_cannot_be_read(written, tmp_path, monkeypatch):
    real = items.write

    def damaged(path, arrays):
        real(path, arrays)
        (path / "manifest.ocdbt").unlink()

    monkeypatch.setattr(items, "write", damaged)
    with pytest.raises(
        CheckpointError, match="its item layer_000 was written, but cannot be read back: expected 1 arrays"
    ):
        written(ARRAYS)
