"""DeepSpeed's PipelineEngine over gloo, as a contestant. Its launcher is not used: run.py starts the processes."""

from typing import Any

import deepspeed
import task
import torch
import torch_model
from deepspeed.pipe import LayerSpec, PipelineModule


def pipeline(size: task.Task, stages: int) -> tuple[Any, Any]:
    """One rank of the engine, with the blocks cut evenly and no clipping, which DeepSpeed does unless told not to."""
    module = PipelineModule(
        [LayerSpec(*each) for each in torch_model.layers(size)],
        num_stages=stages,
        loss_fn=torch_model.cross_entropy,
        partition_method="type:Block",
    )
    config = {
        "train_micro_batch_size_per_gpu": size.rows,
        "gradient_accumulation_steps": task.MICRO_BATCHES,
        "gradient_clipping": 0.0,
    }
    optimizer = torch_model.adam(module.parameters())
    engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]

    def batches(number: int) -> Any:
        return iter(zip(*torch_model.batch(size, number), strict=True))

    return (
        lambda number: float(torch.as_tensor(engine.train_batch(data_iter=batches(number)))),
        lambda number: float(torch.as_tensor(engine.eval_batch(data_iter=batches(number)))),
    )


def main() -> None:
    stream, given = task.answers(), task.arguments()
    torch_model.threads()
    deepspeed.init_distributed("gloo")
    task.serve(stream, *pipeline(given.task, given.stages))


if __name__ == "__main__":
    main()
