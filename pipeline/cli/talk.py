"""The commands that use a version: report, chat, predict and classify."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.project import BASE, WORKSPACE, as_typed, load_params_offline
from pipeline.cli.versions import CommandError, Json, Version, answer, find
from pipeline.core.combinations import CLASSIFICATION
from pipeline.core.files import WORK_DIR, read_json, write_text
from pipeline.core.progress import counted
from pipeline.registry.model import RegisteredModel
from pipeline.report.whole import write_version_report
from pipeline.settings import load_params

if TYPE_CHECKING:
    from pipeline.chat.responses import Answer
    from pipeline.cli.serving import Talk

HELP = """/adapter NAME   switch to another model: base, workspace, champion, v3 or a version's id
/adapters       list the loaded models
/system TEXT    set the system message; without TEXT, remove it
/reset          forget the conversation
/quit           end (also Ctrl-D)"""
ANSWERED = ("answer", "cut_off", "error", "reasoning", "tool_calls", "label", "confidence")  # what predict adds
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Maximum number of tokens per answer; default: evaluate.max_new_tokens (auto: prepare.max_length)."
    ),
]


def report(version: Version = None, json_output: Json = False) -> None:
    """Write artifacts/report.html and .md: verdict, scores, tasks, texts, curves and lineage of a version."""
    params, _, target = find(version)
    contents = write_version_report(params.publish, target, Path("artifacts"))
    text = f"report: {contents.verdict}\nreport: artifacts/report.html opens in any browser, "
    text += "artifacts/report.md is the same as text"
    values = {"version": target, "decision": contents.decision, "path": "artifacts/report.html"}
    answer(json_output, values, text)


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
    params = load_params_offline()
    from pipeline.cli.serving import Talk

    if json_output and prompt is None:
        raise CommandError("--json needs --prompt: a conversation is not one object")
    names = list(dict.fromkeys(models or [_name_or_default(None, params, "chat", prompt is not None)]))
    talk = Talk(params, names)
    limit = _limit(params, max_new_tokens)
    messages = [] if system is None else [{"role": "system", "content": system}]
    if prompt is None:
        _converse(talk, limit, messages)
        return
    messages.append({"role": "user", "content": prompt})
    if json_output:
        reply = talk.answer(messages, limit)
        fields = {"model": talk.active} | _fields(reply) | {"tokens": len(reply.ids)}
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

    A line that the model cannot answer, such as one longer than its context, gets an `error` instead of an answer.

    A model trained with train.task sequence-classification gives each line its label and confidence.
    """
    params = load_params_offline()
    from pipeline.cli.serving import load_for_batches, prompt_or_fault, read_prompts
    from pipeline.scoring.classification import classify
    from pipeline.scoring.generation import generate, kept_file
    from pipeline.weights.loading import use_free_cores

    target = output or file.with_name(f"{file.name.removesuffix('.jsonl')}.answers.jsonl")
    rows, size, keep = read_prompts(file), params.evaluate.batch_size, None
    use_free_cores()
    if params.train.task == CLASSIFICATION:
        folder, name = find_classifier(params, model, "predict")
        classes = classify(folder, [messages for _, messages, _ in rows], size)
        results = [{"label": result.label, "confidence": result.confidence} for result in classes]
    else:
        loaded, template, identity = load_for_batches(params, _name_or_default(model, params, "predict"))
        checked = [prompt_or_fault(loaded, template, messages, tools) for _, messages, tools in rows]
        prompts = [prompt for prompt in checked if not isinstance(prompt, str)]
        tools = [tools for (*_, tools), prompt in zip(rows, checked, strict=True) if not isinstance(prompt, str)]
        limit, name = _limit(params, max_new_tokens), identity["model"]
        keep = kept_file(WORK_DIR / "predictions", identity, prompts, limit, template.stop_ids)
        limited_by = "--max-new-tokens" if max_new_tokens else "evaluate.max_new_tokens"
        settings = (limit, size, "predict", name, keep, tools, limited_by)
        answers = iter(generate(loaded, template, prompts, *settings))
        results = [{"error": prompt} if isinstance(prompt, str) else _fields(next(answers)) for prompt in checked]
    asked = [{key: value for key, value in row.items() if key not in ANSWERED} for row, _, _ in rows]
    lines = [row | result | {"model": name} for row, result in zip(asked, results, strict=True)]
    write_text(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if keep is not None:
        keep.unlink(missing_ok=True)
    cut, faults = (sum(bool(result.get(key)) for result in results) for key in ("cut_off", "error"))
    text = f"predict: {counted(len(lines), 'line')} in {target}"
    text += f", {counted(cut, 'answer')} cut off" if cut else ""
    text += f"; {counted(faults, 'line')} not answered, see `error` there" if faults else ""
    answer(json_output, {"model": name, "rows": len(lines), "errors": faults, "path": str(target)}, text)


def classify(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...")],
    model: Annotated[
        str | None,
        typer.Option(help="As for predict, or a merged model's folder; default: the champion.", show_default=False),
    ] = None,
    json_output: Json = False,
) -> None:
    """Print the class and confidence of each TEXT, from a model of train.task sequence-classification."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a merged model is whole
    from pipeline.scoring.classification import classify as classify_texts

    folder, name = Path(as_typed(model or "")), model
    # A folder with the name of a model is written ./champion.
    is_name = model in (None, "champion", WORKSPACE, BASE) or not (folder / "contract.json").is_file()
    if is_name and "/" in (model or ""):
        raise typer.BadParameter(f"{model} has no merged model; expected a folder with contract.json")
    if is_name:
        folder, name = find_classifier(load_params(), model, "classify")
    results = classify_texts(folder, [[{"role": "user", "content": text}] for text in texts])
    labels = read_json(folder / "contract.json")["labels"]
    rows = [
        {"text": text} | asdict(result) | {"probabilities": dict(zip(labels, result.probabilities, strict=True))}
        for text, result in zip(texts, results, strict=True)
    ]
    lines = [f"{row['label']} ({row['confidence']:.3f})  {row['text']}" for row in rows]
    answer(json_output, {"model": name, "texts": rows}, "\n".join(lines))


def _limit(params: Any, option: int | None) -> int:
    """Tokens that an answer may have."""
    limit = params.evaluate.max_new_tokens
    return option or (params.prepare.max_length if limit == "auto" else limit)


def _converse(talk: "Talk", limit: int, messages: list[Any]) -> None:
    """Read questions from standard input and write answers to standard output, until the input ends."""

    def note(text: str) -> None:
        print(f"chat: {text}", file=sys.stderr)

    note(f"{talk.active} answers; /help lists the commands")
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
    fields |= {} if answer.reasoning is None else {"reasoning": printable(answer.reasoning)}
    return fields | ({"tool_calls": list(answer.tool_calls)} if answer.tool_calls else {})


def _name_or_default(model: str | None, params: Any, command: str, say: bool = True) -> str:
    """The named model, else the champion, the workspace's adapter or the base; notes if there is no champion yet."""
    if model or RegisteredModel(params.publish).champion() is not None:
        return model or "champion"
    name = WORKSPACE if Path("artifacts/adapter/contract.json").is_file() else BASE
    if say:
        print(f"{command}: there is no champion yet; {name} answers", file=sys.stderr)
    return name


def find_classifier(params: Any, model: str | None, command: str) -> tuple[Path, str]:
    """Folder and id of the merged model with this name, else of the default."""
    from pipeline.cli.serving import find_folder

    name = _name_or_default(model, params, command)
    if name == BASE:
        raise CommandError("a base model has no classes; name a version, or workspace (`retune run` trains one)")
    return find_folder(params, name, "merged")


COMMANDS: list[Callable[..., None]] = [report, chat, predict, classify]
