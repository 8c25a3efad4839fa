"""The sample that ships with Retune: an invented world, instruction rows about it, a tiny base."""
