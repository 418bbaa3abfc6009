"""What differs between processes is named; the processes are made up here."""

import pytest

from jaxpipe.errors import ConfigError, DataError, LayerError
from jaxpipe.processes.compare import Field, check_alike


class Group:
    """Four processes of which the others have said `others`."""

    members = (0, 1, 4, 5)

    def __init__(self, *others):
        self.others = others

    def gather(self, value):
        return [value, *self.others]


FIELDS = [
    Field("key", 3, ConfigError, True),
    Field("layers", {"a": 1, "b": 2}, LayerError),
    Field("loss", 7, DataError),
]


def test_nothing_differs():
    check_alike(Group(*[[3, {"a": 1, "b": 2}, 7]] * 3), FIELDS)


@pytest.mark.parametrize(
    ("odd", "kind", "message"),
    [
        ([4, {"a": 1, "b": 2}, 8], ConfigError, r"Process 4 differs from process 0 in key \(4, and there 3\)\. All"),
        ([3, {"a": 1, "b": 5}, 7], LayerError, r"Process 4 differs from process 0 in layers: b\. All"),
        ([3, {"a": 1, "b": 2, "c": 1}, 7], LayerError, "Process 4 differs from process 0 in layers: c"),
        ([3, {"a": 1, "b": 2}, 9], DataError, "in loss"),
    ],
    ids=["value", "part", "more", "hash"],
)
def test_the_odd_one_of_four_is_named(odd, kind, message):
    good = [3, {"a": 1, "b": 2}, 7]
    with pytest.raises(kind, match=message):
        check_alike(Group(good, odd, good), FIELDS)


def test_the_first_process_may_be_the_odd_one():
    with pytest.raises(ConfigError, match=r"Process 0 differs from process 1 in key \(3, and there 4\)"):
        check_alike(Group(*[[4, {}, 0]] * 3), FIELDS)


def test_what_a_process_does_not_know_is_not_compared():
    good = [3, {"a": 1, "b": 2}, 7]
    check_alike(Group([3, {"a": None, "b": 2}, None], [None, {"a": 1, "b": None}, 7], good), FIELDS)
    with pytest.raises(LayerError, match="Process 5 differs from process 0 in layers: b"):
        check_alike(Group([3, {"a": 1, "b": None}, 7], good, [3, {"a": 1, "b": 4}, 7]), FIELDS)
