"""What an engine says about itself: private, but for `Engine.summary`."""

__all__: list[str] = []
