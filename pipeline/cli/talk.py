"""The commands that use a version: report, chat and predict."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.versions import CommandError, Json, Version, find
from pipeline.core.progress import counted

if TYPE_CHECKING:
    from pipeline.chat.responses import Answer
    from pipeline.cli.serving import Talk

HELP = """/adapter NAME   switch to another model: base, workspace, champion, v3 or a version's id
/adapters       list the loaded models
/system TEXT    set the system message; without TEXT, remove it
/reset          forget the conversation
/quit           end (also Ctrl-D)"""
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Maximum number of tokens per answer; default: evaluate.max_new_tokens (auto: prepare.max_length)."
    ),
]


def report(version: Version = None, json_output: Json = False) -> None:
    """Write artifacts/report.html and .md: verdict, scores, tasks, texts, curves and lineage of a version."""
    from pipeline.report.whole import write_version_report

    params, _, target = find(version)
    contents = write_version_report(params.publish, target, Path("artifacts"))
    if json_output:
        print(json.dumps({"version": target, "decision": contents.decision, "path": "artifacts/report.html"}))
    else:
        print(f"report: {contents.verdict}")
        print("report: artifacts/report.html opens in any browser, artifacts/report.md is the same as text")


def chat(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="base, workspace, champion, v3 or a version's id; the first answers. Default: the champion.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Print the answer to this prompt and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    max_new_tokens: MaxNewTokens = None,
    json_output: Json = False,
) -> None:
    """Talk to a version or the base, prompted exactly as in training; /help lists the commands."""
    params = _load_params()
    from pipeline.cli.serving import Talk

    if json_output and prompt is None:
        raise CommandError("--json needs --prompt: a conversation is not one object")
    names = list(dict.fromkeys(models or [_name_or_default(None, params, "chat", prompt is not None)]))
    talk = Talk(params, names)
    limit = _limit(params, max_new_tokens)
    start = [] if system is None else [{"role": "system", "content": system}]
    if prompt is None:
        _converse(talk, limit, start)
        return
    messages = [*start, {"role": "user", "content": prompt}]
    if json_output:
        answer = talk.answer(messages, limit)
        fields = {"model": talk.active} | _fields(answer) | {"tokens": len(answer.ids)}
        print(json.dumps(fields, ensure_ascii=False))
    else:
        _show(talk, messages, limit)


def predict(
    file: Annotated[
        Path, typer.Argument(help="JSONL; each line has prompt or text, or messages that end before the answer.")
    ],
    model: Annotated[str | None, typer.Option(help="As for chat; default: the champion.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file to write; default: FILE ending in .answers.jsonl.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    json_output: Json = False,
) -> None:
    """Answer every line of FILE with a version's merged model; after a kill, the command continues where it stopped.

    A model trained with train.task sequence-classification gives each line its label and confidence.
    """
    params = _load_params()
    from pipeline.cli.serving import load_for_batches, read_prompts
    from pipeline.core.combinations import CLASSIFICATION
    from pipeline.core.files import WORK_DIR
    from pipeline.scoring.classification import classify
    from pipeline.scoring.generation import generate, kept_file
    from pipeline.weights.loading import use_free_cores

    target = output or file.with_name(f"{file.name.removesuffix('.jsonl')}.answers.jsonl")
    rows, size = read_prompts(file), params.evaluate.batch_size
    use_free_cores()
    if params.train.task == CLASSIFICATION:
        folder, name = find_classifier(params, model, "predict")
        classes = classify(folder, [messages for _, messages, _ in rows], size)
        results = [{"label": result.label, "confidence": result.confidence} for result in classes]
        _write_answers(target, rows, results, name, json_output)
        return
    loaded, template, identity = load_for_batches(params, _name_or_default(model, params, "predict"))
    prompts = [template.prompt_ids(messages, tools) for _, messages, tools in rows]
    limit = _limit(params, max_new_tokens)
    keep = kept_file(WORK_DIR / "predictions", identity, prompts, limit, template.stop_ids)
    limited_by = "--max-new-tokens" if max_new_tokens else "evaluate.max_new_tokens"
    settings = (limit, size, "predict", identity["model"], keep, [tools for *_, tools in rows], limited_by)
    results = [_fields(answer) for answer in generate(loaded, template, prompts, *settings)]
    _write_answers(target, rows, results, identity["model"], json_output)
    keep.unlink(missing_ok=True)


def _limit(params: Any, option: int | None) -> int:
    """Tokens that an answer may have."""
    limit = params.evaluate.max_new_tokens
    return option or (params.prepare.max_length if limit == "auto" else limit)


def _write_answers(target: Path, rows: list[Any], results: list[dict[str, Any]], model: str, json_output: bool) -> None:
    from pipeline.core.files import write_text

    lines = [row | result | {"model": model} for (row, _, _), result in zip(rows, results, strict=True)]
    write_text(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if json_output:
        print(json.dumps({"model": model, "rows": len(lines), "path": str(target)}))
    else:
        cut = sum(line.get("cut_off", False) for line in lines)
        print(
            f"predict: {counted(len(lines), 'line')} in {target}"
            + (f", {counted(cut, 'answer')} cut off" if cut else "")
        )


COMMANDS: list[Callable[..., None]] = [report, chat, predict]


def _converse(talk: "Talk", limit: int, start: list[Any]) -> None:
    """Read questions from standard input and write answers to standard output, until the input ends."""

    def note(text: str) -> None:
        print(f"chat: {text}", file=sys.stderr)

    note(f"{talk.active} answers; /help lists the commands")
    messages = list(start)
    while True:
        try:
            line = input(f"{talk.active}> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        try:
            if command == "/quit":
                return
            if line and not line.startswith("/"):
                question = [*messages, {"role": "user", "content": line}]
                messages = [*question, _show(talk, question, limit).message()]
            elif command == "/adapter" and argument:
                talk.use(argument)
                note(f"{talk.active} answers")
            elif command == "/adapters":
                note(", ".join(f"{name} (answers)" if name == talk.active else name for name in talk.names))
            elif command == "/system":
                messages = [{"role": "system", "content": argument}] if argument else []
            elif command == "/reset":
                messages = [message for message in messages[:1] if message["role"] == "system"]
            elif line:
                print(HELP, file=sys.stderr)
        except (ValueError, RuntimeError) as error:  # no such model, or no answer; the conversation is unchanged
            note(str(error))
        except KeyboardInterrupt:  # Ctrl-C stops an answer
            print()


def _show(talk: "Talk", messages: list[Any], limit: int) -> "Answer":
    """Print the answer while it is generated; on a terminal, first the model's reasoning, dimmed."""
    dim, plain, thinking = "\033[2m", "\033[0m", False

    def reasoning(piece: str) -> None:
        nonlocal thinking
        if sys.stdout.isatty():
            print(piece if thinking else f"{dim}{piece}", end="", flush=True)
            thinking = True

    def text(piece: str) -> None:
        nonlocal thinking
        print(f"{plain}\n\n{piece}" if thinking else piece, end="", flush=True)
        thinking = False

    try:
        answer = talk.answer(messages, limit, text, reasoning)
    finally:
        print(plain if thinking else "", end="", flush=True)
    print(" […]" if answer.cut_off else "", flush=True)
    return answer


def _fields(answer: "Answer") -> dict[str, Any]:
    """An answer as JSON, with `reasoning` and `tool_calls` if there are any."""
    from pipeline.cli.serving import printable

    fields: dict[str, Any] = {"answer": printable(answer.text), "cut_off": answer.cut_off}
    if answer.reasoning is not None:
        fields["reasoning"] = printable(answer.reasoning)
    if answer.tool_calls:
        fields["tool_calls"] = list(answer.tool_calls)
    return fields


def _name_or_default(model: str | None, params: Any, command: str, say: bool = True) -> str:
    """The named model, else the default; prints its name if there is no champion yet."""
    from pipeline.cli.serving import default_name

    name = model or default_name(params)
    if model is None and say and name != "champion":
        print(f"{command}: there is no champion yet; {name} answers", file=sys.stderr)
    return name


def find_classifier(params: Any, model: str | None, command: str) -> tuple[Path, str]:
    """Folder and id of the merged model with this name, else of the default."""
    from pipeline.cli.serving import BASE, find_folder

    name = _name_or_default(model, params, command)
    if name == BASE:
        raise CommandError("a base model has no classes; name a version, or workspace (`retune run` trains one)")
    return find_folder(params, name, "merged")


def _load_params() -> Any:
    """The parameters; with a local base model, libraries send no requests to the Hub."""
    from pipeline.settings import load_params

    params = load_params()
    if Path(params.prepare.model_name_or_path).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    return params
