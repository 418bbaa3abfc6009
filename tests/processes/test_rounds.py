"""What the processes have said, and what is wrong with it. Real rounds: tests/contracts/test_processes_data.py."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.processes.rounds import Answer, Has, Rounds, faults, refused

NAMES = ("inputs", "labels")
GOOD = (Has.DATA, 5, 11, 12)


def answer(*rows):
    return Answer(jnp.asarray(rows, jnp.int32), jnp.asarray(False))


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ((Has.NO_MORE, 0, 0, 0), "has no more data"),
        ((Has.MISFIT, 0, 0, 0), "has data that do not fit; its own message says why"),
        ((Has.DATA, 6, 11, 12), "has micro-batches of other shapes"),
        ((Has.DATA, 5, 11, 13), "has other labels than process {0}"),
        ((Has.DATA, 5, 10, 13), "has other inputs and labels than process {0}"),
    ],
)
def test_the_odd_process_is_named(odd, text):
    assert faults(answer(GOOD, GOOD, odd), [0, 0, 0], NAMES) == {2: text}
    assert faults(answer(GOOD, GOOD, GOOD), [0, 0, 0], NAMES) == {}


def test_only_processes_with_the_same_rows_have_the_same_contents():
    other = (Has.DATA, 5, 21, 22)
    assert faults(answer(GOOD, other, GOOD, other), [0, 1, 0, 1], NAMES) == {}
    assert faults(answer(GOOD, other, other, other), [0, 1, 0, 1], NAMES) == {
        2: "has other inputs and labels than process {0}"
    }


def test_a_process_alone_agrees_with_itself():
    rounds = Rounds(jaxpipe.make_mesh(pipe=2, data=2), [0])
    for shapes in (5, 5, 6):
        turn = rounds.next(Has.DATA, shapes, (1, 2))
        assert turn.starts and turn.own and bool(turn.answer.agreed)
        assert np.asarray(turn.answer.words).tolist() == [[Has.DATA, shapes, 1, 2]]
    turn = rounds.next(Has.NO_MORE, 6, (0, 0))
    assert not turn.starts and not bool(turn.answer.agreed)


def test_the_loss_of_a_step_that_was_not_made_is_no_number():
    assert np.isnan(refused(jnp.float32(1), answer(GOOD)))
    assert refused(jnp.float32(1), Answer(jnp.zeros((1, 4), jnp.int32), jnp.asarray(True))) == 1
