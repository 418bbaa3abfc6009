"""Settings, state and the optimizer step of a training run; private."""

__all__: list[str] = []
