"""What a checkpoint is said to hold, from its manifest alone."""

import pytest

from jaxpipe.checkpoint.inspect import inspect
from jaxpipe.errors import CheckpointError
from tests.checkpoint.manifests import save


@pytest.fixture
def directory(tmp_path):
    save(tmp_path, "a", 1)
    save(tmp_path, "b", 2)
    (tmp_path / "latest").write_text("b\n")
    return tmp_path


def test_report(directory):
    report = inspect(directory)
    assert report.head[0] == f"checkpoint  {directory}/b" and "step 2, 12 micro-batches of data seen" in report.head[1]
    assert "written by  pipe 2, layers cut at [0, 1, 2]" in report.head and "client      {'epoch': 1}" in report.head
    head, embed, head_layer, state, total = report.table
    assert head == ["item", "layer", "parameters", "dtype", "optimizer state", "bytes"]
    assert embed == ["layer_000", "0 Embed", "7", "float32 int32", "6", "10"]
    assert head_layer == ["", "1 Head, tied to layer 0", "", "", "", ""]
    assert (state[0], state[4], total) == ("state", "1", ["total", "", "7", "", "6", "10"])
    assert report.foot == [f"tags in {directory}: a, b (latest)"]


def test_which_one(directory, tmp_path):
    for report in (inspect(directory, "a"), inspect(directory / "a")):
        assert report.head[0] == f"checkpoint  {directory}/a"
    (directory / "latest").unlink()
    with pytest.raises(CheckpointError, match="expected a checkpoint, found the tags a, b: choose one with --tag"):
        inspect(directory)
    with pytest.raises(CheckpointError, match="expected a checkpoint, found none"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="File name too long"):
        inspect("x" * 300)
