"""Several processes: how they are started, and how a program finds the others. Public: `jaxpipe.start`."""

__all__: list[str] = []
