"""Name scopes: what is written is read, wherever XLA puts it into a name."""

import pytest

from jaxpipe.executor import scopes
from jaxpipe.executor.scopes import Scope


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        (f"jit(step)/shard_map/while/body/{scopes.of_op('F', 12)}/while/body/dot", Scope("F", 12, False, False)),
        (f"{scopes.of_op('B', 0)}/{scopes.TAIL}/transpose(jvp())/dot", Scope("B", 0, True, False)),
        (f"jit(step)/{scopes.TAIL}/while", Scope(None, -1, True, False)),
        (f"jit(step)/cond/{scopes.RARE}/reduce_max", Scope(None, -1, False, True)),
        ("jit(step)/shard_map/while/body/ppermute", Scope(None, -1, False, False)),
        ("jit(my_jaxpipe.Forward)/add", Scope(None, -1, False, False)),
        ("", Scope(None, -1, False, False)),
    ],
)
def test_names(name, scope):
    assert scopes.read(name) == scope
