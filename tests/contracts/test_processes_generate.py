"""Generation by several processes: every process has all tokens, and they are those of one process."""

import pytest

from tests.contracts import processes_generate
from tests.contracts.launched import launched


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["data", "pipe"])
def test_every_process_has_the_tokens_of_one(inside):
    """With "data" the tokens go back from one process to the other, with "pipe" the rows are in two processes."""
    found = launched("processes_generate.py", 2, 2, 2, 2, inside)
    with pytest.warns(UserWarning, match="has no cache"):
        one = processes_generate.main(2, 2, "data")
    assert len(found) == 2 and all(each == one for each in found)
