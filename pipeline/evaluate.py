"""evaluate: scores base and adapter on the frozen test split: BLEU, ROUGE and accuracy with intervals, all answers."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat.responses import Answer, read_answer
from pipeline.chat.template import load_contract, require_same_contract
from pipeline.core.files import read_json, sha256_file, whole_directory, write_json
from pipeline.core.progress import note
from pipeline.data.classes import load_classes
from pipeline.params import EvaluateParams
from pipeline.report.stage import write_scores
from pipeline.scoring.classification import class_provenance, compute_logits, score_classes
from pipeline.scoring.general import general_items, measure_forgetting, read_general
from pipeline.scoring.generation import generate, kept_file, vllm_tokens
from pipeline.scoring.items import Metrics, provenance, score_items, test_items
from pipeline.scoring.likelihood import reference_losses, sequence_losses
from pipeline.weights.loading import use_free_cores
from pipeline.weights.placement import load_tuned, untuned

# The sets of prompts; the value is what progress lines append to the system's name.
TEST, GENERAL, PROMPTS = "", ", general", ", prompts"


def evaluate(
    params: EvaluateParams, dataset: Path, adapter: Path, output: Path, kept: Path | None = None
) -> dict[str, Metrics]:
    """Score the adapter and its base, quantised as in training, on the same test prompts.

    Writes to `output`: `scores.json` ({"base": …, "adapter": …}; `bleu` and `chrf` 0–100, `perplexity` from 1, the
    others 0–1), which it returns; for each system `items.*.parquet` (every answer with its scores) and, with
    `params.general`, `general.*.parquet`; `prompts.json` (answers to `params.prompts`), `evaluation.json` (what the
    scores depend on: test split, decoding, signatures) and the report.

    Args:
        kept: folder for answers, from which a later run continues: after a kill, or with other metrics.

    Raises:
        TemplateError, ModelError: base or template differ from those of dataset and adapter, or do not fit them.
        GeneralError, BackendError: `params.general` or `params.backend` cannot be used.
    """
    contract = read_json(dataset / "contract.json")
    require_same_contract(contract, read_json(adapter / "contract.json"), f"of {adapter}; `dvc repro` makes it again")
    use_free_cores()
    if "labels" in contract:
        return _evaluate_classes(params, dataset, adapter, output, contract)
    return _evaluate_answers(params, dataset, adapter, output, contract, kept)


def answer_limit(longest: int) -> int:
    """Tokens that an answer may have with `max_new_tokens: auto`: a quarter more than `longest`, in steps of 32."""
    return -(-longest * 5 // 4 // 32) * 32


def _warn_of_long_references(lengths: list[int], limit: int) -> None:
    if long := sum(length > limit for length in lengths):
        note(
            f"{long:,} of {len(lengths):,} reference answers have more tokens than evaluate.max_new_tokens ({limit}); "
            f"answers of their length are cut off and count as wrong: set it to auto, or to {max(lengths)} and more"
        )


def _evaluate_answers(
    params: EvaluateParams, dataset: Path, adapter: Path, output: Path, contract: dict[str, Any], kept: Path | None
) -> dict[str, Metrics]:
    """`evaluate` for a model that answers in text."""
    template, test = load_contract(contract), test_items(dataset, params.max_samples)
    quantisation = read_json(adapter / "training.json")["quantisation"]
    prompts, tools = test["input_ids"].to_pylist(), test["tools"].to_pylist()
    auto = params.max_new_tokens == "auto"
    limit = answer_limit(contract["max_answer_tokens"]) if auto else int(params.max_new_tokens)
    params = params.model_copy(update={"max_new_tokens": limit})
    _warn_of_long_references(test["answer_tokens"].to_pylist(), limit)
    tokens: dict[str, list[list[int]]] = {}  # of vLLM's answers to the test split, by system
    if params.backend == "vllm":  # before another copy of the base is on the GPU
        in_4bit = quantisation["load_in_4bit"]
        tokens = vllm_tokens(contract["model"], adapter, prompts, limit, template.stop_ids, in_4bit)
    model = load_tuned(contract["model"], quantisation, adapter)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    general = read_general(params.general, template, context) if params.general else []
    sets = {
        TEST: prompts,
        GENERAL: [row.prompt for row in general if row.prompt is not None],
        PROMPTS: [template.prompt_ids([{"role": "user", "content": text}]) for text in params.prompts],
    }
    limits = dict.fromkeys(sets, limit)
    if auto:  # the other sets have nothing to do with the task's answers
        longest = max((sum(label >= 0 for label in row.sequence[1]) for row in general if row.prompt), default=0)
        limits |= {GENERAL: max(limit, answer_limit(longest)), PROMPTS: contract["max_length"]}
    items, general_tables, replies = dict[str, pa.Table](), dict[str, pa.Table](), dict[str, list[Answer]]()
    kept_files, pad = set[Path](), template.tokenizer.pad_token_id

    def score(model: Any, system: str, depends_on: dict[str, Any]) -> dict[str, str]:
        name, answers = f"the {system}", dict[str, list[Answer]]()
        for set_name, prompts in sets.items():
            if set_name == TEST and tokens:
                answers[TEST] = [read_answer(template, *r) for r in zip(prompts, tokens[system], tools, strict=True)]
            elif prompts:
                file = kept and kept_file(kept, depends_on, prompts, limits[set_name], template.stop_ids)
                kept_files.update([file] if file else [])
                settings = (limits[set_name], params.batch_size, "evaluate", name + set_name, file)
                answers[set_name] = generate(model, template, prompts, *settings, tools if set_name == TEST else None)
        replies[system] = answers.get(PROMPTS, [])
        if general:
            losses = sequence_losses(model, [row.sequence for row in general], pad, "evaluate", name)
            general_tables[system] = general_items(general, answers.get(GENERAL, []), losses)
        test_losses = reference_losses(model, template, test, "evaluate", name)
        items[system], signatures = score_items(test, answers[TEST], test_losses)
        return signatures

    weights = {path.name: sha256_file(path) for path in sorted(adapter.glob("*.safetensors"))}
    depends_on = {"base": contract["model"]["digest"], "quantisation": quantisation}
    score(model, "adapter", depends_on | {"adapter": weights})
    with untuned(model, contract["model"]) as base:
        signatures = score(base, "base", depends_on)
    with whole_directory(output) as folder:
        _write_other_answers(general_tables, replies, params, folder)
        metrics = write_scores(items, params, provenance(params, dataset, signatures), dataset, adapter, folder)
    if kept is not None:
        for path in set(kept.glob("*")) - kept_files:  # answers of earlier runs
            path.unlink()
    return metrics


def _write_other_answers(
    general: dict[str, pa.Table], replies: dict[str, list[Answer]], params: EvaluateParams, folder: Path
) -> None:
    """Write what the systems answered to the general set and to the prompts of the parameters."""
    for name, table in general.items():
        pq.write_table(table, folder / f"general.{name}.parquet")
    if general:
        write_json(folder / "general.json", measure_forgetting(general["base"], general["adapter"], params))
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in params.prompts]
    for name, answers in replies.items():
        for row, answer in zip(rows, answers, strict=True):
            row[name] = {"answer": answer.text, "cut_off": answer.cut_off}
    write_json(folder / "prompts.json", rows)


def _evaluate_classes(
    params: EvaluateParams, dataset: Path, adapter: Path, output: Path, contract: dict[str, Any]
) -> dict[str, Metrics]:
    """`evaluate` for a sequence classification model, whose answers are classes."""
    labels, encoder, test = contract["labels"], load_classes(contract), test_items(dataset, params.max_samples)
    rows = test.column("input_ids").to_pylist()
    quantisation = read_json(adapter / "training.json")["quantisation"]
    model = load_tuned(contract["model"], quantisation, adapter, labels)
    logits = {"adapter": compute_logits(model, encoder, rows, params.batch_size, "evaluate", "the adapter")}
    with untuned(model, contract["model"], labels) as base:
        logits["base"] = compute_logits(base, encoder, rows, params.batch_size, "evaluate", "the base")
    items = {}
    for system in ("base", "adapter"):
        column = pa.array(logits[system].tolist(), pa.list_(pa.float32()))
        items[system] = score_classes(test, logits[system], labels).append_column("logits", column)
    with whole_directory(output) as folder:
        metrics = write_scores(items, params, class_provenance(params, dataset), dataset, adapter, folder)
    return metrics
