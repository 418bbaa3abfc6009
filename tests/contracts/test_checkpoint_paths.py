"""What a path is called does not matter, and a save is reported when what is on disk has been read back."""

import os

import jax
import numpy as np
import pytest

import jaxpipe
from jaxpipe import cli
from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint import items, plain, weights
from jaxpipe.errors import CheckpointError
from tests.compare import assert_close
from tests.engines import engine_for
from tests.models import SCALE, cross_entropy, tied

# (directory, tag): characters of patterns, of URLs and of shells; what Orbax takes for the cloud, for a home folder or for
# the copy of an editor; several ways to say a folder; names and paths that are long.
NAMES = [
    ("run [a]", None),
    ("lr=[0.1,0.2]/*", "[a]"),
    ("***", "***"),
    ("what?", "?"),
    ("{a,b} #1 %41%2F;$x&y|z", "{a,b}"),
    ("naïve 日本\n", "naïve"),
    ("~nobody-of-this-name", "~"),
    ("copy~", "copy~"),
    ("logs:/gs:/x", "a:b"),
    ("back\\slash", "'quoted\""),
    ("/".join(["long" * 50] * 17), "t" * 200),
    ("not utf-8 \udcff", None),
]


def model():
    return jaxpipe.PipelineModule([SCALE, SCALE], cross_entropy_of_ids, partition_method="uniform")


def cross_entropy_of_ids(outputs, labels):
    return cross_entropy(outputs, labels % outputs.shape[-1])


@pytest.fixture(scope="module")
def engine():
    return small_engine(1)


@pytest.fixture(scope="module")
def reader():
    return small_engine(2)


def small_engine(seed):
    example = (np.ones((4, 5, 8), np.float32), np.zeros((4, 5), np.int32))
    import optax

    return jaxpipe.initialize(
        model(), optax.adam(1e-2), mesh=jaxpipe.make_mesh(pipe=2), example=example, key=jax.random.key(seed)
    )


def forget(engine):
    engine.state = small_engine(3).state


def check_round_trip(engine, reader, directory, tag, capsys, blocking=True):
    expected = jax.device_get(engine.to_layers())
    path = engine.save_checkpoint(directory, tag, blocking=blocking)
    engine.wait_for_checkpoint()
    forget(reader)
    assert reader.load_checkpoint(directory) == (path, {})
    assert_close(reader.to_layers(), expected, 0)
    assert_close(reader.state.opt_state, engine.state.opt_state, 0)
    assert_close(jaxpipe.load_layer(directory, tag, 1), expected[1], 0)
    capsys.readouterr()
    assert cli.main(["inspect", "--", str(directory)]) == 0
    shown, errors = capsys.readouterr()
    assert "layer_001" in shown and not errors
    return path


@pytest.mark.parametrize(("name", "tag"), NAMES, ids=[repr(name)[:20] for name, _ in NAMES])
def test_every_path(engine, reader, tmp_path, monkeypatch, capsys, name, tag):
    monkeypatch.chdir(tmp_path)
    path = check_round_trip(engine, reader, name, tag, capsys, blocking=False)
    assert path == str(tmp_path / name / (tag or "global_step0")), "no character of it has a meaning"
    # The tag is replaced, others beside it are removed, and the whole path is given.
    engine.save_checkpoint(tmp_path / name, "*", save_latest=False)
    check_round_trip(engine, reader, tmp_path / name, tag, capsys)
    engine.save_checkpoint(tmp_path / name, tag, keep=1)
    assert folders.tags(tmp_path / name) == [tag or "global_step0"]
    weights = tmp_path / name / "weights [*].safetensors"
    if len(os.fspath(weights)) < 1000 and "\udcff" not in name:
        jaxpipe.save_weights(weights, engine.to_layers())
        assert_close(jaxpipe.load_weights(weights, engine.to_layers()), jax.device_get(engine.to_layers()), 0)


def test_links_and_dots(engine, reader, tmp_path, monkeypatch, capsys):
    """`link/..` is the folder above the one that the link names, as the system says; not the one that holds the link."""
    (tmp_path / "there" / "deep [x]").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "deep [x]")
    check_round_trip(engine, reader, tmp_path / "here" / "link", "a", capsys)
    assert (tmp_path / "there" / "deep [x]" / "a" / "checkpoint.json").exists()
    check_round_trip(engine, reader, tmp_path / "here" / "link" / ".." / "run", "b", capsys)
    assert (tmp_path / "there" / "run" / "b" / "layer_000").exists() and not (tmp_path / "here" / "run").exists()
    monkeypatch.setenv("HOME", str(tmp_path / "home [1]"))
    check_round_trip(engine, reader, "~/run", "c", capsys)
    assert (tmp_path / "home [1]" / "run" / "c").exists()


def test_a_system_without_descriptors_as_paths(engine, reader, tmp_path, monkeypatch, capsys):
    """Then a link in the folder for temporary files, which is removed; that folder's own path must be plain."""
    monkeypatch.setattr(plain, "_by_descriptor", lambda folder, stack: None)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(plain.tempfile, "tempdir", str(tmp_path / "temporary"))
    check_round_trip(engine, reader, tmp_path / "run [a]", "a", capsys)
    assert not list((tmp_path / "temporary").iterdir())
    (tmp_path / "temporary [a]").mkdir()
    monkeypatch.setattr(plain.tempfile, "tempdir", str(tmp_path / "temporary [a]"))
    with pytest.raises(CheckpointError, match="Set the environment variable TMPDIR"):
        engine.save_checkpoint(tmp_path / "run [a]", "b")
    with pytest.raises(CheckpointError, match="Set the environment variable TMPDIR"):
        reader.load_checkpoint(tmp_path / "run [a]", "a")


@pytest.mark.parametrize("directory", [None, 5, b"run", "", "a\0b", "gs://bucket/run"])
def test_what_is_no_path(engine, directory):
    for call in (engine.save_checkpoint, engine.load_checkpoint, lambda path: jaxpipe.load_layer(path, None, 0)):
        with pytest.raises(CheckpointError, match="directory="):
            call(directory)


def test_names_that_are_too_long(engine, tmp_path):
    for directory in (tmp_path / ("x" * 300), tmp_path / "/".join(["y" * 200] * 30)):
        with pytest.raises(CheckpointError, match="File name too long"):
            engine.save_checkpoint(directory)
        with pytest.raises(CheckpointError, match="File name too long"):
            engine.load_checkpoint(directory)
        with pytest.raises(CheckpointError, match="File name too long"):
            engine.load_checkpoint(directory, "a")


def drop(path, arrays, write):
    write(path, dict(list(arrays.items())[1:]))


def add(path, arrays, write):
    write(path, {**arrays, "params/more": np.ones(3, np.float32)})


def reshape(path, arrays, write):
    write(path, {name: array.reshape(1, *array.shape) for name, array in arrays.items()})


def convert(path, arrays, write):
    write(path, {name: array.astype(np.float16) for name, array in arrays.items()})


def forget_values(path, arrays, write):
    write(path, arrays)
    for file in (path / "d").iterdir():
        file.unlink()


def forget_manifest(path, arrays, write):
    write(path, arrays)
    (path / "manifest.ocdbt").unlink()


def nothing(path, arrays, write):
    pass


def an_empty_folder(path, arrays, write):
    path.mkdir()


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(
    "sabotage", [drop, add, reshape, convert, forget_values, forget_manifest, nothing, an_empty_folder]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_went_wrong_is_not_reported(engine, reader, tmp_path, monkeypatch, sabotage, blocking):
    """Whatever a library does without a word: no checkpoint of that name, `latest` and the tag as they were."""
    good = engine.save_checkpoint(tmp_path, "good", client_state={"n": 1})
    write = items.write

    def bad(path, arrays):
        if path.name == "layer_001":
            sabotage(path, arrays, write)
        else:
            write(path, arrays)

    monkeypatch.setattr(items, "write", bad)
    for tag in ("new", "good"):
        with pytest.raises(
            CheckpointError, match=rf"{tag}: the checkpoint was not saved: its item layer_001 was written"
        ):
            engine.save_checkpoint(tmp_path, tag, client_state={"n": 2}, keep=1, blocking=blocking)
            engine.wait_for_checkpoint()
        assert folders.tags(tmp_path) == ["good"] and folders.latest(tmp_path) == "good"
    assert not list(tmp_path.glob(".new*"))
    assert reader.load_checkpoint(tmp_path) == (good, {"n": 1})


def test_weights_that_went_wrong_are_not_reported(engine, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    jaxpipe.save_weights(path, engine.to_layers())
    before = path.read_bytes()

    class Forgetful(weights.Writer):
        def __init__(self, path, arrays, metadata):
            self.forgotten = min(arrays)
            super().__init__(path, {name: spec for name, spec in arrays.items() if name != self.forgotten}, metadata)

        def write(self, name, array):
            if name != self.forgotten:
                super().write(name, array)

    monkeypatch.setattr(weights, "Writer", Forgetful)
    with pytest.raises(
        CheckpointError, match=r"were not saved: layers\.0\.scale: expected the shape \(8,\), found None"
    ):
        jaxpipe.save_weights(path, engine.to_layers())
    assert path.read_bytes() == before


def test_reading_back_reads_no_arrays(tmp_path, monkeypatch):
    """Neither time nor memory for them: only descriptions are looked at."""
    engine = engine_for(tied(), 2, 1)
    monkeypatch.setattr(items, "read", lambda *_: pytest.fail("arrays were read"))
    engine.save_checkpoint(tmp_path)
