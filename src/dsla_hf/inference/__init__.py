"""Fast decoding: recorded steps, kernels of whole layers, and what they cost."""
