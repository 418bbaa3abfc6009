import json
import math

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.trainer.early_stop import EarlyStop
from tests.trainer.runs import FakeRun


def shown(stop, values, first=1):
    """At which evaluations it asks to stop."""
    asked = []
    for number, value in enumerate(values, first):
        run = FakeRun()
        stop.on_evaluate(run, 10 * number, {"loss": value, "accuracy": -value})
        asked += [number] if run.reasons else []
    return asked


@pytest.mark.parametrize(
    ("values", "options", "asked"),
    [
        ([3, 2, 1, 0.5], {}, []),
        ([3, 2, 2, 2.5, 2.1], {}, [4, 5]),
        ([3, 4, 2, 3, 4], {}, [5]),
        ([3, 2.5, 2.1, 1.9], {"least_change": 1.0}, [3]),
        ([3, math.nan, math.inf, 1], {}, [3]),
        ([math.nan, math.nan, 1], {}, [2]),
        ([3, 2, 2, 2.5], {"metric": "accuracy", "mode": "max"}, [4]),
        ([3, 2, 1], {"mode": "max"}, [3]),
    ],
)
def test_when_it_asks(values, options, asked):
    assert shown(EarlyStop(2, **options), values) == asked


def test_it_goes_on_from_its_state_and_stays_stopped():
    values = [3, 2, 4, 5, 6]
    before = EarlyStop(3)
    assert shown(before, values[:3]) == []
    after = EarlyStop(3)
    after.set_state(json.loads(json.dumps(before.get_state())))
    assert shown(after, values[3:], first=4) == [5] and (after.best, after.best_step, after.waited) == (2, 20, 3)
    run = FakeRun()
    after.on_start(run)
    assert run.reasons == ["EarlyStop: after 3 more evaluations the best loss is still the 2 of step 20"]


def test_errors():
    with pytest.raises(ConfigError, match=r"patience=0 must be an integer, 1 or more"):
        EarlyStop(0)
    with pytest.raises(ConfigError, match=r"mode='least' must be"):
        EarlyStop(1, mode="least")
    with pytest.raises(ConfigError, match=r"least_change=-1 must be"):
        EarlyStop(1, least_change=-1)
    with pytest.raises(ConfigError, match=r"'accurracy' is not among .* loss, accuracy. Did you mean 'accuracy'\?"):
        EarlyStop(1, "accurracy").on_evaluate(FakeRun(), 1, {"loss": 1.0, "accuracy": 0.5})
