"""Corpus BLEU (Papineni et al. 2002) by sacrebleu, with the n-gram statistics of every item for resampling."""

import datasets
import evaluate
import sacrebleu

from pipeline.metrics import tokeniser_for


class Bleu(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/W18-6319",
            inputs_description="predictions and references: one string each an item",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, tokenize="auto"):
        """BLEU 0–100. `tokenize`: a sacrebleu tokeniser for all items; auto takes each item's from its reference, so
        what an item scores does not depend on the others.

        Returns `score`, `items` (N × [sys_len, ref_len, correct 1–4, total 1–4]) and `signature`, which is sacrebleu's
        own with the tokenisers that were used: `tok:13a+zh`.
        """
        chosen = [tokeniser_for(text) if tokenize == "auto" else tokenize for text in references]
        used = sorted(set(chosen)) or ["13a"]
        scorers = {name: sacrebleu.BLEU(tokenize=name, effective_order=True) for name in used}
        items = []
        for prediction, reference, name in zip(predictions, references, chosen, strict=True):
            s = scorers[name].sentence_score(prediction, [reference])
            items.append([s.sys_len, s.ref_len, *s.counts, *s.totals])
        sums = [sum(column) for column in zip(*items, strict=True)] or [0] * 10
        score = sacrebleu.BLEU.compute_bleu(
            correct=sums[2:6], total=sums[6:10], sys_len=sums[0], ref_len=sums[1], smooth_method="exp"
        )
        corpus = sacrebleu.BLEU(tokenize=used[0])
        corpus.corpus_score(["a"], [["a"]])  # the signature counts references
        signature = str(corpus.get_signature()).replace(f"tok:{used[0]}", f"tok:{'+'.join(used)}")
        return {"score": score.score, "items": items, "signature": signature}
