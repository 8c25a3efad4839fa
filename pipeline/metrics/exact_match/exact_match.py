"""Exact match of answers, after folding case, width, surrounding space and one final full stop."""

import datasets
import evaluate

from pipeline.metrics import fold


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
        """Returns `score` (their mean), `items`, N values 0.0 or 1.0, and `signature`."""
        items = [float(fold(p) == fold(r)) for p, r in zip(predictions, references, strict=True)]
        score = sum(items) / len(items) if items else None
        return {"score": score, "items": items, "signature": "exact-match|norm:nfkc+casefold+space+fullstop"}
