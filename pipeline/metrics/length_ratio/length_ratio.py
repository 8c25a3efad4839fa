"""Length ratio: words of all answers by words of all references; characters in scripts without spaces."""

import datasets
import evaluate

from pipeline.metrics import words


class LengthRatio(evaluate.Metric):
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
        """1 is as long. Returns `score`, `items` (N × [words of the answer, of the reference]) and `signature`."""
        items = [[len(words(p)), len(words(r))] for p, r in zip(predictions, references, strict=True)]
        said, expected = (sum(column) for column in zip(*items, strict=True)) if items else (0, 0)
        signature = "length-ratio|tok:word+char-of-spaceless-scripts"
        return {"score": said / expected if expected else None, "items": items, "signature": signature}
