"""Models of transformers with DSLA layers: configuration, adapters, hybrids, their files."""
