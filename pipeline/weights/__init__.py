"""Base models, adapters and what is made of both: loading and merging. It knows chat."""
