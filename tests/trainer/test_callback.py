from jaxpipe.trainer.callback import Callback
from tests.trainer.runs import FakeRun, result


def test_a_callback_need_not_do_anything():
    callback, run = Callback(), FakeRun()
    callback.on_start(run)
    callback.on_step(run, 1, {"loss": 1.0})
    callback.on_evaluate(run, 1, {"loss": 1.0})
    callback.on_checkpoint(run, 1, "run/global_step1")
    callback.on_end(run, result())
    assert callback.get_state() is None and callback.set_state(None) is None and not run.reasons


def test_a_result_as_text():
    assert str(result()) == "ended after step 4: all 4 steps are done\ntraining loss 0.5000"
    told = str(result(metrics={}, evaluation={"loss": 2.0}, checkpoint="run/global_step4"))
    assert told.splitlines()[1:] == ["evaluation loss 2.0000", "checkpoint run/global_step4"]
