"""One page of quality and speed against level, from result files."""
