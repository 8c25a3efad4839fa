"""evaluate: frozen test split, base and adapter in; BLEU, ROUGE and accuracy with intervals, and every answer, out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat.template import load_contract, require_same_contract
from pipeline.core.files import read_json, sha256_file, whole_directory, write_json
from pipeline.data.classes import load_classes
from pipeline.params import EvaluateParams, JudgeParams
from pipeline.report.stage import write_scores
from pipeline.scoring.classification import SIGNATURES, by_class, predict, predictions, score_classes
from pipeline.scoring.general import forgetting, general_items, read_general
from pipeline.scoring.generation import Answer, generate, to_answer
from pipeline.scoring.items import Metrics, provenance, score_items, test_items
from pipeline.scoring.judge.endpoint import Endpoint, JudgeError
from pipeline.scoring.judge.judging import answer_turns, judge, questions, signature
from pipeline.scoring.kept import forget_others, kept_file
from pipeline.scoring.likelihood import reference_losses, sequence_losses
from pipeline.scoring.vllm import vllm_tokens
from pipeline.weights.loading import load_tuned, untuned, use_free_cores


@dataclass(frozen=True)
class _Asked:
    """What one system answered."""

    answers: list[Answer]  # to the test split
    losses: tuple[list[float], list[int]]
    prompts: list[Answer]  # to params.prompts
    general: pa.Table | None
    turns: list[tuple[Answer, Answer]]  # to the judge's questions


@dataclass(frozen=True)
class Evaluated:
    base: Metrics
    adapter: Metrics


def evaluate(
    params: EvaluateParams,
    dataset: Path,
    adapter: Path,
    output: Path,
    kept: Path | None = None,
    judge_key: str = "",
) -> Evaluated:
    """Score the adapter and the untouched base, quantised as in training, on the same test prompts.

    Writes to `output`: `scores.json` ({"base": …, "adapter": …}; `bleu` and `chrf` 0–100, `perplexity` from 1, the
    others 0–1), `items.base.parquet` and `items.adapter.parquet` (every answer with its scores), `prompts.json`
    (answers to `params.prompts`), `evaluation.json` (what the scores depend on: test split, decoding, signatures) and
    `report.md` and `report.html`; with `params.general` also `general.json`, `general.base.parquet` and
    `general.adapter.parquet`; with `params.judge` also `judge.json` and `judge.parquet` (every reply of the judge).

    Args:
        kept: a folder for answers: a killed run leaves them to the next one, and so does one with other metrics.
        judge_key: the key of the judge's endpoint.

    Raises:
        TemplateError: base model or tokenizer is not what the dataset was prepared for, or the adapter was trained on.
        ModelError: the adapter is missing or does not fit the base.
        JudgeError: `params.judge` cannot be asked, or does not answer in the form that it is asked for.
        GeneralError: `params.general` is not the file that was pinned, or has a row that cannot be used.
        BackendError: `params.backend` cannot be used here.
    """
    contract = read_json(dataset / "contract.json")
    template = load_contract(contract)
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    use_free_cores()
    test = test_items(dataset, params.max_samples)
    prompts, tools = (test.column(name).to_pylist() for name in ("input_ids", "tools"))
    quantisation = read_json(adapter / "training.json")["quantisation"]
    made = {}
    if params.backend == "vllm":  # before another copy of the base is on the GPU
        limit, stops = params.max_new_tokens, template.stop_ids
        made = vllm_tokens(contract["model"], adapter, prompts, limit, stops, quantisation["load_in_4bit"])
    model = load_tuned(contract["model"], quantisation, adapter)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    general = read_general(params.general, template, context) if params.general else None
    judge_by = endpoint(params.judge, judge_key) if params.judge else None
    open_questions = questions(params.judge.languages) if params.judge else []
    extra = [template.prompt_ids([{"role": "user", "content": text}]) for text in params.prompts]
    files: list[Path] = []

    def ask(model: Any, system: str, **identifies: Any) -> _Asked:
        label = f"the {system}"

        def answer(asked: list[list[int]], what: str = "", tools: list[str | None] | None = None) -> list[Answer]:
            keep = None
            if kept is not None:
                keep = kept_file(kept, identifies, asked, params.max_new_tokens, template.stop_ids)
                files.append(keep)
            limits = (params.max_new_tokens, params.batch_size)
            return generate(model, template, asked, *limits, "evaluate", f"{label}{what}", keep, tools)

        def in_conversation(messages: list[list[dict[str, str]]]) -> list[Answer]:
            turns = [template.prompt_ids(one) for one in messages]
            longest = params.judge.max_new_tokens if params.judge else 0
            return generate(model, template, turns, longest, params.batch_size, "evaluate", f"{label}, for the judge")

        items = None
        if general is not None:
            losses = sequence_losses(model, general.sequences, template.tokenizer.pad_token_id, "evaluate", label)
            items = general_items(general, answer(list(general.prompts.values()), ", general"), losses)
        losses = reference_losses(model, template, test, "evaluate", label)
        if made:
            rows = zip(made[system], prompts, tools, strict=True)
            answers = [to_answer(ids, template, prompt, offered) for ids, prompt, offered in rows]
        else:
            answers = answer(prompts, tools=tools)
        asked_turns = answer_turns(open_questions, in_conversation) if open_questions else []
        return _Asked(answers, losses, answer(extra, ", prompts") if extra else [], items, asked_turns)

    identity = {"base": contract["model"]["digest"], "quantisation": quantisation}
    weights = {path.name: sha256_file(path) for path in sorted(adapter.glob("*.safetensors"))}
    asked = {"adapter": ask(model, "adapter", **identity, adapter=weights)}
    with untuned(model, contract["model"]) as before:
        asked["base"] = ask(before, "base", **identity)
    items: dict[str, pa.Table] = {}
    signatures: dict[str, str] = {}
    with whole_directory(output) as folder:
        for system in ("base", "adapter"):
            items[system], signatures = score_items(test, asked[system].answers, asked[system].losses)
            if (general_answers := asked[system].general) is not None:
                pq.write_table(general_answers, folder / f"general.{system}.parquet")
        if asked["base"].general is not None and asked["adapter"].general is not None:
            write_json(folder / "general.json", forgetting(asked["base"].general, asked["adapter"].general, params))
        if params.judge is not None and judge_by is not None:
            turns = {system: asked[system].turns for system in ("adapter", "base")}
            limits = (params.judge.max_concurrency, params.bootstrap_samples, params.seed)
            judged = judge(judge_by.complete, open_questions, turns, *limits)
            signed = {"signature": signature(params.judge.model, params.judge.languages)}
            write_json(folder / "judge.json", signed | judged.summary)
            pq.write_table(judged.verdicts, folder / "judge.parquet")
        write_json(folder / "prompts.json", side_by_side(params.prompts, asked))
        metrics = write_scores(items, params, provenance(params, dataset, signatures), dataset, adapter, folder)
    if kept is not None:
        forget_others(kept, files)
    return Evaluated(base=metrics["base"], adapter=metrics["adapter"])


def endpoint(params: JudgeParams, key: str) -> Endpoint:
    if params.api_key_variable is not None and not key:
        raise JudgeError(f"evaluate.judge needs its key in the environment variable {params.api_key_variable}")
    return Endpoint(params.endpoint, params.model, key, params.timeout_s, params.max_tokens)


def side_by_side(prompts: list[str], asked: dict[str, _Asked]) -> list[dict[str, Any]]:
    """Each of the user's own prompts with the answer of every system, to be read."""
    return [
        {"prompt": prompt}
        | {s: {"answer": one.prompts[i].text, "cut_off": one.prompts[i].cut_off} for s, one in asked.items()}
        for i, prompt in enumerate(prompts)
    ]


def evaluate_classes(params: EvaluateParams, dataset: Path, adapter: Path, output: Path) -> tuple[Metrics, Metrics]:
    """`evaluate` for classes: scores of base and adapter, and the same files in `output`.

    Raises:
        TemplateError, ModelError: as `evaluate`.
    """
    contract = read_json(dataset / "contract.json")
    labels, encoder = contract["labels"], load_classes(contract)
    require_same_contract(contract, read_json(adapter / "contract.json"), adapter)
    use_free_cores()
    test = test_items(dataset, params.max_samples)
    rows = test.column("input_ids").to_pylist()
    quantisation = read_json(adapter / "training.json")["quantisation"]
    model = load_tuned(contract["model"], quantisation, adapter, labels)
    logits = {"adapter": predict(model, encoder, rows, params.batch_size, "evaluate", "the adapter")}
    with untuned(model, contract["model"], labels) as before:
        logits["base"] = predict(before, encoder, rows, params.batch_size, "evaluate", "the base")
    items = {
        system: score_classes(test, predictions(logits[system], labels)).append_column(
            "logits", pa.array(logits[system].tolist(), pa.list_(pa.float32()))
        )
        for system in ("base", "adapter")
    }
    recorded = provenance(params, dataset, SIGNATURES) | {"decoding": "most probable"}
    with whole_directory(output) as folder:
        metrics = write_scores(items, params, recorded, dataset, adapter, folder)
        with (folder / "report.md").open("a", encoding="utf-8") as page:
            page.write(by_class(items["adapter"]))
    return metrics["base"], metrics["adapter"]
