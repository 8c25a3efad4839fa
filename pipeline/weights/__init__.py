"""Base models, adapters and what is made of both: loading, merging, combining, exports. It knows chat."""
