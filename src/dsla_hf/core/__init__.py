"""The layer itself, the cache that holds its states, and what a call says of its tokens. Knows nothing of particular models."""
