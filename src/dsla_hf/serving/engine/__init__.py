"""Texts that run together: scheduling, memory, recorded steps."""

from .engine import Engine, EngineOptions

__all__ = ["Engine", "EngineOptions"]
