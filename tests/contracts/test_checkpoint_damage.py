"""Checkpoints that are damaged, foreign or of another model: an error that names path, expected and found, and an engine
that is as it was."""

import json
import re
import shutil
import types

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxpipe
from jaxpipe.errors import CheckpointError
from tests.compare import assert_close
from tests.engines import batches, engine_for, stream
from tests.models import SCALE, WIDTH, Block, cross_entropy, tied


@pytest.fixture(scope="module")
def engine():
    return engine_for(tied(), 2, 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of another run of that model, two steps in."""
    directory = tmp_path_factory.mktemp("written")
    other = engine_for(tied(), 3, 1, key=jax.random.key(8))
    for _ in range(2):
        other.train_batch(stream(batches(1)))
    other.save_checkpoint(directory)
    return directory


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


@pytest.fixture
def refused(engine):
    """`with refused(message):` expects a CheckpointError, and the engine untouched: values, counters, usable buffers."""

    class Refused:
        def __init__(self, message):
            self.message = message

        def __enter__(self):
            self.state = engine.state
            self.before = jax.device_get((self.state.params, self.state.opt_state, self.state.step))
            self.counters = engine.train_calls, engine.micro_batches_seen

        def __exit__(self, kind, error, trace):
            assert kind is CheckpointError, f"got {error!r}"
            assert re.search(self.message, str(error), re.S), str(error)
            assert engine.state is self.state
            assert_close((self.state.params, self.state.opt_state, self.state.step), self.before, 0)
            assert self.counters == (engine.train_calls, engine.micro_batches_seen)
            return True

    return Refused


def change_manifest(directory, change):
    path = directory / "global_step2" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rewrite(item, change):
    """Another program writes the item again, and does not care for the sizes of files in the manifest."""
    change_manifest(item.parents[1], lambda manifest: manifest.update(files={}))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(item).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = checkpointer.restore(item, args=ocp.args.PyTreeRestore(restore_args=arguments))
        shutil.rmtree(item)
        checkpointer.save(item, args=ocp.args.PyTreeSave(change(tree)))


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# Reading damaged data leaves callbacks of tensorstore behind, for a loop that is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage(engine, directory, refused, tmp_path):
    tag = directory / "global_step2"

    def fresh():
        shutil.rmtree(directory)
        shutil.copytree(backup, directory)

    backup = shutil.copytree(directory, tmp_path / "backup")

    shutil.rmtree(tag / "layer_003")
    with refused(rf"{tag}/layer_003: expected the item layer_003, found nothing"):
        engine.load_checkpoint(directory)
    fresh()
    shutil.copytree(tag / "layer_003", tag / "layer_099")
    with refused(rf"{tag}: expected the items of 9 layers, as its manifest says, found layer_099 beside them"):
        engine.load_checkpoint(directory)
    fresh()

    for name in ("layer_004", "state"):
        file = largest_file(tag / name)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with refused(rf"{tag}/{name}/.*: expected \d+ bytes, found \d+ bytes. Load another tag"):
            engine.load_checkpoint(directory)
        fresh()
        file = tag / name / "d" / next((tag / name / "d").iterdir()).name
        file.write_bytes(bytes(file.stat().st_size))
        with refused(rf"{tag}/{name}: expected \d+ arrays, found damaged files: .*Load another tag"):
            engine.load_checkpoint(directory)
        fresh()

    def reshaped(tree):
        tree["params"]["up"]["kernel"] = tree["params"]["up"]["kernel"].T.copy()
        return tree

    rewrite(tag / "layer_002", reshaped)
    with refused(rf"{tag}/layer_002: params/up/kernel: expected float32\[8,16\], found float32\[16,8\]"):
        engine.load_checkpoint(directory)
    fresh()

    def halved(tree):
        tree["opt_state"]["0:mu"]["up"]["kernel"] = tree["opt_state"]["0:mu"]["up"]["kernel"].astype(np.float16)
        return tree

    rewrite(tag / "layer_002", halved)
    with refused(rf"{tag}/layer_002: opt_state/0:mu/up/kernel: expected float32\[8,16\], found float16\[8,16\]"):
        engine.load_checkpoint(directory)
    fresh()

    def without(tree):
        del tree["params"]["down"]
        return tree

    rewrite(tag / "layer_002", without)
    with refused(rf"{tag}/layer_002: expected the array params/down/bias, float32\[8\], found \["):
        engine.load_checkpoint(directory)
    fresh()

    path = tag / "checkpoint.json"
    path.write_text(path.read_text()[:500])
    with refused(
        r"checkpoint.json: expected the manifest of a checkpoint, found something else or a part of one \(JSON"
    ):
        engine.load_checkpoint(directory)
    path.write_text("[1]")
    with refused(r"checkpoint.json: expected the manifest of a checkpoint, found something else or a part of one"):
        engine.load_checkpoint(directory)
    path.unlink()
    with refused(rf"{tag}: expected a checkpoint of jaxpipe, found no checkpoint.json in it"):
        engine.load_checkpoint(directory)
    fresh()
    change_manifest(directory, lambda manifest: manifest.update(format=2, versions={"jaxpipe": "9.9"}))
    with refused(r"checkpoint.json: expected format 1 or older, found 2, written by jaxpipe 9.9"):
        engine.load_checkpoint(directory)
    fresh()
    change_manifest(directory, lambda manifest: manifest.update(key_impl="rbg"))
    with refused(r"expected a PRNG key of kind \S*fry\S*, found rbg"):
        engine.load_checkpoint(directory)
    fresh()
    (directory / "latest").write_bytes(b"\xff\xfe\x00")
    with refused("latest: expected a tag in this file, found: .*decode"):
        engine.load_checkpoint(directory)
    for text in ("../elsewhere", ""):
        (directory / "latest").write_text(text)
        with refused("latest: expected a tag in this file, found: tag="):
            engine.load_checkpoint(directory)
    fresh()
    for name in ("files", "config", "step", "program"):
        change_manifest(directory, lambda manifest, name=name: manifest.update({name: None}))
        with refused("checkpoint.json: expected the manifest of a checkpoint, found something else"):
            engine.load_checkpoint(directory)
        fresh()
    change_manifest(
        directory, lambda manifest: manifest.update(news=1)
    )  # of a version that did not need another format
    assert engine.load_checkpoint(directory)[1] == {}


def test_nothing_else_is_replaced_or_removed(engine, directory, refused):
    (directory / "src").mkdir()
    (directory / "src" / "precious.py").write_text("")
    (directory / "file").write_text("")
    (directory / "other").mkdir()
    (directory / "other" / "checkpoint.json").write_text('{"mine": 1}')
    (directory / ".new.txt").write_text("")
    for tag in ("src", "file", "other"):
        with refused(f"{directory}/{tag} is in the way: it would be replaced, but it is no checkpoint"):
            engine.save_checkpoint(directory, tag)
    engine.save_checkpoint(directory, "a", keep=1)
    assert (directory / "src" / "precious.py").exists() and (directory / "other").exists()
    assert not (directory / "global_step2").exists()


def test_devices_that_fail_at_the_end(directory, monkeypatch):
    """All was read by then; what is there cannot be taken back, but it is said, and loading again mends it."""
    engine, put, calls = engine_for(tied(), 2, 1), jax.device_put, []

    def fail(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return put(*args, **options)

    monkeypatch.setattr(jax, "device_put", fail)
    with pytest.raises(
        CheckpointError, match=r"could not be put on the devices \(RuntimeError: out of memory\).*load again"
    ):
        engine.load_checkpoint(directory)
    monkeypatch.undo()
    engine.load_checkpoint(directory)
    assert_close(engine.to_layers()[3], jaxpipe.load_layer(directory, None, np.int64(3)), 0)
    assert np.isfinite(float(engine.train_batch(stream(batches(1)))))


def test_what_is_not_there(engine, directory, refused, tmp_path):
    with refused(rf"{directory}: expected the tag 'global_step3', found global_step2. Did you mean 'global_step2'"):
        engine.load_checkpoint(directory, "global_step3")
    with refused(rf"{tmp_path}/nowhere: expected the tag 'best', found no checkpoint at all"):
        engine.load_checkpoint(tmp_path / "nowhere", "best")
    (directory / "foreign").mkdir()
    with refused(rf"{directory}/foreign: expected a checkpoint of jaxpipe"):
        engine.load_checkpoint(directory, "foreign")
    before = engine.state
    for path, words in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "no checkpoint")):
        with pytest.warns(UserWarning, match=f"{path}: {words}. Nothing was loaded"):
            assert engine.load_checkpoint(path) == (None, None)
    (directory / "latest").unlink()
    with pytest.warns(UserWarning, match="no file 'latest'; pass one of the tags global_step2"):
        assert engine.load_checkpoint(directory) == (None, None)
    assert engine.state is before
    with pytest.raises(CheckpointError, match="expected a layer index from 0 to 8, found 9"):
        jaxpipe.load_layer(directory, "global_step2", 9)
    with pytest.raises(CheckpointError, match="expected a layer index from 0 to 8, found True"):
        jaxpipe.load_layer(directory, "global_step2", True)
    with pytest.raises(CheckpointError, match="expected a checkpoint, found none"):
        jaxpipe.load_layer(tmp_path / "nowhere", None, 0)


def test_other_models_and_optimizers(directory, tmp_path):
    def refuse(engine, message, **options):
        before = jax.device_get(engine.state.params)
        with pytest.raises(CheckpointError, match=message):
            engine.load_checkpoint(directory, **options)
        assert_close(engine.state.params, before, 0)

    shorter = engine_for(tied(num_blocks=5), 2, 1)
    message = r"expected the arrays of this model, found others: it lacks layer_006 \(Block\) params/scale float32\[8\]"
    refuse(shorter, message + ".*it also has .*layer_006 .*load_module_strict=False")
    embed, head = tied().layers[0].entry, tied().layers[-1].entry
    wide = jaxpipe.PipelineModule(
        [embed, *[jaxpipe.LayerSpec(Wide)] * 6, SCALE, head], cross_entropy, partition_method="uniform"
    )
    wide = engine_for(wide, 2, 1)
    refuse(wide, r"layer_001 \(Block\) params/down/kernel: expected float32\[24,8\], found float32\[16,8\]")
    refuse(wide, "with other shapes", load_module_strict=False)

    other = engine_for(tied(), 2, 1, optax.sgd(0.1, momentum=0.9))
    refuse(other, r"expected the arrays of this optimizer.*lacks .*0:trace.*0:nu.*load_optimizer_states=False")
    other.load_checkpoint(directory, load_optimizer_states=False)
    assert other.global_steps == 2 and other.train_calls == 2
    assert_close(other.to_layers()[3], jaxpipe.load_layer(directory, None, 3), 0)

    # What fits, by name: weights of another optimizer's run, without its counters.
    third = engine_for(tied(), 2, 1, optax.sgd(0.1), key=jax.random.key(1))
    key = np.asarray(jax.random.key_data(third.state.key))
    assert third.load_checkpoint(directory, load_module_only=True)[1] == {}
    assert third.global_steps == third.train_calls == third.micro_batches_seen == 0
    assert (np.asarray(jax.random.key_data(third.state.key)) == key).all()
    assert_close(third.to_layers()[0], jaxpipe.load_layer(directory, None, 0), 0)

    fresh = jax.device_get(shorter.to_layers())
    with pytest.warns(UserWarning, match="does not fit the model: it lacks layer_006.*The rest was loaded") as caught:
        shorter.load_checkpoint(directory, load_module_strict=False)
    assert caught[0].filename == __file__
    found = shorter.to_layers()
    assert_close(found[5], jaxpipe.load_layer(directory, None, 5), 0)
    assert_close(found[6], fresh[6], 0, "the checkpoint has a Block there")
    assert np.isfinite(float(shorter.train_batch(stream(batches(1)))))


class Wide(Block):
    def __init__(self, *, rngs):
        super().__init__(WIDTH, rngs=rngs)
        linear = type(self.up)
        self.up, self.down = linear(WIDTH, 24, rngs=rngs), linear(24, WIDTH, rngs=rngs)


Wide.__name__ = "Block"


def test_arguments(engine, refused, tmp_path, directory):
    def save(*args, **options):
        return engine.save_checkpoint(tmp_path / "new", *args, **options)

    for tag in ("", "a/b", ".hidden", "latest", 3, " a", "a\n", "x" * 201):
        with refused(r"tag=.*: expected the name of a folder"):
            save(tag)
    with refused(r"tag='../x': expected the name of a folder"):
        engine.load_checkpoint(directory, "../x")
    with refused(r"client_state\['loss'\] is a float32: expected numbers.*\.item\(\)"):
        save(client_state={"loss": np.float32(1)})
    with refused(r"client_state\['a'\]\[1\] is a tuple"):
        save(client_state={"a": [1, (2, 3)]})
    with refused(r"client_state has the key 1: expected a string"):
        save(client_state={1: 2})
    with refused("client_state is a list: expected a dict"):
        save(client_state=[])
    with refused("keep=0: expected how many checkpoints to keep"):
        save(keep=0)
    with refused("directory='gs://bucket/run': expected a path of a mounted file system"):
        engine.save_checkpoint("gs://bucket/run")
    with refused("directory=None: expected the path of a folder"):
        engine.load_checkpoint(None)
    with refused(r"data_iter is a list_iterator without get_state\(\)"):
        save(data_iter=iter([]))
    with refused("expected the state of a data iterator, found none.*Skip 6 micro-batches"):
        engine.load_checkpoint(directory, data_iter=types.SimpleNamespace(set_state=None))
    with refused(r"data_iter is a list_iterator without set_state\(\)"):
        engine.load_checkpoint(directory, data_iter=iter([]))
    assert not (tmp_path / "new").exists()
