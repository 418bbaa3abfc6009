"""Several processes compute what one computes: losses, norms, evaluations, digit by digit up to rounding."""

import numpy as np
import pytest

from tests.contracts.launched import launched
from tests.contracts.processes import train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipe", "data", "names"),
    # Data ranks alone, and a model without ties, are in test_processes_data.py.
    [(2, 2, ("tied",)), (4, 1, ("mixed",))],
    ids=["both", "pipe"],
)
def test_two_processes_train_and_evaluate_as_one(pipe, data, names):
    found = launched("processes.py", 2, 2, pipe, data, *names)
    assert len(found) == 2 and found[0] == found[1], "every process has the same numbers"
    for model in names:
        alone = train(model, pipe, data)
        for name, value in alone.items():
            np.testing.assert_allclose(found[0][model][name], value, rtol=1e-6, err_msg=f"{model}: {name}")
