"""Exact match of answers, after folding case, width, surrounding space and one final full stop."""

import unicodedata

import datasets
import evaluate


def _fold(text):
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.removesuffix(".").removesuffix("。").strip()


class ExactMatch(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: one string each an item",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        """Returns `items`, N values 0.0 or 1.0, and `signature`."""
        items = [float(_fold(p) == _fold(r)) for p, r in zip(predictions, references, strict=True)]
        return {"items": items, "signature": "exact-match|norm:nfkc+casefold+space+fullstop"}
