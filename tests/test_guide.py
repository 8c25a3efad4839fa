"""The guide's own-data chapter, run from its own text in a clone of this project: every command, in its order."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment, retune
from ruamel.yaml import YAML

from pipeline.core import graph
from pipeline.settings import change_params

WHO = {f"GIT_{role}_{key}": "t" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}


def blocks(team: Path) -> list[tuple[str, str]]:
    """Kind and text of each fenced block of the chapter; the team's folder is one of this test."""
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").replace("/mnt/team", str(team))
    chapter = text.split("\n## Your own data\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w*)\n(.*?)^```$", chapter, re.M | re.S)


def run(commands: str, folder: Path, last: Path) -> tuple[str, Path]:
    """What the commands print, and the folder that they end in; each has to succeed."""
    done = subprocess.run(
        ["bash", "-euc", f"{commands}pwd > {last}"],
        cwd=folder, env=environment() | WHO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(f"{commands}\n{done.stdout}")
    assert done.returncode == 0
    return done.stdout, Path(last.read_text().strip())


def numbers(line: str) -> list[str]:
    """The numbers in a line; versions' ids depend on the processor."""
    return re.findall(r"\d+(?:\.\d+)?", re.sub(r"\b[0-9a-f]{6}(…|\b)", "", line))


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}


@pytest.mark.integration
@pytest.mark.timeout(3600)
def test_the_own_data_chapter_works_as_it_is_written(tmp_path: Path) -> None:
    project = folder = tmp_path / "project"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
    printed: list[list[str]] = []
    for kind, text in blocks(tmp_path / "team"):
        match kind:
            case "python":
                (tmp_path / "tickets.py").write_text(text)
            case "yaml":
                change_params(flat(YAML(typ="safe").load(text)), folder / "params.yaml")
            case "sh":
                output, folder = run(text, folder, tmp_path / "last")
                printed = [numbers(line) for line in output.splitlines()]
            case _:
                assert [line for line in text.splitlines() if numbers(line) not in [[], *printed]] == []
    decisions = json.loads(retune(project, "history", "--json").stdout)
    assert [each["decision"] for each in decisions] == ["promoted", "promoted", "rollback", "rollback"]
    first, second, *_ = decisions
    assert second["previous"] == first["champion"] and decisions[-1]["champion"] == second["champion"]
    assert folder == tmp_path / "colleague"
    assert graph.version_id(folder) == second["champion"]
    assert json.loads(retune(folder, "status", "--json").stdout)["champion"] == second["champion"]
