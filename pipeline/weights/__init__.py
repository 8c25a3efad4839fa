"""Weights on disk: adapters merged, combined and exported."""
