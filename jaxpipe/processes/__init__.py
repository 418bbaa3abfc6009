"""Several processes: how they are started, and how they find each other; private, but for `jaxpipe.start`."""

__all__: list[str] = []
