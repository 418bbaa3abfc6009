"""What reads the files and settings of other libraries; private."""

__all__: list[str] = []
