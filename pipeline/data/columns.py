"""Column mappings (`--columns`, `ingest.columns`), and the columns that a format does not read."""

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from pipeline.data.readers import FormatError
from pipeline.params import ColumnsParams

MEDIA = frozenset(name + s for name in ("image", "audio", "video") for s in ("", "s"))
UNPAIRED = frozenset(("label", "kto_tag"))  # TRL and LLaMA-Factory: whether an answer is a good one
# Common parts of column names, the likeliest first.
PROMPT_NAMES = ("question", "prompt", "query", "instruction", "request", "user", "human", "input", "title", "source")
CONTEXT_NAMES = ("context", "passage", "document", "paragraph", "background", "evidence", "input")
ANSWER_NAMES = (
    "answer", "response", "completion", "output", "reply", "assistant", "target", "summary", "solution", "label"
)  # fmt: skip
NOT_TEXT = re.compile(r"(^|_)(uu)?(id|date|time|url|lang|language)$", re.IGNORECASE)
MAPPED = ("columns", "classification")  # formats for which the mapping or the task says which columns count


def named_columns(columns: ColumnsParams) -> list[str]:
    """The columns that a mapping names."""
    names = [value for key, value in columns.model_dump().items() if key != "template" and value is not None]
    return names + [name for _, name, _, _ in string.Formatter().parse(columns.template or "") if name]


def note_unread(record: dict[str, Any], format: str, reads: frozenset[str], unused: set[str]) -> None:
    """Add the columns of `record` that its format does not read to `unused`; refuse media and unpaired labels."""
    unread = {key for key in record.keys() - reads if record[key] is not None and record[key] not in ("", [])}
    for key in sorted(unread) if format not in MAPPED else ():
        if key in UNPAIRED and str(record[key]).lower() in ("true", "false"):
            raise ValueError(
                f"has a column {key} that marks good and bad answers (unpaired preference data), and bad ones would be "
                f"trained too; keep only the records with true, and remove the column {key}"
            )
        if key in MEDIA:
            raise ValueError(
                f"has {key}, and only text can be trained on; leave such records out. If the text is enough, remove "
                f"the column {key} and marks such as <image>"
            )
    unused |= unread


def guess_columns(records: Iterable[Any]) -> ColumnsParams | None:
    """A likely mapping, by the names of text columns, else by their lengths; None for fewer than two text columns."""
    lengths = Counter[str]()  # column → characters
    for record in records:
        for key, value in record.items() if isinstance(record, dict) else ():
            if isinstance(value, str) and value.strip() and not NOT_TEXT.search(key):
                lengths[key] += len(value.rstrip())
    if len(lengths) < 2:
        return None
    names = sorted(lengths, key=lengths.__getitem__)[::-1]  # if lengths are equal, the last column is the answer

    def take(parts: Iterable[str]) -> str | None:
        name = next((name for part in parts for name in names if part in name.lower()), None)
        names[:] = [other for other in names if other != name]
        return name

    response, prompt = take(ANSWER_NAMES), take(PROMPT_NAMES)
    response = response or names.pop(0)
    prompt = prompt or names.pop(0)
    if (context := take(CONTEXT_NAMES)) is None:
        return ColumnsParams(prompt=prompt, response=response)
    has_brace = re.search("[{}]", prompt + context)
    return None if has_brace else ColumnsParams(template=f"{{{prompt}}}\n{{{context}}}", response=response)


def correct_columns(columns: ColumnsParams, names: list[str]) -> ColumnsParams | None:
    """`columns` with the nearest of `names` for each column that is not one of them; None if one has none."""
    mapping = columns.model_dump(exclude_none=True)
    for missing in sorted(set(named_columns(columns)).difference(names)):
        free = {name.casefold(): name for name in names if name not in mapping.values()}
        near = difflib.get_close_matches(missing.casefold(), [*free], 1)
        if not near:
            return None
        right = free[near[0]]
        mapping = {role: right if value == missing else value for role, value in mapping.items()}
        if "template" in mapping:
            mapping["template"] = mapping["template"].replace(f"{{{missing}}}", f"{{{right}}}")
    return ColumnsParams(**mapping)


def format_columns(columns: ColumnsParams) -> str:
    """The text that `parse_columns` turns into `columns`."""
    text = ",".join(f"{key}={value}" for key, value in columns.model_dump(exclude_none=True).items())
    return text.replace("\n", "\\n")


def parse_columns(text: str) -> ColumnsParams:
    """The mapping in `text`, such as `prompt=question,response=answer`; \\n in a template is a line break."""
    keys = "|".join(ColumnsParams.model_fields)
    parts = re.split(rf"(?:^|,)\s*({keys})\s*=", text)
    pairs = dict(zip(parts[1::2], (part.strip().replace("\\n", "\n") for part in parts[2::2]), strict=True))
    if parts[0].strip() or not pairs or not all(pairs.values()):
        raise FormatError(
            f"--columns is {text!r}; expected KEY=COLUMN pairs with commas between them, such as "
            f"prompt=question,response=answer; the keys are {', '.join(ColumnsParams.model_fields)}"
        )
    try:
        return ColumnsParams.model_validate(pairs)
    except ValidationError as error:
        reasons = "; ".join(str(details["ctx"]["error"]) for details in error.errors())
        raise FormatError(f"--columns is {text!r}; {reasons}") from None
