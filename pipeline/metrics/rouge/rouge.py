"""ROUGE-1, ROUGE-2 and ROUGE-L F-measures (Lin 2004) by rouge-score, for text with or without spaces between words."""

from importlib.metadata import version

import datasets
import evaluate
import regex
from rouge_score import rouge_scorer

# rouge-score's own tokeniser drops every character that is not ASCII: identical Chinese sentences score 0.
# One token: a Han, kana or Hangul character, or a run of other letters and digits. ASCII text gives the same tokens
# as rouge-score's.
_TOKEN = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]|(?:(?![\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}_])\w)+"
)
_TYPES = ["rouge1", "rouge2", "rougeL"]


class _Tokenizer:
    def tokenize(self, text):
        return _TOKEN.findall(text.lower())


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
        """F-measures 0–1. Returns `items` (N values for each of rouge1, rouge2 and rougeL) and `signature`."""
        scorer = rouge_scorer.RougeScorer(_TYPES, use_stemmer=False, tokenizer=_Tokenizer())
        items = {kind: [] for kind in _TYPES}
        for prediction, reference in zip(predictions, references, strict=True):
            scores = scorer.score(reference, prediction)
            for kind in _TYPES:
                items[kind].append(scores[kind].fmeasure)
        return {"items": items, "signature": f"rouge-score:{version('rouge-score')}|tok:word+cjk-char|case:lc|stem:no"}
