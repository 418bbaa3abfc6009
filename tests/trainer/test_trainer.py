"""Runs of a `Trainer` beside the loop that a user would write, and runs that end too soon."""

import json

import jax
import numpy as np
import pytest

import jaxpipe
from jaxpipe.callbacks import Callback, EarlyStop, History, JsonLines
from jaxpipe.errors import ConfigError, DataError
from tests.engines import M, batches, engine_for, stream
from tests.models import WIDTH, Block, Embedding, LinenHead, masked_cross_entropy

STEPS = 7
TRAIN = list(stream(batches(STEPS)))
TEST = list(stream(batches(1, first=50)))


def new_engine():
    layers = [Embedding, (Block, WIDTH), (Block, WIDTH), LinenHead]
    specs = [jaxpipe.LayerSpec(*(layer if isinstance(layer, tuple) else (layer,))) for layer in layers]
    return engine_for(jaxpipe.PipelineModule(specs, masked_cross_entropy), stages=2)


class Told(Callback):
    """Writes down what it is told."""

    def __init__(self):
        self.calls, self.results = [], []

    def on_start(self, run):
        self.calls.append(("start", run.began, run.steps, run.writes))

    def on_step(self, run, step, metrics):
        self.calls.append(("step", step))

    def on_evaluate(self, run, step, found):
        self.calls.append(("evaluate", step))

    def on_checkpoint(self, run, step, path):
        self.calls.append(("checkpoint", step))

    def on_end(self, run, result):
        self.results.append(result)


class At(Callback):
    """Does something when it is told of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step(self, run, step, metrics):
        if step == self.step:
            self.act(run)


def weights(engine):
    return jax.tree.map(np.asarray, engine.to_layers())


@pytest.fixture(scope="module")
def by_hand():
    """The loop without a trainer: losses, evaluations by step, weights."""
    engine, data, losses, found = new_engine(), iter(TRAIN), [], {}
    for step in range(1, STEPS + 1):
        losses.append(float(engine.train_batch(data)))
        if step % 3 == 0 or step == STEPS:
            found[step] = engine.evaluate(TEST)
    return losses, found, weights(engine)


@pytest.mark.slow
def test_a_run_is_the_loop_by_hand_though_it_was_interrupted(by_hand, tmp_path):
    """It dies at step 5, is started again from the checkpoint of step 4, and nobody can tell from what it leaves."""
    losses, found, last = by_hand

    def run(steps, *callbacks):
        history, told, log = History(), Told(), JsonLines(tmp_path / "log.jsonl")
        trainer = jaxpipe.Trainer(
            new_engine(),
            TRAIN,
            steps=STEPS,
            eval_data=TEST,
            eval_every=3,
            checkpoint_dir=tmp_path / "run",
            checkpoint_every=4,
            callbacks=[*callbacks, history, told, log],
        )
        return trainer, history, told

    def die(run):
        raise OSError("the disk is full")

    trainer, _, told = run(STEPS, At(5, die))
    with pytest.raises(OSError, match="the disk is full"):
        trainer.run()
    assert told.results[0].ended == "failed" and told.results[0].reason == "OSError: the disk is full"
    assert told.calls[-1] == ("checkpoint", 4), "step 5 was told to those in front of the one that failed, and no other"

    trainer, history, told = run(STEPS)
    result = trainer.run()
    assert (result.began, result.step, result.ended) == (4, STEPS, "steps")
    assert told.results == [result] and result.checkpoint == str(tmp_path / "run" / f"global_step{STEPS}")
    assert told.calls == [
        ("start", 4, STEPS, True),
        ("step", 5),
        ("step", 6),
        ("evaluate", 6),
        ("step", 7),
        ("evaluate", 7),
        ("checkpoint", 7),
    ]
    assert history.curve("loss") == (list(range(1, STEPS + 1)), losses)
    assert dict(history.evaluations) == found and result.evaluation == found[STEPS]
    assert result.metrics["loss"] == losses[-1] and "grad_norm" in result.metrics
    jax.tree.map(np.testing.assert_array_equal, weights(trainer.engine), last)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines if "train/loss" in line] == losses

    # A run that is complete makes no step more, evaluates nothing, and remembers what it had found.
    trainer, _, told = run(STEPS)
    again = trainer.run()
    assert again.evaluation == found[STEPS] and again.began == again.step == STEPS and not again.metrics
    assert told.calls == [("start", STEPS, STEPS, True)]
    with pytest.raises(ConfigError, match="was called before"):
        trainer.run()


@pytest.mark.slow
def test_what_ends_a_run(by_hand, tmp_path, monkeypatch, no_compiles):
    losses, found, _ = by_hand
    engine, told = new_engine(), Told()
    ended = jaxpipe.Trainer(
        engine, TRAIN[: 2 * M + 1], eval_data=lambda: iter(TEST), eval_first=True, callbacks=[told]
    ).run()
    assert ended.ended == "data" and "ended after 1 of 3 micro-batches" in ended.reason and ended.step == 2
    assert told.calls[1:] == [("evaluate", 0), ("step", 1), ("step", 2), ("evaluate", 2)], (
        "no step is lost, and the end is evaluated"
    )

    # The same engine goes on where it stands; nothing compiles that was compiled before.
    data, stop = iter(TRAIN[2 * M :]), At(3, lambda run: run.stop("enough"))
    with no_compiles():
        stopped = jaxpipe.Trainer(engine, data, steps=STEPS, callbacks=[stop]).run()
    assert (stopped.ended, stopped.reason, stopped.began) == ("stopped", "enough", 2)
    assert 3 <= stopped.step <= 6, "it is told of a step some steps later"

    # Evaluations of the same weights are no better than the first one.
    rule = At(0, None), EarlyStop(1, least_change=1e9)
    early = jaxpipe.Trainer(
        engine, iter(TRAIN * 9), steps=90, eval_data=TEST, eval_every=stopped.step + 1, callbacks=rule
    ).run()
    assert early.ended == "stopped" and early.step == 2 * (stopped.step + 1) and "EarlyStop" in early.reason

    asked = iter([False, True])
    monkeypatch.setattr(jaxpipe.Engine, "preempted", lambda engine: next(asked))
    trainer = jaxpipe.Trainer(engine, iter(TRAIN), eval_data=TEST, checkpoint_dir=tmp_path, callbacks=[told])
    over = trainer.run()
    assert over.ended == "preempted" and over.step == over.began + 1 and over.evaluation is None
    assert over.checkpoint == str(tmp_path / f"global_step{over.step}") and (tmp_path / "latest").exists()


@pytest.mark.slow
def test_errors_reach_the_user_and_callbacks_are_told():
    engine, first, last = new_engine(), Told(), Told()

    class Broken(Callback):
        def on_end(self, run, result):
            raise OSError("cannot close")

    with pytest.raises(OSError, match="cannot close"):
        jaxpipe.Trainer(engine, TRAIN, steps=1, callbacks=[first, Broken(), last]).run()
    assert len(first.results) == len(last.results) == 1 and first.results[0].ended == "steps"

    with pytest.raises(DataError, match="there is nothing to evaluate"):
        jaxpipe.Trainer(engine, TRAIN, steps=2, eval_data=[], callbacks=[first]).run()
    assert first.results[1].ended == "failed" and "DataError" in first.results[1].reason


def test_errors_before_anything_is_traced(no_compiles):
    engine = new_engine()
    with no_compiles():
        for options, error, words in [
            ({"steps": 0}, ConfigError, "steps=0 must be an integer, 1 or more"),
            ({"eval_every": 2}, ConfigError, "eval_every=2 without eval_data"),
            ({"eval_data": TEST, "eval_every": 0}, ConfigError, "eval_every=0"),
            ({"checkpoint_every": 2}, ConfigError, "checkpoint_every=2 without checkpoint_dir"),
            ({"keep": 2}, ConfigError, "keep=2 without checkpoint_dir"),
            ({"callbacks": [History]}, ConfigError, "is the class History"),
            ({"eval_data": iter(TEST)}, DataError, "would use it up"),
        ]:
            with pytest.raises(error, match=words):
                jaxpipe.Trainer(engine, TRAIN, **options)
        with pytest.raises(ConfigError, match="expected what jaxpipe.initialize returns"):
            jaxpipe.Trainer(engine.pipe, TRAIN)
    assert engine.train_calls == 0
