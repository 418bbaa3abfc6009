"""Bad input: the message says what was passed, the rule, and the way out; and it comes before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    JaxpipeError,
    LayerError,
    LossError,
    MeshError,
    PartitionError,
    ScheduleError,
)
from tests.models import SCALE, WIDTH, Block, Embedding, cross_entropy, make_batch, tied

M = 2


def pipeline(module=None, stages=2, data=2, **options):
    return jaxpipe.Pipeline(module or tied(), jaxpipe.make_mesh(pipe=stages, data=data), M, **options)


def start(loss, layers=None, **config):
    module = jaxpipe.PipelineModule(layers or [jaxpipe.LayerSpec(Embedding), SCALE], loss)
    example = tuple(a[0] for a in make_batch(1))
    mesh = jaxpipe.make_mesh(pipe=2)
    return jaxpipe.initialize(module, optax.sgd(0.1), mesh=mesh, example=example, config=config)


@pytest.fixture(scope="module")
def ready():
    pipe = pipeline()
    return pipe, pipe.init(jax.random.key(0), make_batch(1)[0][0])


def test_all_are_value_errors():
    assert issubclass(JaxpipeError, ValueError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:1], y), r"inputs is int32\[1,4,5\]: its first dim is 1, but there are 2 micro-batches"),
        (lambda x, y: (x, y[:, :, :, None][:1]), r"labels is int32\[1,4,5,1\]: its first dim is 1"),
        (lambda x, y: (x[:, :3], y), r"inputs is int32\[2,3,5\]: its 3 rows .* over 2 data ranks. Use a multiple of 2"),
        (
            lambda x, y: ({"ids": x, "mask": x[0, 0]}, y),
            r"inputs\['mask'\] is int32\[5\]. Leaves of a batch are \[M, B, ...\]",
        ),
        (lambda x, y: x, r"A batch is a pair \(inputs, labels\), got a ndarray"),
        (lambda x, y: (x, y, y), r"A batch is a pair \(inputs, labels\), got a tuple of 3"),
        (lambda x, y: (None, y), "inputs of the batch hold no array"),
    ],
)
def test_batches(ready, change, message):
    pipe, params = ready
    with pytest.raises(DataError, match=message):
        pipe.value_and_grad(params, change(*make_batch(M)))


def test_iterators():
    engine = start(lambda y, t: (y**2).mean(), num_micro_batches=M)
    items = list(zip(*make_batch(3), strict=True))
    with pytest.raises(DataError, match="data_iter is a list, not an iterator.* Make one with iter"):
        engine.train_batch(items)
    with pytest.raises(
        DataError, match="Micro-batch 1 of data_iter is .*int32.3,5.*, but micro-batch 0 is .*int32.4,5"
    ):
        engine.train_batch(iter([items[0], (items[1][0][:3], items[1][1][:3])]))
    with pytest.raises(DataError, match="Micro-batch 0 of data_iter is a ndarray. It yields pairs"):
        engine.train_batch(iter([items[0][0]]))


def test_layers_that_do_not_fit_each_other_are_both_named():
    module = jaxpipe.PipelineModule(
        [jaxpipe.LayerSpec(Embedding), SCALE, jaxpipe.LayerSpec(Block, WIDTH + 1)], cross_entropy
    )
    message = r"layer 2 \(Block\) cannot take its input: layer 1 \(Scale\) returns float32\[4,5,8\]"
    with pytest.raises(LayerError, match=message):
        pipeline(module).init(jax.random.key(0), make_batch(1)[0][0])
    with pytest.raises(
        LayerError, match=r"layer 0 \(Embedding\) cannot take its input: the example inputs are float32\[3\]"
    ):
        pipeline(module).init(jax.random.key(0), jnp.ones(3))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda y, t: y.mean(-1),
            r"loss_fn returned a value float32\[4,5\], which is not a floating-point scalar.*\.mean\(\)",
        ),
        (lambda y, t: t.sum(), r"loss_fn returned a value int32\[\]"),
        (lambda y, t: (y.sum(), t.shape[0], 3), "loss_fn returned a tuple of 3 values"),
        (lambda y, t: {"cost": y.mean()}, "loss_fn returned a value of type dict"),
    ],
)
def test_losses(loss, message):
    with pytest.raises(LossError, match=message):
        start(loss)


def test_too_few_devices_and_how_to_simulate_them():
    with pytest.raises(
        MeshError, match=r"pipe=5 x data=7 needs 35 devices, but there are 16 \(cpu\).*jax_num_cpu_devices\", 35"
    ):
        jaxpipe.make_mesh(pipe=5, data=7)
    with pytest.raises(MeshError, match="data=0"):
        jaxpipe.make_mesh(pipe=2, data=0)
    with pytest.raises(MeshError, match='an axis named "pipe"'):
        jaxpipe.Pipeline(tied(), jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("stage",)))


def test_names_are_suggested():
    with pytest.raises(ScheduleError, match="'1f1b'"):
        pipeline(schedule="1fb1")
    with pytest.raises(ConfigError, match="unknown key 'num_microbatches'.*num_micro_batches"):
        start(cross_entropy, num_microbatches=3)
    with pytest.raises(ConfigError, match="remat"):
        pipeline(remat="layers")


@pytest.mark.parametrize(
    "layers",
    [5, None, "abc", {"a": SCALE}, SCALE, {SCALE}, jaxpipe.LayerSpec(Embedding), jax.nn.relu, Embedding],
    ids=["int", "None", "str", "dict", "Layer", "set", "spec", "function", "class"],
)
def test_what_is_no_list_of_layers(layers):
    with pytest.raises(LayerError, match=r"PipelineModule\(.*it is the list of layers"):
        jaxpipe.PipelineModule(layers)


@pytest.mark.parametrize("module", [[SCALE], {"a": 1}, "gpt", None, 5])
def test_what_is_no_module(module):
    example = tuple(a[0] for a in make_batch(1))
    with pytest.raises(
        LayerError, match=r"module=.*: expected a jaxpipe.PipelineModule. Write jaxpipe.PipelineModule\("
    ):
        jaxpipe.initialize(module, optax.sgd(0.1), mesh=jaxpipe.make_mesh(pipe=1), example=example)


def test_settings_of_a_module():
    layers = [SCALE, jnp.tanh, SCALE]
    for loss in ("mse", 3, {"loss": cross_entropy}):
        with pytest.raises(LossError, match=r"loss_fn=.*it is a function loss_fn\(outputs, labels\)"):
            jaxpipe.PipelineModule(layers, loss)
    for method in (3, 2.5, {"a": 1}, b"uniform", {0, 3}):
        with pytest.raises(PartitionError, match="partition_method=.* must be 'uniform'"):
            jaxpipe.PipelineModule(layers, cross_entropy, method)
    x = jax.ShapeDtypeStruct((4, WIDTH), np.float32)
    module = jaxpipe.PipelineModule(layers, cross_entropy)
    for stages in ("2", 2.0, None, True, [2]):
        with pytest.raises(PartitionError, match="num_stages=.* must be an integer, 1 or more"):
            module.partition(stages, x)
    with pytest.raises(PartitionError, match="num_stages=0"):
        module.partition(0, x)
    for method in ("parameters", "uniform", np.array([0, 2, 3]), [np.int64(0), np.int32(2), 3], range(0, 4)):
        chosen = jaxpipe.PipelineModule(layers, cross_entropy, method)
        boundaries = chosen.partition(np.int64(3 if isinstance(method, range) else 2), x)
        assert all(type(b) is int for b in boundaries) and boundaries[-1] == 3


class InitAlone:
    def init(self, key, x):
        return {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxpipe.Layer(SCALE.init, None), r"Layer\(apply=None\): a layer is a pair"),
        (lambda: jaxpipe.Layer({"w": 1}, SCALE.apply), r"Layer\(init=\{'w': 1\}\)"),
        (lambda: jaxpipe.Layer(SCALE.init, SCALE.apply, 3), r"Layer\(name=3\): the name of a layer is a string"),
        (lambda: jaxpipe.TiedLayerSpec("k", nnx.Linear, 3, 3, forward_fn="attend"), "forward_fn='attend'"),
        (lambda: jaxpipe.LayerSpec("Linear", 3), r"LayerSpec\('Linear'\)"),
        (lambda: jaxpipe.PipelineModule([InitAlone()]), "Layer 0 is .*InitAlone.* A layer is a jaxpipe.Layer"),
        (lambda: jaxpipe.PipelineModule([[SCALE, SCALE]]), r"Layer 0 is \[.* A layer is a jaxpipe.Layer"),
    ],
)
def test_pairs_and_specs(make, message):
    with pytest.raises(LayerError, match=message):
        make()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (lambda: 3, "Layer 1 is 3. A layer is a jaxpipe.Layer"),
        (lambda: Block, "Layer 1 is .*Block.* A layer is a jaxpipe.Layer"),
        (lambda: jaxpipe.LayerSpec(dict, a=1), "Layer 1, LayerSpec.* made a dict"),
        (lambda: jaxpipe.TiedLayerSpec("e", Block, 4), "Layers 0 and 1 are tied by the key 'e' but differ"),
    ],
)
def test_entries(entry, message):
    with pytest.raises(LayerError, match=message):
        jaxpipe.PipelineModule([jaxpipe.TiedLayerSpec("e", Embedding), entry()], cross_entropy)


def test_params_of_another_model():
    pipe = pipeline()
    layers = jax.device_get(pipe.to_layers(pipe.init(jax.random.key(0), make_batch(1)[0][0])))
    with pytest.raises(LayerError, match="8 per-layer params were given; the module has 9 layers"):
        pipe.from_layers(layers[:-1])
    layers[2] = layers[0]
    with pytest.raises(
        LayerError, match=r"layer 2 \(Block\): expected params .*float32\[8,16\].*, got .*float32\[11,8\]"
    ):
        pipe.from_layers(layers)
    with pytest.raises(LayerError, match="has no params yet. Call pipe.init"):
        pipeline().partition  # noqa: B018


def test_keys_of_ties():
    for key in (None, ["e"]):
        with pytest.raises(LayerError, match="the key, a string, names the tie"):
            jaxpipe.TiedLayerSpec(key, Embedding)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_flags(tmp_path):
    engine = start(lambda y, t: (y**2).mean(), num_micro_batches=M)
    items = iter(list(zip(*make_batch(4), strict=True)))
    with pytest.raises(ConfigError, match="return_logits='no': it is True or False"):
        engine.eval_batch(items, return_logits="no")
    with pytest.raises(CheckpointError, match="blocking='no': expected True or False"):
        engine.save_checkpoint(tmp_path, blocking="no")
    with pytest.raises(CheckpointError, match="load_module_strict=0: expected True or False"):
        engine.load_checkpoint(tmp_path, load_module_strict=0)
    assert len(list(items)) == 4
    with pytest.raises(CheckpointError, match="layers is a NoneType: expected a list"):
        jaxpipe.save_weights(tmp_path / "w.safetensors", None)
    with pytest.raises(DataError, match="The example None holds no array"):
        engine.pipe.module.partition(2, None)
    for odd in (np.matrix(np.ones((4, 5))), jax.ShapeDtypeStruct((4, 5), np.int32)):
        with pytest.raises(DataError, match="inputs is a (np.matrix|jax.ShapeDtypeStruct)"):
            engine.train_batch(iter([(odd, make_batch(1)[1][0])] * M))
