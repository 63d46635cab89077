"""What a base model must show before DSLA converts it: checks on small random models of its type, and the record of those it has passed."""
