"""Runs evaluation programs: micro-batches of different sizes, and whole data sets; private."""

__all__: list[str] = []
