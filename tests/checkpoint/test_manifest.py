"""The manifest: there and back, and what is no manifest."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from jaxpipe.checkpoint.manifest import (
    FORMAT,
    check_json,
    decode_data_state,
    encode_data_state,
    read,
    size_of,
)
from jaxpipe.errors import CheckpointError
from tests.checkpoint.manifests import ARRAYS, MADE


@pytest.fixture
def written(tmp_path):
    """`written(change)` writes the manifest with a change to its JSON."""

    def write(change=lambda found: None):
        found = json.loads(MADE.to_json())
        change(found)
        (tmp_path / "checkpoint.json").write_text(json.dumps(found))
        return tmp_path

    return write


def test_there_and_back(written):
    assert read(written()) == MADE
    assert MADE.num_params == size_of(ARRAYS) == 7, "of params, not of moments"
    assert str(ARRAYS["params/w"]) == "float32[2,3]" and str(ARRAYS["params/n"]) == "int32[]"
    assert read(written(lambda found: found.update(news=1))) == MADE, "of a later version that needed no other format"
    assert read(written(lambda found: found.pop("data_states"))) == MADE, "of an earlier version"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(program="other"), "found something else or a part of one .*program 'other'"),
        (lambda found: found.pop("program"), "found something else or a part of one"),
        (lambda found: found.update(step="3"), "step is '3'"),
        (lambda found: found.update(partition=None), "partition is None"),
        (lambda found: found.update(data_states={}), "data_states is no list"),
        (lambda found: found["files"].update(x="1"), "a size in files is no integer"),
        (lambda found: found["layers"][0]["arrays"].update(w="float32"), "found something else or a part of one"),
        (lambda found: found["layers"][0].pop("tied_to"), "found something else or a part of one"),
        (
            lambda found: found.update(format=FORMAT + 1, versions={"jaxpipe": "9.9"}),
            f"expected format {FORMAT} or older, found {FORMAT + 1}, written by jaxpipe 9.9",
        ),
    ],
    ids=itertools.count(),
)
def test_what_is_no_manifest(written, change, message):
    with pytest.raises(CheckpointError, match=message):
        read(written(change))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[1]", "found something else"), (b'{"a"', "JSONDecodeError"), (b"\xff", "expected a readable manifest")]
    + [(b"[" * 100_000, "found something else"), (None, "found no checkpoint.json in it")],
    ids=itertools.count(),
)
def test_files_that_are_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "checkpoint.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_client_state_must_come_back_as_it_is():
    check_json({"a": [1, 2.5, None, True, "x", {"b": []}]}, "state")
    for value, message in (
        ({"a": [1, (2,)]}, r"state\['a'\]\[1\] is a tuple: expected numbers"),
        ({"a": {1: 2}}, r"state\['a'\] has the key 1: expected a string. Write '1'"),
        (np.float32(1), r"state is a float32.*\.item\(\)"),
        (np.ones(2), "state is a ndarray"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_json(value, "state")


@pytest.mark.parametrize("state", [b"\x00\xff", {"at": 3}, None, [1, "a"]])
def test_states_of_iterators(state):
    encoded = json.loads(json.dumps(encode_data_state(state)))
    assert decode_data_state(encoded) == state
    with pytest.raises(CheckpointError, match=r"data_iter.get_state\(\) is a set"):
        encode_data_state({1})


def test_a_state_is_copied_when_it_is_told():
    state = {"at": [1]}
    encoded = encode_data_state(state)
    state["at"].append(2)
    assert decode_data_state(encoded) == {"at": [1]}
    assert dataclasses.replace(MADE, data_state=encoded).data_state == encoded
