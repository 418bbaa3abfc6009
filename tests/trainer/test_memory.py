import json

import numpy as np

from jaxpipe.trainer.callback import Callback
from jaxpipe.trainer.memory import recall, remember


class Held(Callback):
    def __init__(self, state=None):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


class Other(Held):
    pass


def test_states_find_their_callbacks_though_others_come_and_go():
    told = remember((3, {"loss": 1.5, "rows": np.arange(2)}), [Held("a"), Other("o"), Held("b"), Held()])
    held = [Other(), Held(), Held(), Held("mine"), Callback()]
    assert recall(json.loads(json.dumps(told)), held) == (3, {"loss": 1.5, "rows": [0, 1]})
    assert [callback.state for callback in held[:4]] == ["o", "a", "b", "mine"]


def test_a_checkpoint_that_no_trainer_has_written():
    assert recall({"epoch": 3}, [Held()]) is None and recall(remember(None, []), [Held()]) is None
