import json

import numpy as np

from jaxpipe.trainer.history import History
from tests.trainer.runs import FakeRun


def test_curves_survive_a_checkpoint():
    history, run = History(), FakeRun()
    for step in (1, 2):
        history.on_step(run, step, {"loss": 3.0 - step, "each": np.arange(2)})
    history.on_evaluate(run, 2, {"loss": 5.0, "accuracy": 0.25})
    again = History()
    again.set_state(json.loads(json.dumps(history.get_state())))
    again.on_step(run, 3, {"loss": 0.5})
    assert again.curve("loss") == ([1, 2, 3], [2.0, 1.0, 0.5]) and again.curve("each") == ([1, 2], [[0, 1]] * 2)
    assert again.curve("accuracy", evaluations=True) == ([2], [0.25]) and again.curve("accuracy") == ([], [])
