"""`python -m jaxpipe inspect`."""

import pytest

from jaxpipe import cli
from tests.engines import batches, engine_for, stream
from tests.models import tied


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    engine = engine_for(tied(), 2, 2)
    engine.save_checkpoint(directory, "start", save_latest=False)
    engine.train_batch(stream(batches(1)))
    engine.save_checkpoint(directory, client_state={"epoch": 7})
    return directory


def test_the_table(directory, capsys):
    assert cli.main(["inspect", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert lines[0] == f"checkpoint  {directory}/global_step1"
    assert "step 1, 3 micro-batches of data seen" in lines[1]
    assert "written by  pipe 2 x data 2, layers cut at [0, 5, 9]" in lines and "client      {'epoch': 7}" in lines
    folder = directory / "global_step1"
    on_disk = sum(path.stat().st_size for path in (folder / "layer_003").rglob("*") if path.is_file())
    # A block: 8 x 16 and 16 x 8 weights, 16 and 8 biases; Adam keeps two numbers for each.
    assert rows["layer_003"] == ["layer_003", "3", "Block", "280", "float32", "560", f"{on_disk:,}"]
    assert "           8 Embedding, tied to layer 0" in lines
    assert rows["total"][1:3] == ["1,776", "3,552"]
    assert lines[-1] == f"tags in {directory}: start, global_step1 (latest)"


def test_which_one(directory, tmp_path, capsys):
    for arguments in ([str(directory), "--tag", "start"], [str(directory / "start")]):
        assert cli.main(["inspect", *arguments]) == 0
        assert capsys.readouterr().out.startswith(f"checkpoint  {directory}/start\n")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert f"{tmp_path}: expected a checkpoint, found none" in capsys.readouterr().err
    assert cli.main(["inspect", str(directory), "--tag", "end"]) == 2
    assert "expected the tag 'end', found start, global_step1" in capsys.readouterr().err
