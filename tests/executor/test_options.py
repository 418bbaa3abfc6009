"""From the keywords of a call to the form of its answer."""

import itertools

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.executor.options import Found, Options

FLAGS = {
    "return_logits": (False, True),
    "compute_loss": (True, False),
    "reduce_output": ("avg", "sum", None),
    "bcast_loss": (True, False),
    "return_metrics": (False, True),
    "spread_loss": (None, True, False),
}


def test_every_combination_is_refused_or_makes_sense():
    made = set()
    for values in itertools.product(*FLAGS.values()):
        asked = dict(zip(FLAGS, values, strict=True))
        contradicts = asked["spread_loss"] and (
            asked["return_logits"] or not asked["compute_loss"] or not asked["bcast_loss"]
        )
        if contradicts:
            with pytest.raises(ConfigError):
                Options.of(**asked)
            continue
        options = Options.of(**asked)
        assert options.loss or options.outputs, "something is wanted"
        assert options.loss == asked["compute_loss"] and options.metrics == asked["return_metrics"]
        assert options.outputs or not asked["return_logits"]
        if not options.loss:  # one program, however the loss that is not computed is to be reduced
            assert options.reduce_output is None and options.broadcast
        made.add(options)
    without_loss = {options for options in made if not options.loss}
    assert len(without_loss) == 4, "they differ in spread_loss, None or False, and in whether metrics are wanted"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"return_logits": 1}, "return_logits=1: it is True or False"),
        ({"reduce_output": "mean"}, "reduce_output='mean'"),
        ({"spread_loss": "yes"}, "spread_loss='yes'"),
        ({"spread_loss": True, "bcast_loss": False}, "spread_loss=True shares the work"),
    ],
    ids=["flag", "reduction", "spread", "contradiction"],
)
def test_refusals(asked, message):
    with pytest.raises(ConfigError, match=message):
        Options.of(**asked)


def test_the_form_of_an_answer():
    found = Found("loss", {"a": 1}, "outputs", {"b": 2})
    assert found.answer(Options()) == "loss"
    assert found.answer(Options(outputs=True)) == ("loss", "outputs")
    assert found.answer(Options(outputs=True, loss=False)) == "outputs"
    assert found.answer(Options(outputs=True, loss=False, metrics=True)) == ("outputs", {"a": 1, "b": 2})
    assert found.answer(Options(metrics=True)) == ("loss", {"a": 1, "b": 2})
    assert found.answer(Options(outputs=True, metrics=True)) == ("loss", "outputs", {"a": 1, "b": 2})


def test_what_a_process_without_the_last_rank_answers():
    found = Found(None, None, "outputs", {})
    options = Options(outputs=True, metrics=True, broadcast=False)
    assert found.answer(options) == (None, "outputs", None)
