"""How many layers are DSLA, and when that changes: policies, and generation that follows them."""
