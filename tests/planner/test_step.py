"""Predicted steps, against figures that were published.

A prediction from operations and bytes is a bound of what hardware does: measured steps take longer. What it is for is to
compare schedules.
"""

import pytest

from jaxpipe.planner.candidate import Candidate, Mesh
from jaxpipe.planner.walk import walk
from tests.planner.gpts import CUT, steps

# Qi et al., "Zero Bubble Pipeline Parallelism", arXiv:2401.10241, ICLR 2024. Table 3: layers, heads, width, stages (of one
# A100 each) and rows of a micro-batch; sequences of 1024 tokens. Table 4: by the number of micro-batches, samples per GPU
# and second of 1F1B, 1F1B-I (one layer per chunk) and ZB-1p, whose bubble is that of ZB-H1 by Table 5. The first and the
# last stage have one layer less than the others. How large the vocabulary is, the paper does not say; here it is 50,304.
ZERO_BUBBLE = {
    "1.5B": ((22, 24, 2304, 8, 6), {24: (11.8, 13.1, 12.9), 32: (12.5, 13.4, 13.4), 64: (13.6, 13.9, 14.2)}),
    "6.2B": ((30, 32, 4096, 8, 3), {24: (3.50, 4.01, 3.88), 32: (3.70, 4.08, 4.00), 64: (4.03, 4.19, 4.20)}),
    "14.6B": ((46, 40, 5120, 16, 1), {48: (1.40, 1.54, 1.61), 64: (1.49, 1.59, 1.67), 128: (1.64, 1.66, 1.76)}),
    "28.3B": ((62, 48, 6144, 32, 1), {96: (0.76, 0.82, 0.87), 128: (0.80, 0.85, 0.90), 256: (0.88, 0.90, 0.96)}),
}


def seconds(found, candidate, boundaries):
    """Of the ticks, where ranks wait for their inputs only, as those of other libraries do."""
    stages = found.cutter.stages(candidate, boundaries)
    shape = candidate.schedule, candidate.mesh.pipe, candidate.chunks, candidate.micro_batches
    return walk(*shape, stages.ops, found.comm(candidate, stages), joined=False).makespan


@pytest.mark.parametrize("name", ZERO_BUBBLE)
def test_ratios_between_schedules_of_the_zero_bubble_paper(name):
    (layers, heads, width, pipe, rows), published = ZERO_BUBBLE[name]
    found = steps("a100", blocks=layers, width=width, heads=heads, length=1024, vocabulary=50_304)
    per_rank = (layers + 2) // pipe
    for count, (plain, interleaved, zero_bubble) in published.items():
        made = {}
        for schedule, chunks in (("1f1b", 1), ("interleaved", per_rank), ("zero_bubble", 1)):
            candidate = Candidate(Mesh(pipe, 1), schedule, chunks, count, rows, "none", 0)
            made[schedule] = seconds(found, candidate, tuple(range(0, layers + 3, per_rank // chunks)))
        assert made["1f1b"] / made["zero_bubble"] == pytest.approx(zero_bubble / plain, rel=0.06)
        assert made["1f1b"] / made["interleaved"] == pytest.approx(interleaved / plain, rel=0.10)
        # Samples per GPU and second: no more than a bound, and not a loose one.
        assert 1 < count * rows / made["1f1b"] / pipe / plain < 1.35


# Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", arXiv:2104.04473.
# Table 1: layers, heads, width, pipeline-parallel size, GPUs, batch size and teraFLOP/s per GPU. Tensor parallelism is
# eight-way, sequences have 2048 tokens, the vocabulary 51,200; interleaved schedule, activations computed again.
MEGATRON = {
    "145.6B": (80, 96, 12288, 8, 1536, 2304, 148),
    "310.1B": (96, 128, 16384, 16, 1920, 2160, 155),
    "1008.0B": (128, 160, 25600, 64, 3072, 3072, 163),
}
LENGTH, VOCABULARY, TENSOR = 2048, 51_200, 8


def megatron(layers, heads, width):
    sizes = {"blocks": layers, "heads": heads, "width": width, "length": LENGTH, "vocabulary": VOCABULARY}
    return steps("a100", **sizes, sharding=CUT)


def cuts(layers, stages):
    """Equal numbers of blocks; the embedding and the head beside the first and the last of them."""
    return (0, *range(1 + layers // stages, 1 + layers, layers // stages), layers + 2)


def test_teraflops_of_megatron():
    """How models of different size and pipelines of different length compare, within 15 %; and none is faster than said."""
    ratios = []
    for layers, heads, width, pipe, chips, batch, published in MEGATRON.values():
        found, mesh = megatron(layers, heads, width), Mesh(pipe, chips // TENSOR // pipe, TENSOR)
        candidate = Candidate(mesh, "interleaved", 2, batch // mesh.data, 1, "layer", 0)
        boundaries = cuts(layers, 2 * pipe)
        where = tuple(stage % pipe for stage in range(2 * pipe))
        around = found.around_of(mesh, 0, *found.memory.weights(TENSOR, boundaries, where))
        took = seconds(found, candidate, boundaries) + sum(around)
        # Equation 3 of the paper counts the operations, the second forward included.
        terms = 1 + LENGTH / (6 * width) + VOCABULARY / (16 * layers * width)
        flops = 96 * batch * LENGTH * layers * width**2 * terms
        ratios.append(flops / took / chips / 1e12 / published)
    assert all(1 < ratio < 1.6 for ratio in ratios)
    assert max(ratios) / min(ratios) < 1.15


def test_what_megatron_gains_by_interleaving():
    """The abstract says 10 % and more. Figure 12 (175 billion parameters, 96 GPUs) has no numbers, but section 5.3.2 says
    that the gain gets smaller as the batch grows from 12 to 60."""
    found, gains = megatron(96, 96, 12288), []
    for batch in (12, 36, 60):
        plain, chunked = (
            seconds(found, Candidate(Mesh(12, 1, TENSOR), name, v, batch, 1, "layer", 0), cuts(96, 12 * v))
            for name, v in (("1f1b", 1), ("interleaved", 2))
        )
        gains.append(plain / chunked - 1)
    assert gains[0] > gains[1] > 0.10 > gains[2] > 0


def test_the_parts_of_a_step_add_up():
    found = steps("a100", blocks=6, width=32, length=16)
    candidate = Candidate(Mesh(4, 2), "1f1b", 1, 8, 2, "dots", 1)
    step = found.step(candidate)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert found.bound(candidate) <= step.seconds and 0 < step.bubble < 1
    assert found.least_bytes(candidate) <= step.total_bytes
    assert found.around(candidate).link > 0 == found.around(candidate._replace(mesh=Mesh(4, 1))).link
