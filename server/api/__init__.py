"""The HTTP surface: schemas, routes, keys, limits and the one shape of errors. Knows FastAPI; nothing below does."""
