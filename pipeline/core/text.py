"""Normalises texts for comparison."""

import unicodedata


def fold(text: str) -> str:
    """`text` without differences of case, width, surrounding space and one final full stop."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.removesuffix(".").removesuffix("。").strip()
