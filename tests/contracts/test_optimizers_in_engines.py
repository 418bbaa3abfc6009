"""Five steps of training with every optimizer: the same weights as on one device with one entry per layer."""

import pytest

from tests.optimizer.engines import STEPS, data, engine_for, plain_training
from tests.optimizer.optimizers import ALIKE, LOOSE, OPTIMIZERS, error, natural

# Each optimizer at one number of stages, each number with a part of them. `test_optimizers_on_stacks` has other numbers,
# and those with a neighbour of the same mechanism.
CASES = [(name, 2 + i % 3) for i, name in enumerate(OPTIMIZERS) if name not in ALIKE]


@pytest.mark.parametrize(("name", "stages"), CASES)
def test_through_the_engine(name, stages):
    check(name, stages)


def check(name, stages):
    past, engine, items = plain_training(name), engine_for(OPTIMIZERS[name], stages), data(STEPS)
    for step in range(STEPS):
        engine.train_batch(items)
        off = error(natural(engine.to_layers()), past[step])
        assert off <= LOOSE.get(name, 1e-6), f"step {step}: {off:.1e}"
