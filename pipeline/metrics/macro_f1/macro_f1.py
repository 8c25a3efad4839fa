"""Macro-averaged F1 over the classes of the references: each class counts the same, however rare."""

from collections import Counter

import datasets
import evaluate

from pipeline.metrics import fold


class MacroF1(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://doi.org/10.1016/j.ipm.2009.03.002",
            inputs_description="predictions and references: one label each an item",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        """F1 0–1. An answer that is no class of the references is a miss of the right class and nobody's false alarm.

        Returns `score`, `classes` (F1 of each), `items` (N × [label, predicted], folded) and `signature`.
        """
        items = [[fold(r), fold(p)] for p, r in zip(predictions, references, strict=True)]
        hit = Counter(label for label, predicted in items if label == predicted)
        is_one, said = Counter(label for label, _ in items), Counter(predicted for _, predicted in items)
        classes = {label: 2 * hit[label] / (is_one[label] + said[label]) for label in sorted(is_one)}
        score = sum(classes.values()) / len(classes) if classes else None
        signature = "macro-f1|classes:references|norm:nfkc+casefold+space+fullstop"
        return {"score": score, "classes": classes, "items": items, "signature": signature}
