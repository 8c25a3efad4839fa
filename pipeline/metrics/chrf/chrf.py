"""Corpus chrF2 (Popović 2015) by sacrebleu, with the character n-gram counts of every item for resampling."""

import datasets
import evaluate
import sacrebleu


class Chrf(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/W15-3049",
            inputs_description="predictions and references: one string each an item",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        """chrF2 0–100; it counts characters, so that no script needs a tokeniser.

        Returns `score`, `items` (N × [answer, reference, match] for 1 to 6 characters) and `signature`, sacrebleu's.
        """
        metric = sacrebleu.CHRF()
        # The signature counts references.
        score = metric.corpus_score(list(predictions) or ["a"], [list(references) or ["a"]]).score
        items = [
            metric._extract_corpus_statistics([prediction], [[reference]])[0]
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"score": score if references else None, "items": items, "signature": str(metric.get_signature())}
