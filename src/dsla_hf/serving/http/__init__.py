"""The server's side towards clients: routes, schema, limits, the live page."""
