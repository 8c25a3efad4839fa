"""Which columns a format reads, what the columns that it does not read may mean, and what unknown columns could be.

A column that says something and is not read is noted by its name; one that changes what the others mean is refused.
"""

import difflib
import json
import re
import shlex
import string
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from pipeline.params import ColumnsParams

SHARD_COLUMNS = ("source", "messages", "tools", "task", "group", "scoring", "repairs")  # what `retune ingest` writes
CONVERSATIONS = ("messages", "conversations", "conversation")  # the first of them that a record has is read
PAIRS = (("question", "answer"), ("prompt", "response"), ("query", "response"), ("question", "response"))
TURN_PAIRS = (("human", "assistant"), ("input", "output"))  # question and answer in one object
MEDIA = frozenset(name + s for name in ("image", "audio", "video") for s in ("", "s"))
UNPAIRED = frozenset(("label", "kto_tag"))  # of TRL and LLaMA-Factory: whether an answer is a good one
# Parts of the names that columns have elsewhere, the likeliest first.
PROMPT_NAMES = ("question", "prompt", "query", "instruction", "request", "user", "human", "input", "title", "source")
ANSWER_NAMES = ("answer", "response", "completion", "output", "reply", "assistant", "target", "summary", "solution")
CONTEXT_NAMES = ("context", "passage", "document", "paragraph", "background", "evidence", "input")
NOT_TEXT = re.compile(r"(^|_)(uu)?(id|date|time|url|lang|language)$", re.IGNORECASE)
LETTERS = re.compile(r"[^\W\d_]{2}|[\u2e80-\U0003ffff]")  # two of them, or one that is a word
WORDS_OF_YAML = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")


class ColumnsError(ValueError):
    """A mapping of columns on the command line cannot be used; the message says why."""


def named_columns(columns: ColumnsParams) -> list[str]:
    """The columns that a mapping names."""
    names = [value for key, value in columns.model_dump().items() if key != "template" and value is not None]
    return names + [name for _, name, _, _ in string.Formatter().parse(columns.template or "") if name]


def note_unread(record: dict[str, Any], others: set[str], mapped: bool, unused: set[str]) -> None:
    """Note the columns of `record` that its format does not read; refuse those that change what the others mean.

    Args:
        mapped: a person said which columns count, so that none of the others changes the meaning.
    """
    said = {key for key in others if record[key] is not None and record[key] != "" and record[key] != []}
    if not mapped:
        for key in sorted(said & UNPAIRED):
            if isinstance(record[key], bool) or str(record[key]).lower() in ("true", "false"):
                raise ValueError(
                    f"says in {key} whether its answer is a good one (unpaired preference data), and bad ones would be "
                    f"trained too; keep the records with true in a file without the column {key}"
                )
        for key in sorted(said & MEDIA):
            raise ValueError(
                f"has {key}, and only text can be trained on; leave such records out, or remove the column {key} and "
                "the marks such as <image> where the text says enough"
            )
    unused |= said


def has_context(record: dict[str, Any]) -> bool:
    """Whether a question seems to be about a text in a column of its own."""
    return any(record.get(name) for name in CONTEXT_NAMES)


def guess_columns(records: Iterable[Any]) -> ColumnsParams | None:
    """A mapping that could be meant: by the names of text columns, else by question marks, repetition and lengths."""
    texts: dict[str, list[str]] = {}
    for record in records:
        for key, value in record.items() if isinstance(record, dict) else ():
            if isinstance(value, str) and value.strip() and not NOT_TEXT.search(key):
                texts.setdefault(key, []).append(value)
    worded = {key: values for key, values in texts.items() if any(map(LETTERS.search, values))}
    texts = worded if len(worded) > 1 else texts  # numbers and dates in a CSV are texts too
    if len(texts) < 2:
        return None
    by_length = [*reversed(texts)]  # of equal ones the last is the likelier answer
    by_length.sort(key=lambda key: -sum(map(len, texts[key])) / len(texts[key]))
    asking = [
        key for key in by_length if 2 * sum(text.rstrip()[-1] in "?\uff1f" for text in texts[key]) > len(texts[key])
    ]
    unlike = [key for key in by_length if key not in asking and _named_like([key], PROMPT_NAMES) is None]
    repeated = [key for key in texts if 2 * len(set(texts[key])) <= len(texts[key])]  # labels, as in classification
    if len(texts) == 2 and len(repeated) == 1:
        unlike = repeated
    response = _named_like(texts, ANSWER_NAMES) or (unlike or by_length)[0]
    others = [key for key in texts if key != response]
    prompt = _named_like(others, PROMPT_NAMES) or next(key for key in (*asking, *by_length) if key != response)
    context = _named_like([key for key in others if key != prompt], CONTEXT_NAMES)
    if context is None:
        return ColumnsParams(prompt=prompt, response=response)
    if any(brace in prompt + context for brace in "{}"):
        return None
    return ColumnsParams(template=f"{{{prompt}}}\n{{{context}}}", response=response)


def corrected(columns: ColumnsParams, seen: Iterable[str]) -> ColumnsParams | None:
    """`columns` with names that are not in `seen` replaced by those they are most like; None where one is like none."""
    alike = {name.casefold(): name for name in seen}
    changes: dict[str, str] = {}
    for key, name in columns.model_dump(exclude={"template"}, exclude_none=True).items():
        near = difflib.get_close_matches(name.casefold(), [*alike], 1)
        if not near:
            return None
        changes[key] = name if name in alike.values() else alike[near[0]]
    fixed = columns.model_copy(update=changes)
    return fixed if set(named_columns(fixed)) <= set(alike.values()) else None


def as_yaml(columns: ColumnsParams) -> str:
    """The value of `ingest.columns` in params.yaml."""
    parts = columns.model_dump(exclude_none=True).items()

    def is_plain(value: str) -> bool:
        return re.fullmatch(r"[^\W\d][\w-]*", value) is not None and value.lower() not in WORDS_OF_YAML

    values = [f"{key}: {value if is_plain(value) else json.dumps(value, ensure_ascii=False)}" for key, value in parts]
    return f"{{{', '.join(values)}}}"


def as_pairs(columns: ColumnsParams) -> str:
    """What `parse_columns` reads."""
    text = ",".join(f"{key}={value}" for key, value in columns.model_dump(exclude_none=True).items())
    return text.replace("\n", "\\n")


def as_option(columns: ColumnsParams) -> str:
    """The value of `--columns`, as a shell takes it."""
    return shlex.quote(as_pairs(columns))


def parse_columns(text: str) -> ColumnsParams:
    """A mapping from the command line, such as `prompt=question,response=answer`; \\n in a template is a line's end.

    Raises:
        ColumnsError: a part is not KEY=COLUMN, or the mapping cannot work.
    """
    keys = "|".join(ColumnsParams.model_fields)
    parts = re.split(rf"(?:^|,)\s*({keys})\s*=", text)
    pairs = dict(zip(parts[1::2], (part.strip().replace("\\n", "\n") for part in parts[2::2]), strict=True))
    if parts[0].strip() or not pairs or not all(pairs.values()):
        raise ColumnsError(
            f"--columns is {text!r}; expected KEY=COLUMN with commas between, such as prompt=question,response=answer; "
            f"the keys are {', '.join(ColumnsParams.model_fields)}"
        )
    try:
        return ColumnsParams.model_validate(pairs)
    except ValidationError as error:
        faults = "; ".join(str(each["ctx"]["error"]) for each in error.errors())
        raise ColumnsError(f"--columns is {text!r}; {faults}") from None


def _named_like(keys: Iterable[str], names: Iterable[str]) -> str | None:
    keys = list(keys)
    return next((key for name in names for key in keys if name in key.lower()), None)
