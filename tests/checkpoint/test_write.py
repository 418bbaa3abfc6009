"""One process writes a checkpoint: all of it, or nothing; what other kinds of errors become."""

import pytest

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import manifest, write
from jaxpipe.errors import CheckpointError
from tests.checkpoint.states import homes, manifest_of, order, state

OF, _ = state()


def fail(*_):
    raise OSError(28, "No space left on device")


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    assert write.write(order(tmp_path, "a"), manifest_of(OF), homes(OF).items(OF)) == tmp_path / "a"
    files = write.files_in(tmp_path / "a")
    assert files.pop(manifest.NAME) and manifest.read(tmp_path / "a").files == files
    one = write.files_in(tmp_path / "a", ["layer_003"])
    assert one == {name: size for name, size in files.items() if name.startswith("layer_003/")} and one
    assert write.files_in(tmp_path / "a", []) == {}, "a process that has written nothing has no files"
    monkeypatch.setattr(folders.Draft, "commit", fail)
    with pytest.raises(CheckpointError, match="b: the checkpoint could not be written: OSError: No space left"):
        write.write(order(tmp_path, "b"), manifest_of(OF), homes(OF).items(OF))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "latest"}


def test_written_but_not_the_latest(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "prune", fail)
    write.publish(order(tmp_path, "a"))
    with pytest.raises(CheckpointError, match="a: the checkpoint was written, but 'latest' or the older ones"):
        write.publish(order(tmp_path, "a", keep=1))
    assert folders.latest(tmp_path) == "a"


def test_errors_say_what_the_system_said(tmp_path):
    known = CheckpointError("known")
    assert write.as_checkpoint_error(known, tmp_path) is known
    try:
        try:
            fail()
        except OSError as error:
            raise RuntimeError("many\nlines") from error
    except RuntimeError as error:
        text = str(write.as_checkpoint_error(error, tmp_path / "a"))
    assert text.startswith(f"{tmp_path}/a: the checkpoint could not be written: RuntimeError: No space left on device.")
    for error, reason in (
        (
            RuntimeError("cannot schedule new futures after shutdown"),
            "call engine.wait_for_checkpoint() before its end",
        ),
        (ValueError("one\ntwo"), "ValueError: one. Earlier checkpoints"),
        (KeyboardInterrupt(), "KeyboardInterrupt: no message."),
    ):
        assert reason in str(write.as_checkpoint_error(error, tmp_path))
