"""Arrivals in their slots."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe import schedules
from jaxpipe.executor.mail import Mail
from jaxpipe.lowering.channels import DX, Y
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.rows import Now

WIRE = [jax.ShapeDtypeStruct((2,), jnp.int32)]


def test_arrivals_are_kept_by_slot_or_used_as_they_come():
    program = lower(schedules.one_f_one_b(3, 4))
    direct = Mail(program, {Y: WIRE, DX: WIRE})
    assert direct.is_direct(Y) and direct.empty_inbox()[Y][0].shape == (2,)
    now = Now(0, 0, {}, jnp.int32(0))
    inbox = direct.put(direct.empty_inbox(), Y, jnp.int32(-1), [jnp.asarray([1, 2])])
    assert direct.read(inbox, Y, now)[0].tolist() == [1, 2], "what the permute brings is there until the next one"

    kept = Mail(replace(program, direct=frozenset(), inboxes={Y: 3}), {Y: WIRE})
    inbox = kept.empty_inbox()
    assert inbox[Y][0].shape == (3, 2)
    for slot, value in ((2, 20), (0, 5), (-1, 99)):
        inbox = kept.put(inbox, Y, jnp.int32(slot), [jnp.full(2, value)])
    assert inbox[Y][0].tolist() == [[5, 5], [0, 0], [20, 20]], "slot -1 stores nothing"
    assert [kept.read(inbox, Y, now._replace(read=jnp.int32(s)))[0].tolist() for s in (0, 2)] == [[5, 5], [20, 20]]


def test_poisoned_messages():
    floats = [jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)]
    mail = Mail(lower(schedules.one_f_one_b(2, 2)), {Y: floats, DX: floats}, poison=True)
    assert np.isnan(mail.blank(Y)[0]).all() and mail.blank(Y)[1] == 0
