"""The operations in Triton: a folder each, forward and backward beside each other."""
