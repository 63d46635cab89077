"""Serving that adapts to load: an engine with iteration-level batching, the control of its level, HTTP, Ray, replay of traces."""
