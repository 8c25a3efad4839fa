"""Distinct-n (Li et al. 2016): the share of n-grams of all answers that are not repetitions of another."""

import datasets
import evaluate

from pipeline.metrics import words


class DistinctN(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/N16-1014",
            inputs_description="predictions: one string an item",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, n=2):
        """0–1, falling with the number of answers. Returns `score` (None without an n-gram), `items` (N × [n-grams
        that no earlier answer has, n-grams]) and `signature`."""
        seen, items = set(), []
        for text in predictions:
            tokens = words(text)
            grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
            new = set(grams) - seen
            seen |= new
            items.append([len(new), len(grams)])
        total = sum(grams for _, grams in items)
        return {
            "score": len(seen) / total if total else None,
            "items": items,
            "signature": f"distinct-{n}|tok:word+char-of-spaceless-scripts|case:lc",
        }
