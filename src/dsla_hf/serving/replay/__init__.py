"""A client that replays traces against a server."""

from .client import ReplayOptions, replay

__all__ = ["ReplayOptions", "replay"]
