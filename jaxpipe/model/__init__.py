"""The layer list: its layers, its loss, how it is cut; private, but for `metrics`, which is `jaxpipe.metrics`."""

__all__: list[str] = []
