"""One of several processes has something else: `initialize` says so on all of them."""

import pytest

from tests.contracts.launched import launched
from tests.contracts.processes_starts import CASES

WORDS = {
    "key": ("ConfigError", "Process 1 differs from process 0 in key ('[0 4]', and there '[0 3]')"),
    "config": ("ConfigError", "in config: gradient_clipping ('2.0', and there '1.0')"),
    "precision": ("ConfigError", "in config: compute_dtype (\"'bfloat16'\", and there 'None')"),
    "loss scale": ("ConfigError", "in config: loss_scale ('DynamicScale(initial=65536.0, window=6,"),
    "schedule": ("ConfigError", "in config: schedule (\"'gpipe'\", and there \"'1f1b'\")"),
    "one layer more": ("LayerError", "in the model: layer 4 (block)"),
    "a layer": ("LayerError", "in the model: layer 2 (block)"),
    "init": ("LayerError", "in the model: layer 3 (block)"),
    "loss": ("LossError", "in loss_fn"),
    "optimizer": ("ConfigError", "in the optimizer"),
    "example": ("DataError", "in example ('float32[4,4], float32[4,4]', and there 'float32[8,4], float32[8,4]')"),
    "mesh": ("MeshError", "in mesh"),
    "layers": ("LayerError", "in layers: layer 2 (block)"),
    "wrong": ("ConfigError", "num_micro_batches=0 must be an integer"),
}


@pytest.mark.slow
def test_what_differs_is_named_on_all_processes():
    found = launched("processes_starts.py", 2, 2)
    assert CASES.keys() - {"nothing"} == WORDS.keys()
    for process in found:
        assert process["nothing"] is None
        for name, (kind, words) in WORDS.items():
            assert process[name][0] == kind and words in process[name][1], name
    assert found[0]["wrong"][1].startswith("Process 1: ") and found[1]["wrong"][1].startswith("num_micro_batches")
