"""What watches a run of `jaxpipe.Trainer`: writers of logs, a progress bar, an early stop, and the base for your own.

    class Printer(jaxpipe.callbacks.Callback):
        def on_evaluate(self, run, step, found):
            print(step, found["loss"])

All calls come from the main thread, in the order of the steps. What a callback gets are numbers on the host.
"""

from jaxpipe.trainer.callback import Callback, Result, Running
from jaxpipe.trainer.early_stop import EarlyStop
from jaxpipe.trainer.history import History
from jaxpipe.trainer.json_lines import JsonLines
from jaxpipe.trainer.progress_bar import ProgressBar
from jaxpipe.trainer.scalar_writer import ScalarWriter
from jaxpipe.trainer.tensorboard import TensorBoard
from jaxpipe.trainer.weights_and_biases import WandB

__all__ = [
    "Callback",
    "EarlyStop",
    "History",
    "JsonLines",
    "ProgressBar",
    "Result",
    "Running",
    "ScalarWriter",
    "TensorBoard",
    "WandB",
]
