"""Which stages there are, and why there are no others."""

import numpy as np
import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.layout.zero import check_zero_stage


def test_the_stages_that_are_there():
    assert [check_zero_stage(value) for value in (0, 1, np.int32(1))] == [0, 1, 1]
    for value, message in [
        (2, "Stage 2 is not there: .*once per micro-batch"),
        (3, "Stage 3 is not there: .*twice per micro-batch.*Use zero_stage=1, and more ranks"),
        (True, "zero_stage=True: it is 0, or 1"),
        ("1", "zero_stage='1': it is 0, or 1, which cuts"),
        (-1, r"zero_stage=-1: .*over the data ranks\.$"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_zero_stage(value)
