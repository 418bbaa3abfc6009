"""A training run: the `Trainer`, and the callbacks that watch it. This package is private; see `jaxpipe.callbacks`."""

__all__: list[str] = []
