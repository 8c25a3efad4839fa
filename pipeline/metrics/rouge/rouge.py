"""ROUGE-1, 2, L and Lsum F-measures (Lin 2004) by rouge-score, for text with or without spaces between words."""

from importlib.metadata import version

import datasets
import evaluate
import regex
from rouge_score import rouge_scorer

from pipeline.metrics import words

_TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
_SENTENCE_END = regex.compile(r"(?<=[。！？｡]['\"”’」』）]*)(?!['\"”’」』）\n]|$)")


class _Tokenizer:
    """rouge-score's own drops every character that is not ASCII: identical Chinese sentences score 0."""

    def tokenize(self, text):
        return words(text)


class Rouge(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/W04-1013",
            inputs_description="predictions and references: one string each an item",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        """F-measures 0–1. ROUGE-Lsum compares sentences: lines, and what a Chinese or Japanese full stop ends.

        Returns `score` (each type's mean), `items` (N values for each of rouge1, rouge2, rougeL and rougeLsum) and
        `signature`.
        """
        scorer = rouge_scorer.RougeScorer(_TYPES, use_stemmer=False, tokenizer=_Tokenizer())
        items = {kind: [] for kind in _TYPES}
        for prediction, reference in zip(predictions, references, strict=True):
            prediction, reference = (_SENTENCE_END.sub("\n", text) for text in (prediction, reference))
            scores = scorer.score(reference, prediction)
            for kind in _TYPES:
                items[kind].append(scores[kind].fmeasure)
        score = {kind: sum(values) / len(values) if values else None for kind, values in items.items()}
        tokens = "tok:word+char-of-spaceless-scripts|case:lc|stem:no|sent:newline+cjk-stop"
        return {"score": score, "items": items, "signature": f"rouge-score:{version('rouge-score')}|{tokens}"}
