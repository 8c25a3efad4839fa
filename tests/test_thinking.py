"""A model that thinks, with a real template, from its rows to a merged model: what counts are its answers' contents."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chats import FOLDER, talk
from conftest import byte_level, make_base, sample_rows, with_
from tokenizers import AddedToken

from pipeline.evaluate import evaluate
from pipeline.merge import merge
from pipeline.params import Params
from pipeline.prepare import prepare
from pipeline.scoring.generation import Answer
from pipeline.scoring.items import score_items, summarise
from pipeline.train import train

QWEN3 = FOLDER / "qwen3.jinja"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory, params: Params) -> tuple[Params, Path]:
    """Dataset, adapter, evaluation and merged model of a base with Qwen 3's template; half of the rows reason."""
    folder = tmp_path_factory.mktemp("thinking")
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    base = make_base(folder / "base", steps=300, tokenizer=tokenizer)
    (base / "chat_template.jinja").write_text(QWEN3.read_text(encoding="utf-8"), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(sample_rows(300)):
        thought = f"It says {row['output']}." if number % 2 else None
        rows.append({"messages": talk(row["instruction"], row["output"], thought=thought), "scoring": "exact"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = with_(
        params,
        prepare={"model_name_or_path": str(base)},
        train={"num_train_epochs": 10.0},
        evaluate={"max_new_tokens": 24},
    )
    prepare(changed.prepare, folder / "rows.jsonl", folder / "dataset")
    train(changed.train, folder / "dataset", folder / "adapter", folder / "checkpoints")
    evaluate(changed.evaluate, folder / "dataset", folder / "adapter", folder / "evaluation")
    return changed, folder


def test_a_thinking_model_is_scored_by_its_contents_alone(thinking: tuple[Params, Path]) -> None:
    params, folder = thinking
    test = pq.read_table(folder / "dataset" / "test.parquet")
    items = pq.read_table(folder / "evaluation" / "items.adapter.parquet")
    assert not any("think" in text for text in items["answer"].to_pylist())
    scores = json.loads((folder / "evaluation" / "scores.json").read_text())
    metrics = scores["adapter"]
    losses = ([0.0] * len(test), [1] * len(test))
    texts = [Answer(text, [0], cut_off=False) for text in items["answer"].to_pylist()]
    alone = summarise(score_items(test, texts, losses)[0], params.evaluate)
    for name in ("accuracy", "bleu", "rougeL"):
        assert metrics[name] == alone[name]
    assert metrics["accuracy"]["score"] > scores["base"]["accuracy"]["score"]


def test_a_thinking_model_is_merged_with_the_template_that_it_was_trained_on(thinking: tuple[Params, Path]) -> None:
    params, folder = thinking
    outputs = (folder / name for name in ("merged", "parity", "exports"))
    done = merge(params.merge, folder / "dataset", folder / "adapter", folder / "evaluation", *outputs)
    assert done.agreement > 0.9
    shipped = (folder / "merged" / "chat_template.jinja").read_text(encoding="utf-8")
    assert shipped == QWEN3.read_text(encoding="utf-8")
