"""Tasks: definitions and routes, resolving names to mixes, running prompts on the engine, and quality records."""
