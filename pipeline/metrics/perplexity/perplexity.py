"""Perplexity: e to the mean loss of the references' tokens, their end token included."""

import math

import datasets
import evaluate


class Perplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="losses: summed negative log-likelihood of an item's tokens in nats; tokens: how many",
            features=datasets.Features({"losses": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, losses, tokens):
        """From 1 up, lower is better. Returns `score`, `items` (N × [loss, tokens]) and `signature`."""
        items = [[loss, number] for loss, number in zip(losses, tokens, strict=True)]
        number = sum(tokens)
        score = math.exp(math.fsum(losses) / number) if number else None
        return {"score": score, "items": items, "signature": "perplexity|tokens:trained-of-the-last-answer|mean:token"}
