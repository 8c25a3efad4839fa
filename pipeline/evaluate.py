"""evaluate: frozen test split, base and adapter in; BLEU, ROUGE and accuracy with intervals, and every answer, out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat.template import ChatTemplate, load_contract, require_same_contract
from pipeline.core.files import read_json, sha256_file, whole_directory, write_json
from pipeline.data.classes import load_classes
from pipeline.params import EvaluateParams
from pipeline.report.stage import write_scores
from pipeline.scoring.classification import class_provenance, predict, predictions, score_classes
from pipeline.scoring.general import General, forgetting, general_items, read_general
from pipeline.scoring.generation import Answer, generate, to_answer
from pipeline.scoring.items import Metrics, provenance, score_items, test_items
from pipeline.scoring.kept import kept_file
from pipeline.scoring.likelihood import reference_losses, sequence_losses
from pipeline.scoring.vllm import vllm_tokens
from pipeline.weights.loading import use_free_cores
from pipeline.weights.placement import load_tuned, untuned


def evaluate(
    params: EvaluateParams, dataset: Path, adapter: Path, output: Path, kept: Path | None = None
) -> dict[str, Metrics]:
    """Score the adapter and the untouched base, quantised as in training, on the same test prompts.

    Writes to `output`: `scores.json` ({"base": …, "adapter": …}; `bleu` and `chrf` 0–100, `perplexity` from 1, the
    others 0–1), `items.base.parquet` and `items.adapter.parquet` (every answer with its scores), `prompts.json`
    (answers to `params.prompts`), `evaluation.json` (what the scores depend on: test split, decoding, signatures) and
    `report.md` and `report.html`; with `params.general` also `general.json`, `general.base.parquet` and
    `general.adapter.parquet`. Returns what is in `scores.json`.

    Args:
        kept: a folder for answers: a killed run leaves them to the next one, and so does one with other metrics.

    Raises:
        TemplateError: base model or tokenizer is not what the dataset was prepared for, or the adapter was trained on.
        ModelError: the adapter is missing or does not fit the base.
        GeneralError: `params.general` is not the file that was pinned, or has a row that cannot be used.
        BackendError: `params.backend` cannot be used here.
    """
    contract = read_json(dataset / "contract.json")
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    use_free_cores()
    quantisation = read_json(adapter / "training.json")["quantisation"]
    if "labels" in contract:
        return _evaluate_classes(params, dataset, adapter, output, contract, quantisation)
    template = load_contract(contract)
    test = test_items(dataset, params.max_samples)
    by_vllm: dict[str, list[list[int]]] = {}
    if params.backend == "vllm":  # before another copy of the base is on the GPU
        prompts, limit, stops = test.column("input_ids").to_pylist(), params.max_new_tokens, template.stop_ids
        by_vllm = vllm_tokens(contract["model"], adapter, prompts, limit, stops, quantisation["load_in_4bit"])
    model = load_tuned(contract["model"], quantisation, adapter)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    general = read_general(params.general, template, context) if params.general else None
    exam = _Exam(params, template, test, general, by_vllm, kept)
    identity = {"base": contract["model"]["digest"], "quantisation": quantisation}
    weights = {path.name: sha256_file(path) for path in sorted(adapter.glob("*.safetensors"))}
    answers = {"adapter": exam.answers_of(model, "adapter", identity | {"adapter": weights})}
    with untuned(model, contract["model"]) as base:
        answers["base"] = exam.answers_of(base, "base", identity)
    with whole_directory(output) as folder:
        items, signatures = _write_answers(answers, test, params, folder)
        metrics = write_scores(items, params, provenance(params, dataset, signatures), dataset, adapter, folder)
    if kept is not None:
        for path in set(kept.glob("*")) - set(exam.files):  # answers of earlier runs
            path.unlink()
    return metrics


@dataclass(frozen=True)
class _Answers:
    """What one system answered."""

    test: list[Answer]
    losses: tuple[list[float], list[int]]  # of the test split's references
    prompts: list[Answer]  # to params.prompts
    general: pa.Table | None


@dataclass(frozen=True)
class _Exam:
    """What base and adapter are asked."""

    params: EvaluateParams
    template: ChatTemplate
    test: pa.Table
    general: General | None
    by_vllm: dict[str, list[list[int]]]  # tokens of each system's answers to `test`, where vLLM made them
    kept: Path | None
    files: list[Path] = field(default_factory=list)  # of kept answers

    def answers_of(self, model: Any, system: str, identity: dict[str, Any]) -> _Answers:
        """All answers of one system; `identity` is what they depend on, next to the prompts."""
        params, template, label = self.params, self.template, f"the {system}"
        prompts, tools = (self.test.column(name).to_pylist() for name in ("input_ids", "tools"))

        def answer(prompts: list[list[int]], what: str = "", tools: list[str | None] | None = None) -> list[Answer]:
            keep = None
            if self.kept is not None:
                keep = kept_file(self.kept, identity, prompts, params.max_new_tokens, template.stop_ids)
                self.files.append(keep)
            limits = (params.max_new_tokens, params.batch_size)
            return generate(model, template, prompts, *limits, "evaluate", f"{label}{what}", keep, tools)

        table = None
        if self.general is not None:
            losses = sequence_losses(model, self.general.sequences, template.tokenizer.pad_token_id, "evaluate", label)
            table = general_items(self.general, answer(list(self.general.prompts.values()), ", general"), losses)
        losses = reference_losses(model, template, self.test, "evaluate", label)
        if self.by_vllm:
            rows = zip(self.by_vllm[system], prompts, tools, strict=True)
            answers = [to_answer(ids, template, prompt, offered) for ids, prompt, offered in rows]
        else:
            answers = answer(prompts, tools=tools)
        extra = [template.prompt_ids([{"role": "user", "content": text}]) for text in params.prompts]
        return _Answers(answers, losses, answer(extra, ", prompts") if extra else [], table)


def _write_answers(
    answers: dict[str, _Answers], test: pa.Table, params: EvaluateParams, folder: Path
) -> tuple[dict[str, pa.Table], dict[str, str]]:
    """Write answers to other sets than the test split; its scored items are returned, and each metric's signature."""
    items: dict[str, pa.Table] = {}
    signatures: dict[str, str] = {}
    for system in ("base", "adapter"):
        items[system], signatures = score_items(test, answers[system].test, answers[system].losses)
    before, after = answers["base"].general, answers["adapter"].general
    if before is not None and after is not None:
        pq.write_table(before, folder / "general.base.parquet")
        pq.write_table(after, folder / "general.adapter.parquet")
        write_json(folder / "general.json", forgetting(before, after, params))
    asked = []
    for number, prompt in enumerate(params.prompts):
        given = {system: of.prompts[number] for system, of in answers.items()}
        said = {system: {"answer": one.text, "cut_off": one.cut_off} for system, one in given.items()}
        asked.append({"prompt": prompt} | said)
    write_json(folder / "prompts.json", asked)
    return items, signatures


def _evaluate_classes(
    params: EvaluateParams, dataset: Path, adapter: Path, output: Path, contract: dict[str, Any], quantisation: Any
) -> dict[str, Metrics]:
    """`evaluate` for a sequence classification model, whose answers are classes."""
    labels, encoder, test = contract["labels"], load_classes(contract), test_items(dataset, params.max_samples)
    rows = test.column("input_ids").to_pylist()
    model = load_tuned(contract["model"], quantisation, adapter, labels)
    logits = {"adapter": predict(model, encoder, rows, params.batch_size, "evaluate", "the adapter")}
    with untuned(model, contract["model"], labels) as base:
        logits["base"] = predict(base, encoder, rows, params.batch_size, "evaluate", "the base")
    items = {
        system: score_classes(test, predictions(logits[system], labels)).append_column(
            "logits", pa.array(logits[system].tolist(), pa.list_(pa.float32()))
        )
        for system in ("base", "adapter")
    }
    with whole_directory(output) as folder:
        metrics = write_scores(items, params, class_provenance(params, dataset), dataset, adapter, folder)
    return metrics
