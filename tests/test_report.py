"""The reports of evaluation and data: their numbers add up, no text in them can run, they fit any screen offline."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, dump_dom

from pipeline.chat.responses import Answer
from pipeline.core.files import read_json, write_json
from pipeline.data.data_report import DataReportError, DataStats, excerpt, write_report
from pipeline.params import Params
from pipeline.report.contents import EXAMPLES, Contents, System, find_differences
from pipeline.report.evaluation_pages import plot_losses, render
from pipeline.report.stage import read_curve, read_other_sets, read_prompts, stage_contents, write_scores
from pipeline.report.tables import interval
from pipeline.scoring.items import provenance, score_items, summarise

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">`*|[x](javascript:alert(1)) "
)


def system(name: str, items: pa.Table, params: Params) -> System:
    return System(name, summarise(items, params.evaluate), items)


def with_answers(items: pa.Table, **columns: list[Any]) -> pa.Table:
    for name, values in columns.items():
        items = items.set_column(items.column_names.index(name), name, [values])
    return items


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, params: Params, dataset: Path) -> Path:
    """The files of a trained adapter that the report reads."""
    folder = tmp_path_factory.mktemp("adapter")
    training = {"params": params.train.model_dump(), "steps": 20, "trainable_parameters": 1000, "device": "cpu"}
    training["base_model"] = {"name_or_path": "data/base", "digest": "b" * 64}
    write_json(folder / "training.json", training)
    write_json(folder / "contract.json", read_json(dataset / "contract.json"))
    (folder / "loss.csv").write_text("step,loss,validation_loss\n10,2.0,\n20,1.0,1.5\n")
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, params: Params, dataset: Path, adapter: Path) -> Path:
    """The stage's files for invented answers: the base always says red, the adapter is mostly right."""
    folder = tmp_path_factory.mktemp("evaluation")
    test = pq.read_table(dataset / "test.parquet")
    references, losses = test.column("reference").to_pylist(), ([2.0] * len(test), [2] * len(test))
    texts = {"base": ["red"] * len(test), "adapter": references[:-5] + ["no idea"] * 5}
    items = {}
    for name, answers in texts.items():
        items[name], signatures = score_items(test, [Answer(text, [1, 2], False) for text in answers], losses)
    write_json(folder / "prompts.json", [])
    recorded = provenance(params.evaluate, dataset, signatures)
    write_scores(items, params.evaluate, recorded, dataset, adapter, folder)
    return folder


@pytest.fixture(scope="module")
def contents(evaluation: Path, dataset: Path, adapter: Path) -> Contents:
    metrics = read_json(evaluation / "scores.json")
    tables = {name: pq.read_table(evaluation / f"items.{name}.parquet") for name in ("base", "adapter")}
    systems = [System(name, metrics[name], table) for name, table in tables.items()]
    return stage_contents(systems, dataset, adapter, evaluation)


def test_the_bars_of_dvc_plots_are_the_scores_of_scores_json(evaluation: Path, contents: Contents) -> None:
    metrics = read_json(evaluation / "scores.json")
    for file, task in (("scores.csv", None), ("tasks.csv", contents.slices("by_task")[0][0])):
        with (evaluation / file).open(encoding="utf-8", newline="") as text:
            bars = {row.pop("of"): {key: float(value) for key, value in row.items()} for row in csv.DictReader(text)}
        for name in ("base", "adapter"):
            scores = metrics[name]["by_task"][task] if task else metrics[name]
            expected = {key: round(100 * value, 4) for key, value in scores["accuracy"].items()}
            assert bars[f"{task or 'accuracy'}, {name}"] == expected
    assert bars.keys() == {f"{task}, base", f"{task}, adapter"}
    assert "bleu, adapter" in (evaluation / "scores.csv").read_text()


@pytest.fixture(scope="module")
def full(contents: Contents, params: Params) -> Contents:
    """Four systems, a refusal, and texts and facts that are hostile and long."""
    items = contents.systems[1].items
    long = [HOSTILE + "W" * 300 for _ in range(len(items))]
    messages = [json.dumps([{"role": "user", "content": text}]) for text in long]
    items = with_answers(items, task=long, prompt=long, messages=messages, reference=long)
    answers = ["no " + HOSTILE if row % 2 else "yes" for row in range(len(items))]
    worse = with_answers(items, answer=answers, accuracy=[float(row % 2) for row in range(len(items))])
    better = with_answers(items, answer=answers, accuracy=[float(row % 3 > 0) for row in range(len(items))])
    tables = {"base": worse, "champion": worse, "adapter": better, "merged": better}
    systems = [system(name, table, params) for name, table in tables.items()]
    num_better, num_worse, best, worst = find_differences(systems[3], systems[1])
    changes = [replace(change, needed="more than 0", verdict="refused") for change in contents.changes]
    return replace(
        contents, systems=systems, old="champion", changes=changes, better=num_better, worse=num_worse, best=best,
        worst=worst, decision="refused", verdict=HOSTILE * 3, title=HOSTILE, about={"model": HOSTILE}, next="go on",
        notes=[HOSTILE], facts={HOSTILE: {HOSTILE: HOSTILE}},
        prompts={HOSTILE: [(system.name, HOSTILE) for system in systems]},
        tables={HOSTILE: [dict.fromkeys(("", "base", HOSTILE), HOSTILE)]},
    )  # fmt: skip


def test_the_stage_writes_both_pages_with_the_numbers_of_its_metrics(evaluation: Path, contents: Contents) -> None:
    metrics = read_json(evaluation / "scores.json")
    text = (evaluation / "report.md").read_text()
    for name in ("accuracy", "bleu", "rougeL"):
        cells = " | ".join(interval(name, metrics[key][name]) for key in ("base", "adapter"))
        assert f"| {name} | {cells} |" in text
    page = (evaluation / "report.html").read_text()
    assert "Not decided yet" in page
    assert "<b>user</b>" in page and "&lt;|im_start|&gt;" not in page  # turns without control tokens
    assert page.count("<polyline") == 2
    assert (render(contents, "report.md"), render(contents, "report.html")) == (text, page)


def test_the_verdict_comes_first(full: Contents) -> None:
    refused = replace(full, title="Refused: v4 (295a1c…)", about={"model": "mine", "version": "v4", "decided": "today"})
    page, text = render(refused, "report.html"), render(refused, "report.md")
    assert 0 < page.index("<b>v4</b>") < page.index("Refused: v4") < page.index("Next: go on") < page.index("<h2>")
    assert text.splitlines()[0] == "# Evaluation: model mine, version v4, decided today"
    assert text.splitlines()[2].startswith("**Refused: v4 (295a1c…).**")
    assert page.index(">candidate (merged)</th>") < page.index(">champion</th>")  # what ships comes first
    assert full.better + full.worse + full.same == len(full.systems[0].items)
    assert f"{full.same} the same" in text


def test_differences_are_the_items_that_changed_most(evaluation: Path, params: Params) -> None:
    items = pq.read_table(evaluation / "items.adapter.parquet").slice(0, 30)
    zeros = with_answers(items, accuracy=[0.0] * 30, rougeL=[0.5] * 30)
    rouge = [0.5] * 30
    rouge[3], rouge[4], rouge[5] = 0.4, 0.1, 0.9
    changed = with_answers(zeros, accuracy=[0.0] * 28 + [1.0] * 2, rougeL=rouge)
    better, worse, best, worst = find_differences(system("merged", changed, params), system("base", zeros, params))
    assert (better, worse) == (3, 2)
    prompts = [" ".join(json.loads(m)[-1]["content"].split()) for m in items.column("messages").to_pylist()]
    assert [difference.prompt for difference in best] == [prompts[28], prompts[29], prompts[5]]
    assert [difference.prompt for difference in worst] == [prompts[4], prompts[3]]
    assert best[2].changed_score == ("rougeL", 0.5, 0.9)
    all_changed = with_answers(zeros, rougeL=[0.9] * 30)
    assert len(find_differences(system("merged", all_changed, params), system("base", zeros, params))[2]) == EXAMPLES


def test_a_slice_shows_accuracy_only_if_it_is_informative(contents: Contents, params: Params) -> None:
    items = contents.systems[1].items
    number = len(items)

    def shown_metric(accuracy: list[float | None], label: str | None = None) -> tuple[str, int]:
        table = with_answers(items, accuracy=accuracy, task=["t"] * number, label=[label] * number)
        [(_, _, metric, counting)] = replace(contents, systems=[system("merged", table, params)]).slices("by_task")
        return metric, counting

    assert shown_metric([0.0] * (number - 1) + [1.0]) == ("accuracy", number)
    assert shown_metric([0.0] * number) == ("rougeL", number)  # zeros of free texts say nothing
    assert shown_metric([0.0] * number, "t: red") == ("accuracy", number)  # zeros of classes say that none is right
    assert shown_metric([1.0] * 3 + [None] * (number - 3)) == ("rougeL", number)  # three items are too few


def assert_only_text(page: str, text: str) -> None:
    assert "<script" not in page and "<img" not in page and 'onerror="' not in page
    assert page.count("&lt;script&gt;") >= 8 and "default-src 'none'" in page
    assert not re.search(r"(?<!\\)<(?:script|img)", text)
    assert "](javascript" not in text.replace("\\]", "")


def test_texts_of_a_model_are_not_markup_and_the_page_is_self_contained(full: Contents) -> None:
    page = render(full, "report.html")
    assert_only_text(page, render(full, "report.md"))
    markup = re.sub("&lt;.*?&gt;", "", page)
    assert not re.search(r"<(?:script|link|iframe|object)\b|@import|url\(|\bsrc=|href=", markup)


def test_the_report_has_the_general_set_and_the_prompts_of_the_parameters(tmp_path: Path) -> None:
    score = {"score": 4.0, "low": 3.0, "high": 5.0}
    general = {"base": {"perplexity": score, "accuracy": None}, "adapter": {"perplexity": score, "accuracy": None}}
    write_json(tmp_path / "general.json", general | {"rows": 5, "lost": {"perplexity": 0.25, "accuracy": None}})
    sets = read_other_sets(tmp_path)
    rows = [list(row.values()) for row in sets["General set: what was forgotten"]]
    assert rows == [["perplexity", "4.000 (3.000 to 5.000)", "4.000 (3.000 to 5.000)", "+25.0 %"]]
    texts = {"base": {"answer": "blue", "cut_off": False}, "adapter": {"answer": "red", "cut_off": True}}
    write_json(tmp_path / "prompts.json", [{"prompt": "Which colour?"} | texts])
    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old" / "prompts.json", [])
    sources = {"base": (tmp_path, "base"), "champion": (tmp_path / "old", "adapter"), "adapter": (tmp_path, "adapter")}
    answers = [("base", "blue"), ("champion", "(was not asked)"), ("adapter", "red (cut off)")]
    assert read_prompts(sources) == {"Which colour?": answers}


def test_the_curve_leaves_out_values_that_are_not_finite() -> None:
    curve = read_curve("step,loss,validation_loss\n10,4.0,\n20,nan,\n30,1.0,2.0\n")
    assert curve == [{"step": 10, "loss": 4.0}, {"step": 20}, {"step": 30, "loss": 1.0, "validation_loss": 2.0}]
    plot = plot_losses(curve)
    assert plot is not None
    assert plot["lines"] == {"loss": "0.0,0.0 100.0,75.0", "validation_loss": "100.0,50.0"}
    assert plot["y_ticks"][-1] == ("4", 0.0)
    assert plot_losses([]) is None
    assert plot_losses(read_curve("step,loss,validation_loss\n10,0.0,\n")) is not None


FRAME = """<html><body><script>
const frame = document.createElement("iframe");
frame.style = "width: %dpx; height: 900px; border: 0";
frame.srcdoc = %s;
frame.onload = () => { const page = frame.contentDocument; document.title = JSON.stringify({
  title: page.title, width: page.documentElement.scrollWidth, room: page.documentElement.clientWidth,
  headings: [...page.querySelectorAll("h1, h2")].map(h => h.textContent.trim()),
  bars: [...page.querySelectorAll(".task .value")].filter(bar => bar.getBoundingClientRect().width > 5).length,
  outside: [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll"))
    .filter(e => e.getBoundingClientRect().right > %d).length,
  line: page.querySelector("polyline").getBoundingClientRect().width,
}); };
document.body.append(frame);
</script></body></html>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_runs_no_script_of_a_model(full: Contents, tmp_path: Path, width: int) -> None:
    page = render(full, "report.html").replace('http-equiv="Content-Security-Policy"', "")  # escaping must suffice
    literal = json.dumps(page.replace("<details>", "<details open>")).replace("</", "<\\/")
    (tmp_path / "frame.html").write_text(FRAME % (width, literal, width))
    ran = dump_dom(
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", f"file://{tmp_path}/frame.html"
    )
    match = re.search(r"<title>(.*?)</title>", ran.stdout)
    assert match is not None, ran.stderr[-2000:]
    page_facts = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert page_facts["title"].startswith("Evaluation report")  # and not "owned"
    assert page_facts["width"] <= page_facts["room"] <= width
    assert page_facts["outside"] == 0
    assert page_facts["bars"] == len(full.systems) * sum(len(full.slices(kind)) for kind in ("by_task", "by_language"))
    assert page_facts["line"] > 200
    assert page_facts["headings"] == [
        "Evaluation report", "Difference: candidate (merged) against champion", "Scores", "By task", "By language",
        "Your prompts", HOSTILE.strip(), "Most improved answers",
        "Most worsened answers", "Loss", "Where the numbers come from",
    ]  # fmt: skip


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


def report_of(stats: DataStats, prompt: str = "user says ") -> dict[str, Any]:
    return stats.report([(prompt, False), ("yes", True)], max_length=64, test_sha256="0" * 64, crowded=0, scoring={})


def test_the_report_has_the_counts_of_the_rows() -> None:
    stats = DataStats()
    stats.add_read("alpaca", "a.json", 40)
    stats.tasks |= {"train": Counter(one=20, two=10), "test": Counter(one=2)}
    stats.lengths.update(range(1, 31))
    stats.trained_tokens = 100
    for number in range(8):
        stats.dropped.add("seldom" if number < 2 else "often", source=f"a.json:{number}", text=turns("text"))
    report = report_of(stats)
    assert report["rows_in"] == 40
    assert report["rows"] == {"train": 30, "validation": 0, "test": 2}
    assert list(report["dropped"].items()) == [("often", 6), ("seldom", 2)]
    examples = {reason: len(examples) for reason, examples in report["dropped_examples"].items()}
    assert examples == {"often": 5, "seldom": 2}
    assert report["train_tokens"] == {"total": 465, "trained": 100, "median_per_row": 16, "max_per_row": 30}
    assert report["lengths"] == {"1": 1, "2": 1, "4": 2, "8": 4, "16": 8, "32": 14}


def test_a_row_that_is_neither_kept_nor_dropped_is_an_error() -> None:
    stats = DataStats()
    stats.add_read("alpaca", "rows.json", 2)
    stats.tasks["train"]["default"] += 1
    with pytest.raises(DataReportError):
        report_of(stats)


def test_the_example_and_the_excerpts_hold_no_secrets() -> None:
    stats = DataStats()
    stats.add_read("a", "f", 1)
    key = "AKIA" + "A1B2" * 4
    stats.dropped.add("reason", source="f:1", text=turns(f"use {key} " + "word " * 500))
    report = report_of(stats, f"use {key}")
    assert report["example_segments"] == [("use ***", False), ("yes", True)]
    (example,) = report["dropped_examples"]["reason"]
    assert example["text"].startswith("user: use *** word") and len(example["text"]) <= 600


@pytest.mark.parametrize("record", [None, 5, "x", [], [1], {"a": float("nan")}, [{"role": "user"}], {"a": b"\xff"},
                                    [{"role": "user", "content": "\x00\x1b[31m\u202e"}]])  # fmt: skip
def test_any_record_has_an_excerpt_that_a_terminal_can_show(record: Any) -> None:
    assert all(character.isprintable() or character == "\n" for character in excerpt(record))


def test_text_from_the_data_is_not_markup(tmp_path: Path) -> None:
    """A report with every section, in which every text is hostile."""
    stats = DataStats()
    stats.add_read(HOSTILE, HOSTILE, 7)
    stats.tasks |= {"train": Counter({HOSTILE: 2}), "validation": Counter(["code"]), "test": Counter(["code"])}
    stats.languages |= {"train": Counter([HOSTILE, "en"]), "test": Counter(["zh"])}
    stats.lengths.update([10, 60])
    stats.repaired.add(HOSTILE, source=HOSTILE, text=turns(HOSTILE))
    for reason in (HOSTILE, "exact duplicate of an earlier row", "longer than prepare.max_length"):
        stats.dropped.add(reason, source=HOSTILE, text=turns(HOSTILE + " a@b.org"))
    pair = {"source": HOSTILE, "of": HOSTILE, "similarity": 0.93, "text": turns(HOSTILE), "of_text": turns(HOSTILE)}
    stats.duplicates.add(HOSTILE, **pair)
    write_report(report_of(stats, f"```{HOSTILE}\n"), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "````" in text
    outside_code = re.sub(r"^````\n.*?^````$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert_only_text((tmp_path / "report.html").read_text(), outside_code)
