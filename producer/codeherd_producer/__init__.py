"""Everything that submits jobs and fetches answers. Never imports torch or the worker."""
