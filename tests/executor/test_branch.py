"""Branches: one of several runs, or none; it gets what it reads, and changes what it says."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest

from jaxpipe import schedules
from jaxpipe.executor.branch import Branch, Step, run_if
from jaxpipe.lowering.channels import DX, Y
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import Cell
from jaxpipe.lowering.rows import Columns

UNUSED = jnp.full(9, 8)
COLUMNS = Columns.of(lower(schedules.one_f_one_b(2, 2)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    a: jax.Array
    b: jax.Array


def first(carry, inbox, now):
    assert inbox == {}, "it reads nothing"
    return replace(carry, a=carry.a + now.micro_batch), {Y: [carry.b * 2]}


def second(carry, inbox, now):
    assert set(inbox) == {Y}
    return replace(carry, a=carry.a * inbox[Y][0], b=carry.b + 100), {}


STEP = Step(COLUMNS, {2: Branch(first, ("a",), (), (Y,)), 3: Branch(second, ("a",), (Y,), ())})


def run(branch, step=STEP):
    row = jnp.asarray(COLUMNS.encode(Cell("F", 0, 5, (0,), 0), branch))
    state = Carry(jnp.int32(3), jnp.int32(4)), {Y: [jnp.int32(7)], DX: [UNUSED]}, {Y: [jnp.int32(9)]}
    return step.run(state, row, jnp.int32(0))


@pytest.mark.parametrize(
    ("branch", "a", "sent", "ran"), [(0, 3, 9, 0), (1, 3, 9, 0), (2, 8, 8, 1), (3, 21, 9, 1), (4, 3, 9, 0)]
)
def test_the_branch_of_the_row_runs(branch, a, sent, ran):
    (carry, inbox, outbox), turn = jax.jit(run, static_argnums=0)(branch)
    assert (carry.a, outbox[Y][0], turn) == (a, sent, ran)
    assert carry.b == 4, "no branch changes it, whatever it returns"
    assert inbox[Y][0] == 7 and (inbox[DX][0] == UNUSED).all()


def test_a_branch_sends_what_it_says():
    with pytest.raises(AssertionError, match="sends"):
        run(2, Step(COLUMNS, {2: Branch(first, ("a",))}))


def test_loops_pass_on_only_what_their_branches_use():
    jaxpr = jax.make_jaxpr(run, static_argnums=0)(2)
    (outer,) = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "while"]
    assert not [v for v in outer.invars if v.aval.shape == UNUSED.shape], "a message that no branch of the step reads"
    inner = [e for e in outer.params["body_jaxpr"].jaxpr.eqns if e.primitive.name == "while"]
    assert len(inner) == 2, "a loop for each branch, inside the one of the step"


def test_run_if():
    either = jax.jit(lambda wanted: run_if(wanted, lambda c, a: {"n": c["n"] + a}, {"n": jnp.int32(1)}, jnp.int32(5)))
    assert (either(True)["n"], either(False)["n"]) == (6, 1)
