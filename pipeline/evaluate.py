"""evaluate: frozen test split, base and adapter in; BLEU, ROUGE and accuracy with intervals, and every answer, out."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat.responses import Answer, read_answer
from pipeline.chat.template import load_contract, require_same_contract
from pipeline.core.files import read_json, sha256_file, whole_directory, write_json
from pipeline.data.classes import load_classes
from pipeline.params import EvaluateParams
from pipeline.report.stage import write_scores
from pipeline.scoring.classification import class_provenance, predict, predictions, score_classes
from pipeline.scoring.general import GeneralRow, forgetting, general_items, read_general
from pipeline.scoring.generation import generate
from pipeline.scoring.items import Metrics, provenance, score_items, test_items
from pipeline.scoring.kept import kept_file
from pipeline.scoring.likelihood import Losses, reference_losses, sequence_losses
from pipeline.scoring.vllm import vllm_tokens
from pipeline.weights.loading import use_free_cores
from pipeline.weights.placement import load_tuned, untuned

# The sets of prompts, as progress lines name them after the system.
TEST, GENERAL, PROMPTS = "", ", general", ", prompts"
# A system's answers to each set, and the losses of the references of the test split and of the general set.
Answered = tuple[dict[str, list[Answer]], list[Losses]]


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
    prompts, tools = (test.column(name).to_pylist() for name in ("input_ids", "tools"))
    by_vllm: dict[str, list[list[int]]] = {}  # tokens of each system's answers to the test split
    if params.backend == "vllm":  # before another copy of the base is on the GPU
        limit, stops = params.max_new_tokens, template.stop_ids
        by_vllm = vllm_tokens(contract["model"], adapter, prompts, limit, stops, quantisation["load_in_4bit"])
    model = load_tuned(contract["model"], quantisation, adapter)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    general = read_general(params.general, template, context) if params.general else []
    sets = {
        TEST: prompts,
        GENERAL: [row.prompt for row in general if row.prompt is not None],
        PROMPTS: [template.prompt_ids([{"role": "user", "content": text}]) for text in params.prompts],
    }
    files: list[Path] = []  # of kept answers

    def ask(model: Any, system: str, depends_on: dict[str, Any]) -> Answered:
        name, answers = f"the {system}", dict[str, list[Answer]]()
        for what, prompts in sets.items():
            if what == TEST and by_vllm:
                rows = zip(prompts, by_vllm[system], tools, strict=True)
                answers[what] = [read_answer(template, prompt, ids, offered) for prompt, ids, offered in rows]
            elif prompts:
                keep = kept and kept_file(kept, depends_on, prompts, params.max_new_tokens, template.stop_ids)
                files.extend([keep] if keep else [])
                settings = (params.max_new_tokens, params.batch_size, "evaluate", name + what, keep)
                answers[what] = generate(model, template, prompts, *settings, tools if what == TEST else None)
        pad = template.tokenizer.pad_token_id
        of_general = sequence_losses(model, [row.sequence for row in general], pad, "evaluate", name)
        return answers, [reference_losses(model, template, test, "evaluate", name), of_general]

    weights = {path.name: sha256_file(path) for path in sorted(adapter.glob("*.safetensors"))}
    depends_on = {"base": contract["model"]["digest"], "quantisation": quantisation}
    answered = {"adapter": ask(model, "adapter", depends_on | {"adapter": weights})}
    with untuned(model, contract["model"]) as base:
        answered["base"] = ask(base, "base", depends_on)
    with whole_directory(output) as folder:
        items = dict[str, pa.Table]()
        for system in ("base", "adapter"):
            answers, losses = answered[system]
            items[system], signatures = score_items(test, answers[TEST], losses[0])
        _write_others(answered, general, params, folder)
        metrics = write_scores(items, params, provenance(params, dataset, signatures), dataset, adapter, folder)
    if kept is not None:
        for path in set(kept.glob("*")) - set(files):  # answers of earlier runs
            path.unlink()
    return metrics


def _write_others(
    answered: dict[str, Answered], general: list[GeneralRow], params: EvaluateParams, folder: Path
) -> None:
    """Write what was answered besides the test split: the general set and the prompts."""
    if general:
        tables = {}
        for system, (answers, losses) in answered.items():
            tables[system] = general_items(general, answers.get(GENERAL, []), losses[1])
            pq.write_table(tables[system], folder / f"general.{system}.parquet")
        write_json(folder / "general.json", forgetting(tables["base"], tables["adapter"], params))
    prompts = []
    for number, prompt in enumerate(params.prompts):
        both = {system: answers[PROMPTS][number] for system, (answers, _) in answered.items()}
        texts = {system: {"answer": answer.text, "cut_off": answer.cut_off} for system, answer in both.items()}
        prompts.append({"prompt": prompt} | texts)
    write_json(folder / "prompts.json", prompts)


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
