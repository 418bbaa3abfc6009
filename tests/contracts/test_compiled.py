"""What the compiled programs promise, read off the programs: memory, size, permutes, reductions. No timing."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe.executor import train
from tests.models import LENGTH, ROWS, VOCAB, cross_entropy, masked_cross_entropy, tied

SCHEDULES = ("1f1b", "eager_1f1b", "gpipe")


@functools.cache  # several tests look at the same program
def compiled(num_micro_batches, schedule="1f1b", stages=4, data=2, evaluate=False, loss=cross_entropy, **options):
    pipe = jaxpipe.Pipeline(tied(loss=loss), jaxpipe.make_mesh(pipe=stages, data=data), num_micro_batches, schedule)
    params = pipe.init(jax.random.key(0), jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32))
    batch = (jax.ShapeDtypeStruct((num_micro_batches, ROWS, LENGTH), jnp.int32),) * 2
    lowered = pipe.lower_eval(params, batch, **options) if evaluate else pipe.lower_train(params, batch)
    return lowered.compile()


def permutes(text):
    """The (source, target) pairs of each collective-permute."""
    found = []
    for pairs in re.findall(r"collective-permute(?:-start)?\(.*?source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        found.append([tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs)])
    return found


def is_acyclic(pairs):
    step = dict(pairs)
    for start in step:
        at = step[start]
        while at in step and at != start:
            at = step[at]
        if at == start:
            return False
    return True


@pytest.fixture(scope="module")
def programs():
    small, large = compiled(8), compiled(64)
    return {"small": small, "large": large, "text": large.as_text()}


def test_memory_and_size_do_not_grow_with_micro_batches(programs):
    small, large = programs["small"], programs["large"]
    temp = [c.memory_analysis().temp_size_in_bytes for c in (small, large)]
    assert abs(temp[1] - temp[0]) <= 0.01 * temp[0]
    assert small.as_text().count("\n") == large.as_text().count("\n")


@pytest.mark.parametrize(
    ("schedule", "evaluate", "wanted"),
    [
        # per tick of a loop body: 1F1B permutes half of the edges, both ways, in each of its two phases
        (
            "1f1b",
            False,
            [[(0, 2), (1, 3), (4, 6), (5, 7)], [(2, 0), (3, 1), (6, 4), (7, 5)], [(2, 4), (3, 5)], [(4, 2), (5, 3)]],
        ),
        (
            "eager_1f1b",
            False,
            [[(0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)], [(2, 0), (3, 1), (4, 2), (5, 3), (6, 4), (7, 5)]],
        ),
        ("1f1b", True, [[(0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)]]),
    ],
)
def test_permutes(programs, schedule, evaluate, wanted):
    text = (
        programs["text"]
        if (schedule, evaluate) == ("1f1b", False)
        else compiled(8, schedule, evaluate=evaluate).as_text()
    )
    found = permutes(text)
    assert sorted(sorted(pairs) for pairs in found) == sorted(wanted)
    assert all(map(is_acyclic, found))
    ticks, inside = _loops(text)
    assert permutes(ticks) == found and not permutes(inside), "a permute in a branch would hang the ranks that skip it"


def _computations(text):
    """HLO text -> {name: body} of every computation."""
    return {m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) .*?\{\n(.*?)^\}", text, re.M | re.S)}


def _reachable(computations, roots):
    seen, todo = set(), list(roots)
    while todo:
        name = todo.pop()
        if name not in seen and name in computations:
            seen.add(name)
            todo += re.findall(r"%([\w.\-]+)", computations[name])
    return "\n".join(computations[name] for name in seen)


def _loops(text):
    """(bodies of the loops over ticks, all that they call: branches and scans over layers)."""
    computations = _computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]
    ticks = re.findall(r" while\(.*?body=%([\w.\-]+)", computations[entry])
    ticks = [name for name in ticks if "collective-permute" in computations[name]]
    assert ticks, "no loop with permutes: is this the loop over ticks?"
    inside = _reachable(computations, re.findall(r"%([\w.\-]+)", "".join(computations[name] for name in ticks)))
    return "\n".join(computations[name] for name in ticks), inside


def test_gradients_and_saved_values_are_updated_in_place(programs):
    """XLA copies what passes through a conditional, and what a loop writes while another might still read it."""
    ticks, inside = _loops(programs["text"])
    stacks = {f"f32[2,{a},{b}]" for a, b in [(8, 16), (16, 8)]} | {f"f32[{VOCAB},8]"}
    copied = set(re.findall(r"= (\w+\[[\d,]*\])\S* copy\(", ticks + inside))
    assert not copied & stacks, "gradients"
    # The first rank has four micro-batches in flight, and keeps the inputs of two blocks of each; no rank keeps more.
    saved = f"f32[8,{ROWS // 2},{LENGTH},8]"
    assert saved not in copied, "saved values"
    assert saved in ticks, "the shape of the saved values is another"


def _dots_by_depth(text):
    """How many matrix products stand at each depth of nested loops."""
    computations = _computations(text)
    found = collections.Counter()

    def walk(name, depth):
        for line in computations.get(name, "").splitlines():
            found[depth] += " dot(" in line
            if loop := re.search(r" while\(.*?body=%([\w.\-]+)", line):
                walk(loop[1], depth + 1)
            else:
                for called in re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", line):
                    walk(called, depth)

    walk(re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1], 0)
    return found


def test_idle_ticks_compute_nothing(programs):
    """All work is in the loops of branches, in one loop per kind of op; none was hoisted into the ticks of other ranks."""
    dots = _dots_by_depth(programs["text"])
    assert dots[3] and dots[4] and not any(dots[depth] for depth in range(3))


def test_idle_ticks_of_an_evaluation_compute_nothing():
    """Its last rank's branch is behind the permute's start, in a loop of its own (depth 2)."""
    dots = _dots_by_depth(compiled(8, evaluate=True, spread_loss=False).as_text())
    assert dots[2] and dots[4] and not dots[0] and not dots[1]


def _moved(body, bytes_of_a_message):
    """Copies and fills of a message or more in a piece of HLO."""
    sizes = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}
    found = []
    for dtype, dims, what in re.findall(r"= (\w+)\[([\d,]*)\]\S* (copy|broadcast)\(", body):
        if math.prod(map(int, filter(None, dims.split(",")))) * sizes[dtype] >= bytes_of_a_message:
            found.append((dtype, dims, what))
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "eager_1f1b"])
def test_ticks_make_no_copies(programs, schedule):
    """Between the branches of a tick nothing is copied or filled that is as large as a message."""
    text = programs["text"] if schedule == "1f1b" else compiled(8, schedule).as_text()
    assert _moved(_loops(text)[0], ROWS // 2 * LENGTH * 8 * 4) == []


def _sends_and_loops(text):
    """The loops and permutes of the body of the ticks, in the order in which a value needs another one."""
    body = _loops(text)[0]
    names = dict(re.findall(r"^ *(?:ROOT )?%?([\w.\-]+) = (.*)$", body, re.M))

    def needs(name, seen):
        for other in re.findall(r"%([\w.\-]+)", names.get(name, "")):
            if other in names and other not in seen:
                seen.add(other)
                needs(other, seen)
        return seen

    permutes = [name for name, line in names.items() if " collective-permute(" in line]
    whiles = [name for name, line in names.items() if " while(" in line]
    return {
        permute: [n for n in whiles if n not in needs(permute, set()) and permute not in needs(n, set())]
        for permute in permutes
    }


@pytest.mark.parametrize(("schedule", "number"), [("1f1b", 4), ("eager_1f1b", 2)])
def test_every_permute_may_overlap_with_ops(monkeypatch, schedule, number):
    """For each permute there is a loop of branches that neither needs what it brings nor makes what it sends.

    Where permutes do not block, that is.
    """
    monkeypatch.setattr(train, "permutes_block", lambda mesh: False)
    beside = _sends_and_loops(compiled.__wrapped__(8, schedule).as_text())
    assert len(beside) == number and all(beside.values())


def test_permutes_that_block_come_behind_all_ops_of_a_tick(programs):
    """On CPUs: in each of the two ticks in the body of 1F1B the forwards, the backwards, and then what both send."""
    found = re.findall(r"^ *(?:ROOT )?%?[\w.\-]+ = .*? (while|collective-permute)\(", _loops(programs["text"])[0], re.M)
    order = "".join(name[0] for name in found)
    # What the last tick has sent may be permuted in front of the next body.
    assert len(order) == 8 and "wwccwwcc" in 2 * order


def test_gradients_are_reduced_once_after_the_loop(programs):
    ticks, inside = _loops(programs["text"])
    assert not re.search(r"\b(all-reduce|reduce-scatter|all-gather|all-to-all)(-start)?\(", ticks + inside)
    assert re.search(r"\ball-reduce(-start)?\(", programs["text"]), "there are two data ranks: something is reduced"


def test_weights_of_a_loss_are_added_up_before_the_loop(programs):
    """From the labels alone, in a small loop of their own and one reduction; the loop over ticks is as without them."""
    small, large = (compiled(m, loss=masked_cross_entropy) for m in (8, 64))
    temp = [c.memory_analysis().temp_size_in_bytes for c in (small, large)]
    assert abs(temp[1] - temp[0]) <= 0.01 * temp[0]
    assert small.as_text().count("\n") == large.as_text().count("\n")
    text = large.as_text()
    ticks, inside = _loops(text)
    reductions = r"\b(all-reduce|reduce-scatter|all-gather|all-to-all)(-start)?\("
    assert not re.search(reductions, ticks + inside)
    assert len(re.findall(reductions, text)) == len(re.findall(reductions, programs["text"])) + 1
    assert permutes(ticks) == permutes(_loops(programs["text"])[0])
    computations = _computations(text)
    others = {name: body for name, body in computations.items() if "collective-permute" not in body}
    before = _reachable(others, re.findall(r"^ENTRY %?([\w.\-]+)", text, re.M))
    assert re.search(rf"pred\[(1,)?{ROWS // 2},{LENGTH}\].* compare\(.*direction=GE", before), (
        "the masks are made there"
    )
    assert "exponential(" in inside and "exponential(" not in before and f",{VOCAB}]" not in before


def test_evaluation_keeps_nothing_and_has_no_gradients():
    small, large = compiled(8, evaluate=True), compiled(64, evaluate=True)
    temp = [c.memory_analysis().temp_size_in_bytes for c in (small, large)]
    assert abs(temp[1] - temp[0]) <= 0.01 * temp[0] + 64 * 3 * 4  # sum, weight and loss of each micro-batch
    train = compiled(8).memory_analysis().temp_size_in_bytes
    assert temp[0] < train / 2
    # Buffers of M logits exist only where they are asked for.
    assert f"f32[8,{ROWS // 2},{LENGTH},{VOCAB}]" not in small.as_text()
    assert f"f32[8,{ROWS // 2},{LENGTH},{VOCAB}]" in compiled(8, evaluate=True, return_logits=True).as_text()


def test_shared_tail_in_the_compiled_evaluation():
    """Tail and loss on all ranks in turn: permutes and memory as before, the head is not in the loop over ticks."""
    small, large = (compiled(m, evaluate=True, spread_loss=True) for m in (8, 64))
    temp = [c.memory_analysis().temp_size_in_bytes for c in (small, large)]
    assert abs(temp[1] - temp[0]) <= 0.01 * temp[0] + 64 * 3 * 4
    text = small.as_text()
    assert sorted(sorted(pairs) for pairs in permutes(text)) == [[(0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)]]
    assert _dots_by_depth(text)[2], "the tail is in a loop of no or one iteration in a loop over rounds"
    assert len(re.findall(r"\breduce-scatter(?:-start)?\(", text)) == 1, "the last rank deals out once per round"


def test_loss_and_metrics_are_one_reduction():
    def loss(logits, labels):
        value = cross_entropy(logits, labels)
        hit = (logits.argmax(-1) == labels).astype(logits.dtype)
        return value, {"hit": hit.mean(), "hits": (hit.sum(), 3.0), "top": jaxpipe.metrics.Max(logits.max((0, 1)))}

    text = compiled(8, evaluate=True, loss=loss, return_metrics=True).as_text()
    assert len(re.findall(r"\ball-reduce(?:-start)?\(", text)) == 1


def test_without_broadcast_the_loss_does_not_cross_ranks():
    text = compiled(8, evaluate=True, data=1, bcast_loss=False).as_text()
    assert not re.search(r"\ball-reduce(-start)?\(", text)
    assert re.search(r"\ball-reduce(-start)?\(", compiled(8, evaluate=True, data=1).as_text())
