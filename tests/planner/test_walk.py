"""The walk, against the simulator and against figures of the zero-bubble paper."""

import numpy as np
import pytest

from jaxpipe.planner import tables
from jaxpipe.planner.walk import OpCosts, _makespan, lower_bound, walk
from jaxpipe.schedules.simulate import simulate

ALL = [
    ("1f1b", 1),
    ("eager_1f1b", 1),
    ("gpipe", 1),
    ("interleaved", 3),
    ("looped_bfs", 2),
    ("zero_bubble", 1),
    ("interleaved_zero_bubble", 2),
    ("zbv", 2),
]


def even(stages, chunks, forward, back, weight):
    """Costs of one micro-batch on a rank, cut evenly."""
    return OpCosts(*(np.full(stages, cost / chunks) for cost in (forward, back, weight)))


@pytest.mark.parametrize(("name", "chunks"), ALL)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 6), (4, 8), (4, 24)])
def test_it_is_what_the_simulator_says(name, chunks, ranks, micro_batches):
    """The longer ones are not walked to their end."""
    costs = 1.0, 1.1, 0.8
    wanted = float(simulate(tables.make(name, ranks, chunks, micro_batches), *costs, comm=0.07).makespan)
    found = walk(name, ranks, chunks, micro_batches, even(ranks * chunks, chunks, *costs), 0.07, joined=False)
    assert found.makespan == pytest.approx(wanted, rel=1e-9)
    assert found.busy == pytest.approx(np.full(ranks, micro_batches * sum(costs)))
    assert found.bubble == pytest.approx(1 - micro_batches * sum(costs) / wanted)
    joined = walk(name, ranks, chunks, micro_batches, even(ranks * chunks, chunks, *costs), 0.07)
    assert joined.makespan >= found.makespan * (1 - 1e-9)


@pytest.mark.parametrize(("name", "chunks"), ALL)
def test_stages_of_unequal_costs(name, chunks):
    """Bounds hold, and what is told from short tables is near what long ones give."""
    rng = np.random.default_rng(len(name))
    for ranks, count in ((2, 12), (3, 18), (4, 24)):
        stages = ranks * chunks
        costs = OpCosts(*(rng.uniform(0.9, 1.1, stages) for _ in range(3)))
        comm = rng.uniform(0, 0.1, stages - 1)
        for joined in (True, False):
            whole = _makespan(tables.table(name, ranks, chunks, count), costs, comm, joined)
            found = walk(name, ranks, chunks, count, costs, comm, joined).makespan
            assert found == pytest.approx(whole, rel=0.02)
            assert lower_bound(name, ranks, chunks, count, costs, comm) <= min(found, whole) * (1 + 1e-9)


def test_1f1b_in_its_parity_form_loses_nothing_by_waiting_for_its_neighbours():
    costs = even(4, 1, 1.0, 1.0, 1.0)
    assert walk("1f1b", 4, 1, 8, costs).makespan == 33 == walk("1f1b", 4, 1, 8, costs, joined=False).makespan


# Qi et al., "Zero Bubble Pipeline Parallelism", arXiv:2401.10241, ICLR 2024, Table 5: bubble rates of 1F1B, 1F1B-I and
# ZB-H1. They are computed there from times that were measured. Those are printed in the scripts of the authors' demo
# (huggingface.co/spaces/sail/zero-bubble-pipeline-parallellism): stages p, micro-batches m, F, B, W and communication; v
# is the number of layers of a stage, each of which is a chunk in 1F1B-I.
PUBLISHED = [
    (8, 24, 18522, 18086, 9337, 601, 3, (0.2431, 0.1055, 0.1585)),
    (8, 64, 18546, 18097, 9321, 762, 3, (0.1240, 0.0443, 0.0674)),
    (8, 24, 29718, 29444, 19927, 527, 4, (0.2347, 0.0808, 0.1323)),
    (8, 32, 29802, 29428, 19530, 577, 4, (0.1898, 0.0628, 0.1045)),
    (16, 48, 11347, 11248, 8132, 377, 3, (0.2552, 0.1104, 0.1397)),
    (16, 128, 11325, 11308, 8109, 378, 3, (0.1251, 0.0445, 0.0576)),
    (32, 96, 10419, 10207, 7715, 408, 2, (0.2646, 0.1493, 0.1421)),
]


@pytest.mark.parametrize(("ranks", "count", "f", "b", "w", "comm", "chunks", "rates"), PUBLISHED)
def test_bubble_rates_of_the_zero_bubble_paper(ranks, count, f, b, w, comm, chunks, rates):
    """1F1B and ZB-H1 to all digits; of 1F1B-I the paper does not say how communication was counted."""
    found = []
    for name, v in (("1f1b", 1), ("interleaved", chunks), ("zero_bubble", 1)):
        makespan = walk(name, ranks, v, count, even(ranks * v, v, f, b, w), comm, joined=False).makespan
        found.append(1 - count * (f + b + w) / makespan)
    assert [round(found[0], 4), round(found[2], 4)] == [rates[0], rates[2]]
    assert found[1] == pytest.approx(rates[1], abs=0.0045)
