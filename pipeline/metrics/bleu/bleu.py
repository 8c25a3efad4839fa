"""Corpus BLEU (Papineni et al. 2002) by sacrebleu, with the n-gram statistics of every item for resampling."""

import datasets
import evaluate
import sacrebleu

_CJK = ("\u3040", "\u9fff")


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
        """BLEU 0–100. `tokenize`: a sacrebleu tokeniser; auto takes `zh` when a reference has Chinese or Japanese
        characters (which leaves the rest of the text to the same rules as 13a), else `13a`.

        Returns `score`, `items` (N × [sys_len, ref_len, correct 1–4, total 1–4]) and `signature`.
        """
        if tokenize == "auto":
            cjk = any(_CJK[0] <= character <= _CJK[1] for text in references for character in text)
            tokenize = "zh" if cjk else "13a"
        corpus = sacrebleu.BLEU(tokenize=tokenize)
        score = corpus.corpus_score(predictions, [references]).score
        signature = str(corpus.get_signature())
        sentence = sacrebleu.BLEU(tokenize=tokenize, effective_order=True)
        items = []
        for prediction, reference in zip(predictions, references, strict=True):
            s = sentence.sentence_score(prediction, [reference])
            items.append([s.sys_len, s.ref_len, *s.counts, *s.totals])
        return {"score": score, "items": items, "signature": signature}
