"""Every metric of an answer's text, as one `evaluate` module (the Hub's need a network), configured by its name.

Each returns `score` of the set (None without an item that counts), `items` (of each item its score, or the counts that
the set's score is made from, for resampling) and `signature`.
"""

from importlib.metadata import version

import datasets
import evaluate
import regex
import sacrebleu
from rouge_score import rouge_scorer

from pipeline.core.text import fold

_ROUGE = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
_SENTENCE_END = regex.compile(r"(?<=[。！？｡]['\"”’」』）]*)(?!['\"”’」』）\n]|$)")
FOLDED = "norm:nfkc+casefold+space+fullstop"
_WORDS = "tok:word+char-of-spaceless-scripts"
# One token: a Han, kana, Hangul, Thai, Lao, Khmer or Burmese character with its marks, or a run of other letters and
# digits. ASCII text gives the tokens of rouge-score.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_SPACELESS}]\p{{M}}*|(?:(?![{_SPACELESS}_])\w)+")
_HAN = regex.compile(r"\p{Han}")
_BY_CHARACTER = regex.compile(r"[\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


def tokeniser_for(text: str) -> str:
    """sacrebleu's tokeniser for `text`: zh for Chinese, char for Japanese, Thai, Lao, Khmer and Burmese, else 13a.

    `char` needs no dictionary, which MeCab's would, and whose version would be part of every score. Chinese with a rare
    kana in it stays Chinese; English words in a Chinese text are left whole by `zh`.
    """
    by_character = len(_BY_CHARACTER.findall(text))
    if by_character and 5 * by_character > len(_HAN.findall(text)):
        return "char"
    return "zh" if _HAN.search(text) else "13a"


def _mean(values):
    return sum(values) / len(values) if values else None


def _accuracy(predictions, references, scoring):
    """The share of right answers (Items: 1.0, 0.0, or None where `scoring` is neither `exact` nor `tool_calls`).

    With `tool_calls` both are canonical JSON of calls (`canonical_calls`), compared as it is.
    """
    equal = {"exact": lambda p, r: fold(p) == fold(r), "tool_calls": lambda p, r: p == r}
    items = [
        float(equal[kind](p, r)) if kind in equal else None
        for p, r, kind in zip(predictions, references, scoring, strict=True)
    ]
    score = _mean([item for item in items if item is not None])
    return {"score": score, "items": items, "signature": f"accuracy|items:exact+tool_calls|{FOLDED}"}


def _exact_match(predictions, references):
    """The share of answers that are equal after folding case, width, surrounding space and one final full stop."""
    items = [float(fold(p) == fold(r)) for p, r in zip(predictions, references, strict=True)]
    return {"score": _mean(items), "items": items, "signature": f"exact-match|{FOLDED}"}


def _bleu(predictions, references):
    """Corpus BLEU 0-100 (Papineni et al. 2002) by sacrebleu. Each item's tokeniser follows from its reference, so that
    what an item scores does not depend on the others.

    Items: [sys_len, ref_len, correct 1-4, total 1-4]. The signature is sacrebleu's own with the tokenisers that were
    used: `tok:13a+zh`.
    """
    chosen = [tokeniser_for(text) for text in references]
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


def _chrf(predictions, references):
    """Corpus chrF2 0-100 (Popović 2015) by sacrebleu; characters need no tokeniser in any script.

    Items: [answer, reference, match] for 1 to 6 characters.
    """
    metric = sacrebleu.CHRF()
    # The signature counts references.
    score = metric.corpus_score(list(predictions) or ["a"], [list(references) or ["a"]]).score
    items = [
        metric._extract_corpus_statistics([prediction], [[reference]])[0]
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {"score": score if references else None, "items": items, "signature": str(metric.get_signature())}


class _Tokenizer:
    """rouge-score's own drops every character that is not ASCII: identical Chinese sentences score 0."""

    def tokenize(self, text):
        return list(_WORD.findall(text.lower()))


def _rouge(predictions, references):
    """ROUGE-1, 2, L and Lsum F-measures 0-1 (Lin 2004) by rouge-score, `score` and `items` by type.

    ROUGE-Lsum compares sentences: lines, and what a Chinese or Japanese full stop ends.
    """
    scorer = rouge_scorer.RougeScorer(_ROUGE, use_stemmer=False, tokenizer=_Tokenizer())
    pairs = zip(references, predictions, strict=True)
    scores = [scorer.score(*(_SENTENCE_END.sub("\n", text) for text in pair)) for pair in pairs]
    items = {kind: [each[kind].fmeasure for each in scores] for kind in _ROUGE}
    signature = f"rouge-score:{version('rouge-score')}|{_WORDS}|case:lc|stem:no|sent:newline+cjk-stop"
    return {"score": {kind: _mean(values) for kind, values in items.items()}, "items": items, "signature": signature}


_PAIR = {"predictions": "string", "references": "string"}
_METRICS = {
    "accuracy": (_accuracy, _PAIR | {"scoring": "string"}),
    "exact_match": (_exact_match, _PAIR),
    "bleu": (_bleu, _PAIR),
    "chrf": (_chrf, _PAIR),
    "rouge": (_rouge, _PAIR),
}


class TextMetrics(evaluate.Metric):
    def _info(self):
        function, features = _METRICS[self.config_name]
        return evaluate.MetricInfo(
            description=function.__doc__,
            citation="",
            inputs_description=", ".join(features),
            features=datasets.Features({name: datasets.Value(kind) for name, kind in features.items()}),
        )

    def _compute(self, **inputs):
        return _METRICS[self.config_name][0](**inputs)
