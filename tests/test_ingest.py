"""Outside data into a new snapshot; nothing else in data/ changes, and nothing at all when the data is bad."""

import json
from pathlib import Path

import pytest
from conftest import environment, sample_rows

from pipeline.files import sha256_file
from pipeline.formats import FormatError
from pipeline.ingest import ingest
from pipeline.params import IngestParams, load_params
from pipeline.prepare import prepare

AUTO = IngestParams(format="auto")


@pytest.fixture(autouse=True)
def commands_of_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", environment()["PATH"])


def state(root: Path) -> dict[str, str]:
    files = [root / "data.dvc", *(path for path in (root / "data").rglob("*") if path.is_file())]
    return {str(path.relative_to(root)): sha256_file(path) for path in files}


def source(folder: Path, *rows: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_new_data_makes_a_new_snapshot_and_the_base_stays(project: Path, tmp_path: Path) -> None:
    before = state(project)
    new = source(tmp_path / "new", *sample_rows(20), {"instruction": "q", "output": ""})
    (new / "sub").mkdir()
    (new / "sub" / "more.json").write_text(json.dumps(sample_rows(3)))
    result = ingest(AUTO, new, project)
    after = state(project)
    assert (result.files, result.rows, result.changed) == (["new.jsonl", "sub/more.json"], 23, True)
    assert result.rejected == {"output is empty": 1}
    assert after["data.dvc"] != before["data.dvc"]
    assert {name: after[name] for name in after if "/base/" in name} == {n: before[n] for n in before if "/base/" in n}
    assert {name for name in after if "/instructions/" in name} == {
        "data/instructions/new.jsonl",
        "data/instructions/sub/more.json",
    }
    assert (project / "data/instructions/new.jsonl").read_bytes() == (new / "new.jsonl").read_bytes()
    again = ingest(AUTO, new, project)
    assert not again.changed
    assert state(project) == after


def test_bad_data_leaves_the_snapshot_as_it_was(project: Path, tmp_path: Path) -> None:
    before = state(project)
    bad = source(tmp_path / "bad", *sample_rows(2))
    for content in ('[{"instruction": "q"', "[]", '[{"question": "q"}]', '[{"instruction": "q", "output": null}]'):
        (bad / "zz.json").write_text(content)
        target = bad if "null" not in content else bad / "zz.json"
        with pytest.raises(FormatError, match=r"zz\.json"):
            ingest(AUTO, target, project)
        assert state(project) == before


def test_data_whose_format_a_person_named_can_be_prepared(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [row | {"conversations": talk} for row in sample_rows(100)]
    (tmp_path / "both.json").write_text(json.dumps(rows))
    ingest(IngestParams(format="alpaca"), tmp_path / "both.json", project)
    monkeypatch.chdir(project)
    result = prepare(load_params().prepare, Path("data/instructions"), tmp_path / "dataset")
    assert sum(result.rows.values()) == 100
