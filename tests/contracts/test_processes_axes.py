"""An axis whose devices are in several processes: training, layers and checkpoints are those of one process."""

import numpy as np
import pytest

from tests.contracts import processes_axes
from tests.contracts.launched import launched
from tests.contracts.test_further_axes_state import engine_for


@pytest.mark.slow
def test_several_processes_find_what_one_finds(tmp_path):
    """Each process has one device, so that the two of the axis "model" are in two processes."""
    found = launched("processes_axes.py", 2, 1, tmp_path / "several")
    one = processes_axes.main(tmp_path / "one")
    assert len(found) == 2
    for each in found:
        assert each["rows"] == one["rows"] == 4  # all of them have all rows of their data rank
        for name in ("losses", "evaluation", "sums"):
            np.testing.assert_allclose(each[name], one[name], rtol=2e-6, err_msg=name)
    other = engine_for("adamw", key=4, model=4)
    other.load_checkpoint(tmp_path / "several")
    assert other.global_steps == 2
