"""torch in one process, and torch.distributed.pipelining, as contestants."""

import os
from typing import Any

import task
import torch
import torch_model
from torch import nn
from torch.distributed import destroy_process_group, init_process_group, pipelining


def one_process(size: task.Task) -> tuple[Any, Any]:
    """The loop that one writes for one process: micro-batches one after the other, gradients added up."""
    module = nn.Sequential(*(cls(*rest) for cls, *rest in torch_model.layers(size)))
    optimizer = torch_model.adam(module.parameters())

    def train(number: int) -> float:
        total = 0.0
        for inputs, labels in zip(*torch_model.batch(size, number), strict=True):
            loss = torch_model.cross_entropy(module(inputs), labels) / task.MICRO_BATCHES
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    @torch.no_grad()
    def evaluate(number: int) -> float:
        pairs = zip(*torch_model.batch(size, number), strict=True)
        return sum(torch_model.cross_entropy(module(x), y).item() for x, y in pairs) / task.MICRO_BATCHES

    return train, evaluate


def pipeline(kind: str, size: task.Task, ranks: int) -> tuple[Any, Any]:
    """One rank of torch.distributed.pipelining over gloo; the blocks are cut evenly, two stages per rank but in 1F1B."""
    rank = int(os.environ["RANK"])
    of_rank = {"1f1b": [rank], "interleaved": [rank, ranks + rank], "zbv": [rank, 2 * ranks - 1 - rank]}[kind]
    count = ranks * len(of_rank)
    layers, per_stage = torch_model.layers(size), size.layers // count
    stages: list[Any] = []
    for index in of_rank:
        first, end = (index * per_stage + (index > 0), (index + 1) * per_stage + 1 + (index == count - 1))
        module = nn.Sequential(*(cls(*rest) for cls, *rest in layers[first:end]))
        stages.append(pipelining.PipelineStage(module, index, count, torch.device("cpu")))
    parameters = [weight for stage in stages for weight in stage.submod.parameters()]
    optimizer = torch_model.adam(parameters)
    options = {"n_microbatches": task.MICRO_BATCHES, "loss_fn": torch_model.cross_entropy}
    if kind == "1f1b":
        schedule = pipelining.Schedule1F1B(stages[0], **options)
    elif kind == "interleaved":
        schedule = pipelining.ScheduleInterleaved1F1B(stages, **options)
    else:
        schedule = pipelining.ScheduleZBVZeroBubble(stages, **options)
    is_first, is_last = 0 in of_rank, count - 1 in of_rank

    def run(function: Any, number: int) -> float | None:
        inputs, labels = (whole.flatten(0, 1) for whole in torch_model.batch(size, number))
        losses: list[torch.Tensor] = []
        known = {"target": labels, "losses": losses} if is_last else {}
        function(*([inputs] if is_first else []), **known)
        return torch.stack(losses).mean().item() if is_last else None

    def train(number: int) -> float | None:
        loss = run(schedule.step, number)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return train, lambda number: run(schedule.eval, number)


def main() -> None:
    stream, given = task.answers(), task.arguments()
    torch_model.threads()
    if given.kind == "one_process":
        task.serve(stream, *one_process(given.task))
        return
    init_process_group("gloo")
    task.serve(stream, *pipeline(given.kind, given.task, given.stages))
    destroy_process_group()


if __name__ == "__main__":
    main()
