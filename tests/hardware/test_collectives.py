"""Collectives in HLO text: kinds, bytes, axes, and whether work lies beside them."""

import pytest

from jaxpipe.hardware.collectives import Collective, _groups, find
from jaxpipe.hardware.hlo import parse
from jaxpipe.hardware.structure import blocks
from tests.hardware import texts


def found(text):
    module = parse(text)
    return [one for block in blocks(module) for one in find(module, block, texts.MESH)]


def test_of_a_tpu():
    half, piece = 128 * 256 * 2, 128 * 256 * 4
    assert found(texts.TPU) == [
        Collective("reduce-scatter", 2 * piece, 1, False, "outside over pipe"),
        Collective("all-reduce", piece, 1, False, "outside over data"),
        Collective("collective-permute", half, 1, True, "loop over pipe"),  # the other branch is beside it
        Collective("collective-permute", half, 1, False, "loop over pipe"),  # zeros are no work
        Collective("all-reduce", 8 * 256 * 2, 1, False, "backward over data"),
    ]


def test_of_a_gpu():
    whole = 256 * 256 * 2
    assert found(texts.GPU) == [
        Collective("all-gather", whole, 1, True, "outside over data"),
        Collective("collective-permute", whole, 1, False, "loop over pipe"),  # XLA says that it is synchronous
    ]


def test_where():
    one = Collective("all-reduce", 4, 1, False, "outside over pipe, data")
    assert (one.part, one.axes) == ("outside", ("pipe", "data"))
    assert Collective("all-reduce", 4, 1, False, "loop")[-1:] == ("loop",)
    assert Collective("all-reduce", 4, 1, False, "loop").axes == ()


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups={}, x=1", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("no groups", []),
    ],
)
def test_groups(text, groups):
    assert _groups(text, 4) == groups
