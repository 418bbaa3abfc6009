"""How modes cut a stage into units."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpipe.errors import ConfigError
from jaxpipe.executor.remat import check_remat, mode
from jaxpipe.executor.unit_kinds import Keep, Recompute
from jaxpipe.layout.layout import Address
from jaxpipe.layout.stages import Part, StatePlace
from jaxpipe.model.layers import Kind

KINDS = [Kind(lambda key, x: {}, lambda p, x: x) for _ in range(3)]
POLICY = jax.checkpoint_policies.dots_saveable


@st.composite
def part_lists(draw):
    """Parts in a row, each one layer, a run of a stack, or a run of layers without weights."""
    parts, offset, used = [], 0, {}
    for number in range(draw(st.integers(0, 5))):
        kind, stacked = draw(st.integers(0, 2)), draw(st.booleans())
        count = draw(st.integers(1, 7))
        address = Address("stacked", str(kind)) if stacked else None
        slot = used.get(kind, 0) if stacked else 0
        # In another stack, where the slots need not be the same.
        state = StatePlace(Address("stacked", f"state {kind}"), slot + 3, (True,)) if draw(st.booleans()) else None
        parts.append(Part(KINDS[kind], offset, count, address, slot, state=state, label=str(number)))
        offset += count
        if stacked:
            used[kind] = used.get(kind, 0) + count
    return parts


def layers(parts, repeats=1):
    """(offset in the stage, slot, slot of the state, address, kind) of every layer, in the order in which it runs."""

    def slots(part, at):
        return part.slot + at if part.address else None, part.state and part.state.slot + at

    return [
        (part.offset + at, *slots(part, at), part.address, part.kind)
        for repeat in range(repeats)
        for part in parts
        for at in range(repeat * part.count, (repeat + 1) * part.count)
    ]


@given(part_lists(), st.one_of(st.sampled_from(["none", "layer", "stage", POLICY]), st.integers(1, 9)))
def test_every_layer_is_in_one_unit_in_order(parts, remat):
    groups = mode(remat).groups(parts)
    assert [layer for group in groups for layer in layers(group.parts, group.repeats)] == layers(parts)
    for group in groups:
        assert group.repeats == 1 or len(group.parts) == 1, "repetitions go on along one stack"
        if isinstance(remat, int):
            assert group.make is Recompute and group.parts[0].count <= remat
    if remat == "stage":
        assert len(groups) == (1 if parts else 0)


def test_what_units_keep():
    part = Part(KINDS[0], 0, 4, Address("stacked", "0"))
    assert [group.make for name in ("layer", "stage", 3) for group in mode(name).groups([part])] == [Recompute] * 4
    assert [group.make for group in mode("none").groups([part])] == [Keep]
    ((_, repeats, make),) = mode(POLICY).groups([part])
    assert (repeats, make.func, make.keywords) == (4, Keep, {"policy": POLICY})


def test_modes_are_checked():
    for remat in ("none", "layer", "stage", 3, POLICY):
        assert check_remat(remat) is remat
    assert type(check_remat(np.int64(2))) is int
    wrong = ["layers", 0, -1, True, 1.5, None, print, int, lambda: True, jax.checkpoint_policies.save_only_these_names]
    for remat in wrong:
        with pytest.raises(ConfigError, match="remat="):
            check_remat(remat)
