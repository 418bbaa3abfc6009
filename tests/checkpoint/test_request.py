"""What is asked for is checked before anything is written, and processes have to agree about it."""

import types
from pathlib import Path

import numpy as np
import pytest

from jaxpipe.checkpoint.request import Request, accept, agree, check_flags
from jaxpipe.errors import CheckpointError
from tests.checkpoint.crowd import crowd

ALONE = crowd(1)[0]


def accepted(group=ALONE, **given):
    request = Request("/run", None, None, True, True, None, None)._replace(**given)
    return accept(request, "global_step7", group)


def iterator(at):
    return types.SimpleNamespace(get_state=lambda: {"at": at})


def test_what_is_left_open_is_filled_in():
    found = accepted(keep=np.int32(3))
    assert found.order == (Path("/run"), "global_step7", True, 3, True) and type(found.order.keep) is int
    assert (found.client_state, found.data_state, found.data_states) == ({}, None, None)
    assert found.order.target == Path("/run/global_step7")
    assert accepted(tag="best", keep=None).order[1:] == ("best", True, None, True)


def test_what_cannot_be_met():
    itself = {}
    itself["me"] = itself
    for given, message in (
        ({"save_latest": 1}, "save_latest=1: expected True or False"),
        ({"blocking": None}, "blocking=None: expected True or False"),
        ({"client_state": []}, "client_state is a list: expected a dict"),
        ({"client_state": {"a": (1,)}}, r"client_state\['a'\] is a tuple"),
        ({"client_state": itself}, "contains itself, or is nested too deep"),
        ({"keep": 0}, "keep=0: expected how many checkpoints to keep, 1 or more, or None for all"),
        ({"keep": True}, "keep=True"),
        ({"directory": 5}, "directory=5: expected the path of a folder"),
        ({"tag": "a/b"}, "tag='a/b': expected the name of a folder"),
        ({"data_iter": iter([])}, r"data_iter is a list_iterator without get_state\(\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            accepted(**given)
    with pytest.raises(CheckpointError, match="strict=1: expected True or False"):
        check_flags({"only": False, "strict": 1})


def test_client_state_is_copied():
    given = {"a": [1]}
    kept = accepted(client_state=given).client_state
    given["a"].append(2)
    assert kept == {"a": [1]}


def test_iterators_at_one_place_and_at_different_places():
    same = crowd(2, lambda group: accepted(group, data_iter=iterator(5)))
    assert [(each.data_state, each.data_states) for each in same] == [({"json": {"at": 5}}, None)] * 2
    other = crowd(2, lambda group: accepted(group, data_iter=iterator(group.me)))
    assert [each.data_states for each in other] == [[{"json": {"at": 0}}, {"json": {"at": 1}}]] * 2
    assert other[0].data_state is None


def test_processes_that_ask_for_different_things_are_told():
    found = crowd(3, lambda group: accepted(group, keep=5 if group.me == 2 else 4))
    assert {str(error) for error in found} == {
        "save_checkpoint was called with keep=4 on process 0 and with keep=5 on process 2: expected the same on all "
        "processes."
    }
    found = crowd(2, lambda group: accepted(group, data_iter=iterator(0) if group.me else None))
    assert "data_iter=False on process 0" in str(found[1]) and "data_iter=True on process 1" in str(found[0])
    assert crowd(2, lambda group: agree(group, "load", {"tag": "a"})) == [None, None]


def test_a_request_that_one_process_cannot_meet():
    found = crowd(2, lambda group: accepted(group, client_state=[] if group.me else {}))
    assert [str(error)[:40] for error in found] == [
        "Process 1: client_state is a list: expec",
        "client_state is a list: expected a dict.",
    ]
