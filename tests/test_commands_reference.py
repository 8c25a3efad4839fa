"""docs/commands.md is what the commands' `--help` says; `python tests/test_commands_reference.py` writes it again."""

from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from pipeline.cli.main import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
HEAD = """# Commands

What `--help` prints for `retune` and each of its commands. `python tests/test_commands_reference.py` writes this page.
"""


def help_text(*command: str) -> str:
    printed = CliRunner().invoke(app, [*command, "--help"], prog_name="retune", env={"COLUMNS": "100"}).stdout
    return "\n".join(line.rstrip() for line in printed.strip().splitlines())


def reference() -> str:
    names = sorted(name for name, command in COMMANDS.items() if not command.hidden)
    chapters = [("", help_text()), *((f"\n## retune {name}\n", help_text(name)) for name in names)]
    return HEAD + "".join(f"{title}\n```text\n{text}\n```\n" for title, text in chapters)


def test_the_commands_reference_is_what_help_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference()


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
