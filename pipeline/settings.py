"""The file `params.yaml`: read into `Params`, and changed where a form or a preset asks for it.

A change is checked first and keeps the file's comments. Unknown keys, wrong types, values out of range, combinations
that cannot work and passwords are refused with key, value and line.
"""

import difflib
import io
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.core.files import conflict_line, write_text
from pipeline.core.redaction import has_credentials, redact
from pipeline.params import Params

_VALUE = re.compile(r"(.*?)(\s+#.*)?")


class ParamsError(ValueError):
    """`params.yaml` cannot be used; the message names key, line and what was expected."""


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check every section of `path`.

    Raises:
        ParamsError: one sentence for each key that is missing, unknown, of the wrong type or out of range.
    """
    try:
        return _checked(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist here or above: {Path.cwd()} is not in a Retune project") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 (byte {error.start})") from None


def change_params(changes: dict[str, Any], path: Path = Path("params.yaml")) -> None:
    """Write `changes`, such as {"train.lora_r": 32}, into the file at `path`.

    Raises:
        ParamsError: a key is not in the file, or the whole would not be valid; the file is as it was.
    """
    text = path.read_text(encoding="utf-8")
    for key, value in changes.items():
        text = _changed(text, key, value, path)
    _checked(text, path)
    write_text(path, text)


def _checked(text: str, path: Path) -> Params:
    try:
        tree: Any = YAML(typ="rt").load(text)
    except YAMLError as error:
        if line := conflict_line(path):
            raise ParamsError(f"{path}, line {line}, has git's conflict markers; settle the conflict there") from None
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ParamsError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} holds no sections; expected ingest, prepare, train, … as its keys")
    _refuse_credentials(tree, path)
    try:
        return Params.model_validate(_plain(tree))
    except ValidationError as error:
        # An unknown key is often the missing one misspelt: it comes first.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ParamsError(redact("\n".join(_sentence(e, tree, path) for e in errors))) from None


def yaml_text(value: Any) -> str:
    """`value` as it stands in one line of YAML."""
    yaml: Any = YAML(typ="safe", pure=True)
    stream = io.StringIO()
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = True, 2**16, True
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(value, stream)
    return stream.getvalue().removesuffix("...\n").strip()


def _changed(text: str, key: str, value: Any, path: Path) -> str:
    """`text` with another value for `key`: one line differs, or the lines of a block if it is one."""
    *sections, last = key.split(".")
    node: Any = YAML(typ="rt").load(text)
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise ParamsError(f"{key} is not a parameter of {path}; expected a name such as train.lora_r")
    old: Any = node[last]
    keys: Any = node.lc  # type: ignore[attr-defined]  # ruamel gives its dictionaries positions
    block = hasattr(old, "fa") and not old.fa.flow_style()
    if block and isinstance(old, dict) and isinstance(value, dict) and value.keys() == old.keys():
        for inner in value:
            text = _changed(text, f"{key}.{inner}", value[inner], path)
        return text
    lines = text.split("\n")
    first, (start, column) = keys.key(last)[0], keys.value(last)
    if start != first:  # below its key
        if not block:
            raise ParamsError(f"{key} spans several lines of {path}; change it there by hand, or one key in it")
        del lines[start : _last_line(old) + 1]
        column = lines[first].index(":", keys.key(last)[1]) + 2
        lines[first] = lines[first].replace(":", ": ", 1)
    before, comment = _VALUE.fullmatch(lines[first][column:]).groups()  # type: ignore[union-attr]  # it takes any line
    new = yaml_text(value).ljust(len(before) if comment else 0)
    lines[first] = lines[first][:column] + new + (comment or "")
    return "\n".join(lines)


def _last_line(block: Any) -> int:
    """Of a mapping or list written as a block."""
    positions = block.lc
    where = positions.value if isinstance(block, dict) else positions.item
    return max(
        _last_line(inner) if isinstance(inner, dict | list) and inner else where(key)[0]
        for key, inner in (block.items() if isinstance(block, dict) else enumerate(block))
    )


def _refuse_credentials(tree: Any, path: Path, above: str = "") -> None:
    """params.yaml is committed, and its values go to logs, dvc.lock and manifests: no place for a secret."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        name = f"{above}[{key}]" if isinstance(tree, list) else f"{above}.{key}".lstrip(".")
        if isinstance(value, dict | list):
            _refuse_credentials(value, path, name)
        elif isinstance(value, str) and has_credentials(value):
            line = (tree.lc.item(key) if isinstance(tree, list) else tree.lc.key(key))[0] + 1  # type: ignore[attr-defined]
            raise ParamsError(
                f"{name} holds a password or key ({path}, line {line}); take it out, and change it if it was "
                "committed: credentials come from the environment, an AWS profile or a role"
            )


def _plain(node: Any) -> Any:
    """ruamel's round-trip nodes as plain Python values, which strict validation insists on."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _sentence(error: Any, tree: Any, path: Path) -> str:
    # Union branches ("str", "literal[...]") end up in pydantic's location; only real keys have a line.
    keys: list[str] = []
    line: int | None = None
    node: Any = tree
    for key in error["loc"]:
        if isinstance(node, dict) and key in node:
            line = node.lc.key(key)[0] + 1  # type: ignore[attr-defined]  # ruamel gives its dictionaries positions
            node = node[key]
        elif (isinstance(node, dict) and error["type"] != "missing") or not isinstance(node, dict):
            break
        keys.append(str(key))
    key = ".".join(keys)
    where = f" ({path}, line {line})" if line else f" ({path})"
    match error["type"]:
        case "extra_forbidden":
            known: dict[str, Any] = Params.model_fields
            for section in keys[:-1]:
                known = getattr(known[section].annotation, "model_fields", {})
            near = difflib.get_close_matches(keys[-1], [*known], 1)
            hint = f"did you mean {near[0]}?" if near else "remove it or correct its spelling"
            return f"{key} is not a parameter{where}; {hint}"
        case "missing":
            return f"{key} is missing{where}; every parameter is written out, copy it from the project's params.yaml"
        case "value_error":
            return "\n".join(f"{s}{_line_of(s, tree, path, where)}" for s in str(error["ctx"]["error"]).split("\n"))
    got = "null" if node is None else repr(node)
    return f"{key} is {got}; {error['msg'][0].lower()}{error['msg'][1:]}{where}"


def _line_of(sentence: str, tree: Any, path: Path, where: str) -> str:
    """The place of the parameter that `sentence` begins with; `where` if there is none, nothing after a command."""
    named = re.match(r"(\w+)\.(\w+) ", sentence)
    if named and isinstance(tree.get(named[1]), dict) and named[2] in tree[named[1]]:
        return f" ({path}, line {tree[named[1]].lc.key(named[2])[0] + 1})"
    return "" if sentence.startswith("`") else where
