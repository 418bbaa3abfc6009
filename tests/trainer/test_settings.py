import pytest

from jaxpipe.errors import ConfigError, DataError
from jaxpipe.trainer import settings
from jaxpipe.trainer.callback import Callback


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_a_cadence_is_a_count(value):
    with pytest.raises(ConfigError, match=r"Trainer: eval_every=.* must be an integer, 1 or more"):
        settings.cadence("eval_every", value, "eval_data", [])


def test_a_cadence_needs_something_to_do():
    with pytest.raises(ConfigError, match=r"checkpoint_every=5 without checkpoint_dir. Pass checkpoint_dir="):
        settings.cadence("checkpoint_every", 5, "checkpoint_dir", None)
    assert settings.cadence("eval_every", None, "eval_data", None) is None
    assert settings.cadence("eval_every", 3, "eval_data", []) == 3


def test_callbacks():
    one = Callback()
    assert settings.check_callbacks([one]) == settings.check_callbacks(one) == (one,)
    with pytest.raises(
        ConfigError, match=r"callbacks\[1\]=<built-in function print>: expected a jaxpipe.callbacks.Callback"
    ):
        settings.check_callbacks([one, print])
    with pytest.raises(ConfigError, match=r"callbacks\[0\] is the class Callback. Call it: write Callback\(...\)"):
        settings.check_callbacks([Callback])


@pytest.mark.parametrize(
    ("train", "evaluation", "words"),
    [
        (3, None, "train_data is a int, which yields nothing"),
        ([], 3, "eval_data is a int, which yields nothing"),
        ([], iter([]), "eval_data is an iterator .* would use it up"),
        (lambda: [], None, "train_data=.* called with the number of micro-batches that were used, but too many"),
        ([], lambda seen: [], "eval_data=.* called with nothing, but missing a required argument"),
    ],
)
def test_data_are_looked_at_before_anything_runs(train, evaluation, words):
    with pytest.raises(DataError, match=words):
        settings.check_data(train, evaluation, None)


def test_data_that_fit():
    settings.check_data(lambda seen: [], lambda: [], None)
    settings.check_data(iter([]), iter([]), 2)
    settings.check_data([], None, None)


def test_an_engine_is_one():
    with pytest.raises(ConfigError, match=r"engine='gpt': expected what jaxpipe.initialize returns"):
        settings.check_engine("gpt")
