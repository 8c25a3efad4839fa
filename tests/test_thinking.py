"""A thinking model with a real template, from rows to a merged model: only the answers' contents are scored."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from chats import FOLDER, talk
from conftest import byte_level, make_base, sample_rows, with_
from tokenizers import AddedToken

from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import Params
from pipeline.prepare import prepare
from pipeline.train import train

QWEN3 = FOLDER / "qwen3.jinja"


def test_a_thinking_model_is_scored_without_its_thoughts_and_merged_with_its_template(
    tmp_path: Path, params: Params
) -> None:
    """A base with Qwen 3's template, from prepare to merge; half of the rows reason."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    base = make_base(tmp_path / "base", steps=100, tokenizer=tokenizer)
    (base / "chat_template.jinja").write_text(QWEN3.read_text(encoding="utf-8"), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(sample_rows(200)):
        thought = f"It says {row['output']}." if number % 2 else None
        rows.append({"messages": talk(row["instruction"], row["output"], thought=thought), "scoring": "exact"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"prepare": {"model_name_or_path": str(base)}, "evaluate": {"max_new_tokens": 24, "max_samples": 24}}
    params = with_(params, **settings, train={"num_train_epochs": 5.0})
    dataset, adapter, evaluation = (tmp_path / name for name in ("dataset", "adapter", "evaluation"))
    prepare(params.prepare, tmp_path / "rows.jsonl", dataset)
    train(params.train, dataset, adapter, tmp_path / "checkpoints")
    evaluate(params.evaluate, dataset, adapter, evaluation)
    answers = pq.read_table(evaluation / "items.adapter.parquet").to_pylist()
    assert not any("think" in item["answer"] for item in answers)
    assert any(tokenizer.token_to_id("<think>") in item["answer_ids"] for item in answers)
    scores = json.loads((evaluation / "scores.json").read_text())
    assert scores["adapter"]["accuracy"]["score"] > scores["base"]["accuracy"]["score"]
    outputs = (tmp_path / name for name in ("merged", "parity"))
    assert merge(params.merge, dataset, adapter, evaluation, *outputs).agreement > 0.9
    shipped = (tmp_path / "merged" / "chat_template.jinja").read_text(encoding="utf-8")
    assert shipped == QWEN3.read_text(encoding="utf-8")
