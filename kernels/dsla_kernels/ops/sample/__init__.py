"""Draws from logits."""

from .race import draw

__all__ = ["draw"]
