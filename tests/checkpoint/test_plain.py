"""Paths for libraries that read more into a path than the names of folders."""

import pytest

from jaxpipe.checkpoint import plain as module
from jaxpipe.checkpoint.plain import plain
from jaxpipe.errors import CheckpointError


def test_plain_paths_are_taken_as_they_are(tmp_path):
    with plain(tmp_path) as path:
        assert path == tmp_path


@pytest.mark.parametrize("name", ["run [a]", "what?", "~x", "a:b", "back\\slash", "naïve", "y" * 250, "with space"])
def test_others_get_another_name_for_the_same_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    with plain(folder / ".." / name) as path:
        assert path.samefile(folder) and name not in str(path) or len(name) == 250
        (path / "file").write_text("x")
    assert (folder / "file").read_text() == "x"


def test_links_and_dots_are_the_systems(tmp_path):
    """`link/..` is the folder above the one that the link names."""
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there" / "deep")
    with plain(tmp_path / "link" / "..") as path:
        assert path.samefile(tmp_path / "there") and ".." not in path.parts, "a library might shorten it"


def test_a_system_without_descriptors_as_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_by_descriptor", lambda *_: None)
    (tmp_path / "a b").mkdir()
    with plain(tmp_path / "a b") as path:
        assert path.is_symlink() and path.samefile(tmp_path / "a b")
    assert not path.is_symlink(), "nothing is left behind"
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "a b"))
    with pytest.raises(CheckpointError, match="Set the environment variable TMPDIR to a plain path"):
        with plain(tmp_path / "a b"):
            pass
