"""The state of layers in several processes is that of one: trained, saved, loaded, and taken over."""

import numpy as np
import pytest

from tests.contracts.launched import launched
from tests.contracts.processes_state import engine_on, main, numbers


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """What one process finds."""
    return main(tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["data", "pipe"])
def test_state_of_two_processes(inside, wanted, tmp_path):
    for found in launched("processes_state.py", 2, 2, tmp_path / "together", inside):
        assert found["loaded"] and found["taken over"]
        for name in ("loss", "evaluated"):
            assert abs(found[name] - wanted[name]) <= 2e-6 * wanted[name], name
        for name in ("state", "later"):
            for a, b in zip(found[name], wanted[name], strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=name)
    engine = engine_on(4, 1)
    engine.load_checkpoint(tmp_path / "together", "one")
    assert numbers(engine.layer_state()) == found["state"], "one process reads what two have written, bit for bit"
