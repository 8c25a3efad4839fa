"""Loading base models and adapters, and merging them. It may import chat and what chat may import."""
