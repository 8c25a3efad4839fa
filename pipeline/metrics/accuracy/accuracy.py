"""Accuracy: the share of right answers among the items that have one right answer."""

import datasets
import evaluate

from pipeline.metrics import fold


class Accuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: one string each an item; scoring: `exact` or `tool_calls`",
            features=datasets.Features({n: datasets.Value("string") for n in ("predictions", "references", "scoring")}),
        )

    def _compute(self, predictions, references, scoring):
        """Returns `score`, `items` (N values 0.0 or 1.0, None where `scoring` is another) and `signature`.

        With `tool_calls` both are canonical JSON of calls (`canonical_calls`), compared as it is.
        """
        equal = {"exact": lambda p, r: fold(p) == fold(r), "tool_calls": lambda p, r: p == r}
        items = [
            float(equal[kind](p, r)) if kind in equal else None
            for p, r, kind in zip(predictions, references, scoring, strict=True)
        ]
        counting = [item for item in items if item is not None]
        return {
            "score": sum(counting) / len(counting) if counting else None,
            "items": items,
            "signature": "accuracy|items:exact+tool_calls|norm:nfkc+casefold+space+fullstop",
        }
