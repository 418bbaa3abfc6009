"""Programs run here: plans, the one loop, what the ops of a stage do, reductions, and the oracle; private."""

__all__: list[str] = []
