"""Time and memory of generation, measured beside floors by bytes and operations."""
