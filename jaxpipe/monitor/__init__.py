"""What watches a run from the host without making it wait for the devices; private."""

__all__: list[str] = []
