"""Rules by path and annotations, against meshes and shapes."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.errors import ShardingError
from jaxpipe.model.axes import Annotation, AxisRules

MESH = jaxpipe.make_mesh(pipe=1, data=2, model=2, expert=2, sequence=1)
PLAIN = jaxpipe.make_mesh(pipe=2, data=2)
LAYERS = {
    "layer_000": ({"table": (12, 8)}, {}),
    "layer_011": ({"attn": {"qkv": {"kernel": (8, 24), "bias": (24,)}}, "up": (3, 8, 4)}, {}),
}


def specs(sharding=None, axis_rules=None, mesh=MESH, annotations=None):
    layers = {
        name: (
            jax.tree.map(
                lambda shape: jax.ShapeDtypeStruct(shape, np.float32), params, is_leaf=lambda x: type(x) is tuple
            ),
            (annotations or {}) if name == "layer_011" else {},
        )
        for name, (params, _) in LAYERS.items()
    }
    return AxisRules.of(sharding, axis_rules).specs(mesh, layers)


def test_the_first_rule_whose_pattern_is_found_in_the_path_counts():
    assert specs(
        [("qkv/kernel", P(None, "model")), ("layer_011/attn", P("model")), ("table$", P("model", "expert"))]
    ) == {
        "layer_000/table": P("model", "expert"),
        "layer_011/attn/qkv/kernel": P(None, "model"),
        "layer_011/attn/qkv/bias": P("model"),
    }
    # A rule that cuts nothing is a rule, too; one whose params have all been taken is not useless.
    assert specs({"kernel": P(), r"layer_0\d1.*(kernel|bias)": ("expert",)}) == {"layer_011/attn/qkv/bias": P("expert")}


def test_a_dim_may_be_cut_over_several_axes_and_an_axis_of_one_device_cuts_nothing():
    found = specs([("kernel", P(("expert", "model"), "sequence")), ("up", P(None, ("sequence", "model"), None))])
    assert found == {"layer_011/attn/qkv/kernel": P(("expert", "model"), None), "layer_011/up": P(None, "model", None)}


def test_annotations_are_mesh_axes_or_names_of_rules_and_a_path_rule_goes_first():
    known = {
        "attn/qkv/kernel": Annotation.of(("embed", "heads")),
        "attn/qkv/bias": Annotation.of(P("model")),
        "up": Annotation.of((None, ("sequence", "embed"), "own"), rules=(("own", "expert"), ("own", "model"))),
    }
    rules = {"embed": None, "heads": ("expert", "model"), "rows": "data", "unused": "sequence"}
    assert specs(None, rules, annotations=known) == {
        "layer_011/attn/qkv/kernel": P(None, ("expert", "model")),
        "layer_011/attn/qkv/bias": P("model"),
        "layer_011/up": P(None, None, "expert"),
    }
    assert specs([("bias", P())], rules.items(), annotations=known).keys() == {
        "layer_011/attn/qkv/kernel",
        "layer_011/up",
    }


def test_what_flax_stores_about_names():
    assert Annotation.of(NamedSharding(MESH, P(None, "model"))) == Annotation(((), ("model",)))
    assert Annotation.of(None) is None and Annotation.of(()) is None and Annotation.of((None, None)) is None


def test_on_a_mesh_without_further_axes_annotations_say_nothing():
    known = {"attn/qkv/kernel": Annotation.of(("nobody", "model")), "up": Annotation.of((None, "heads"))}
    assert specs(None, {"heads": "model"}, PLAIN, known) == {}


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        (
            [("kernel", P(None, "modle"))],
            r"'kernel' names the axis 'modle'. The mesh has .*data=2, model=2.*Did you mean 'model'",
        ),
        ([("kernel", P("data"))], r'the rule \'kernel\' cuts params over "data", .*use zero_stage=1'),
        ([("kernel", P(("model", "pipe")))], r'cuts params over "pipe", .*other layers'),
        ([("kernel", P("model", "model"))], r"P\('model', 'model'\), which has the axis 'model' twice"),
        ([("kernel", P(("model", "model")))], "has the axis 'model' twice"),
        ([("bias", P(None, "model"))], r"layer_011/attn/qkv/bias is float32\[24\], and the rule 'bias' is for 2 dims"),
        ([("up", P("model"))], r"layer_011/up is float32\[3,8,4\].*dim 0 over model=2: 3 is no multiple of 2"),
        (
            [("up", P(None, None, ("model", "expert"))), ("table", P(None, ("model", "expert", "sequence")))],
            None,
        ),
        (
            [("table", P(None, "model")), ("tabel", P())],
            r"'tabel' matches no param.*'layer_000/table', .*'layer_011/up'",
        ),
        ([("kernel", P(None, P.UNCONSTRAINED))], "the rule 'kernel' has .*Each entry is a mesh axis"),
        ([("kernel", "model")], "which is no PartitionSpec"),
        ([("(kernel", P())], r"'\(kernel' is no regular expression"),
        ([(3, P())], "3 is no regular expression"),
        ([P(None, "model")], "is no rule"),
        (P(None, "model"), "is no rule"),
        ("kernel", "is a list of pairs"),
        (3, "is a list of pairs"),
    ],
)
def test_rules_that_do_not_fit(sharding, message):
    if message is None:
        assert len(specs(sharding)) == 2
        return
    with pytest.raises(ShardingError, match=message):
        specs(sharding)


def test_a_rule_by_path_names_axes_of_the_mesh_on_every_mesh():
    with pytest.raises(
        ShardingError, match=r"names the axis 'model'. The mesh has the axes pipe=2, data=2. .*model=2\); of size 1"
    ):
        specs([("kernel", P(None, "model"))], mesh=PLAIN)


@pytest.mark.parametrize(
    ("names", "axis_rules", "message"),
    [
        (
            ("embed", "model"),
            None,
            r"kernel: its annotation P\('embed', 'model'\) has the name 'embed', .*axis_rules={'embed': None}",
        ),
        (("embed", None), {"embde": None}, "Did you mean 'embde'"),
        (("model", "mlp"), {"mlp": "model"}, r"kernel: the annotation .*comes to P\('model', 'model'\).*twice"),
        (("embed", None), {"embed": "data"}, 'cuts params over "data"'),
        (("data", None), None, 'cuts params over "data"'),
        ((None, None), {"embed": "modle"}, "'embed' stands for 'modle'.*Did you mean 'model'"),
        (("model", None, None), None, r"kernel is float32\[8,24\], and the annotation .* is for 3 dims"),
        ((None, None), {"embed": 2}, "it is a dict from a name"),
        ((None, None), {2: "model"}, "it is a dict from a name"),
        ((None, None), ["embed"], "it is a dict from a name"),
    ],
)
def test_annotations_that_do_not_fit(names, axis_rules, message):
    known = {"attn/qkv/kernel": found} if (found := Annotation.of(names)) else {}
    with pytest.raises(ShardingError, match=message):
        specs(None, axis_rules, annotations=known)


def test_an_axis_that_is_not_for_params_is_refused_on_every_mesh():
    with pytest.raises(ShardingError, match="zero_stage=1"):
        specs(None, {"embed": "data"}, PLAIN, {"up": Annotation.of(("embed",))})


def test_rules_for_activations_leave_out_what_is_not_left_to_the_compiler():
    rules = AxisRules.of(None, {"rows": "data", "both": ("data", "model"), "two": ("expert", "model"), "none": None})
    assert rules.for_activations(MESH, [("rows", "model")]) == [
        ("rows", None),
        ("both", "model"),
        ("two", ("expert", "model")),
        ("none", None),
    ]
    assert AxisRules().for_activations(PLAIN, [("rows", "data"), ("mlp", "model")]) == [("rows", None), ("mlp", None)]
