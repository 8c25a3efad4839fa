"""Reads `params.yaml` into `Params`, and writes the changes of a form or a preset into it.

A change is validated first and keeps the file's comments. Errors name key, value and line. Passwords are refused too.
"""

import difflib
import io
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import CommentMark, YAMLError
from ruamel.yaml.tokens import CommentToken

from pipeline.core.files import conflict_line, write_text
from pipeline.core.redaction import has_credentials, redact
from pipeline.params import IN_WORDS, Params


class ParamsError(ValueError):
    """`params.yaml` is invalid; the message names key, line and what was expected."""


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate `path`. Raises ParamsError: a sentence for each key that is missing, unknown or wrong."""
    try:
        return _parse(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ParamsError(f"{Path.cwd()} is not in a Retune project: there is no {path} here or above") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 (byte {error.start})") from None


def change_params(changes: dict[str, Any], path: Path = Path("params.yaml")) -> None:
    """Write `changes`, such as {"train.lora_r": 32}, into `path`; comments stay. May raise ParamsError."""
    text = path.read_text(encoding="utf-8")
    _parse(text, path)
    yaml = _yaml()
    tree: Any = yaml.load(text)
    for key, value in changes.items():
        *sections, last = key.split(".")
        node: Any = tree
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ParamsError(f"{key} is not a parameter of {path}; expected a name such as train.lora_r")
        old = node[last]
        if isinstance(old, dict) and isinstance(value, dict) and old.keys() == value.keys():
            old.update(value)  # each on its own line, as before
            continue
        node[last] = yaml.load(yaml_text(value))  # on one line
        if lines := _lines_after(old):
            comments = node.ca.items.setdefault(last, [None] * 4)  # type: ignore[attr-defined]  # ruamel's
            comments[2] = comments[2] or CommentToken("\n", CommentMark(0))
            comments[2].value += lines
    stream = io.StringIO()
    yaml.dump(tree, stream)
    _parse(stream.getvalue(), path)
    write_text(path, stream.getvalue())


def _lines_after(block: Any) -> str:
    """Comments and empty lines below a block; ruamel attaches them to its last value."""
    if not hasattr(block, "fa") or not block or block.fa.flow_style():
        return ""
    last, column = (list(block)[-1], 2) if isinstance(block, dict) else (len(block) - 1, 0)
    token = (block.ca.items.get(last) or [None] * 4)[column]
    return _lines_after(block[last]) + (token.value.partition("\n")[2] if token else "")


def yaml_text(value: Any) -> str:
    """`value` as one line of YAML."""
    yaml: Any = YAML(typ="safe", pure=True)
    stream = io.StringIO()
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = True, 2**16, True
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(value, stream)
    return stream.getvalue().removesuffix("...\n").strip()


def _yaml() -> Any:
    """A YAML reader and writer that keeps comments and layout."""
    yaml = YAML(typ="rt")
    yaml.preserve_quotes, yaml.width = True, 2**16
    yaml.representer.add_representer(type(None), lambda of, _: of.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def _parse(text: str, path: Path) -> Params:
    try:
        tree: Any = _yaml().load(text)
    except YAMLError as error:
        if line := conflict_line(path):
            raise ParamsError(f"{path}, line {line}, has git's conflict markers; resolve the conflict") from None
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ParamsError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} has no sections; expected the keys ingest, prepare, train, …")
    _refuse_credentials(tree, path)
    try:
        return Params.model_validate(_plain(tree))
    except ValidationError as error:
        # Unknown keys first, because an unknown key is often the missing one, misspelt.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ParamsError(redact("\n".join(_sentence(e, tree, path) for e in errors))) from None


def _plain(node: Any) -> Any:
    """ruamel's round-trip nodes as the plain Python values that strict validation requires."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    return next((kind(node) for kind in (bool, int, float, str) if isinstance(node, kind)), node)


def _refuse_credentials(tree: Any, path: Path, above: str = "") -> None:
    """Refuse secrets: params.yaml is committed, and its values go to logs, dvc.lock and manifests."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        name = f"{above}[{key}]" if isinstance(tree, list) else f"{above}.{key}".lstrip(".")
        if isinstance(value, dict | list):
            _refuse_credentials(value, path, name)
        elif isinstance(value, str) and has_credentials(value):
            line = (tree.lc.item(key) if isinstance(tree, list) else tree.lc.key(key))[0] + 1  # type: ignore[attr-defined]
            raise ParamsError(
                f"{name} holds a password or key ({path}, line {line}); remove it, and revoke it if it was "
                "committed: credentials come from the environment, an AWS profile or a role"
            )


def _sentence(error: Any, tree: Any, path: Path) -> str:
    # pydantic's location also has union branches ("str", "literal[...]"); only the file's keys are shown.
    keys: list[str] = []
    node: Any = tree
    for part in error["loc"]:
        if not isinstance(node, dict) or not (part in node or error["type"] == "missing"):
            break
        keys.append(str(part))
        node = node.get(part)
    key, where = ".".join(keys), _location(keys, tree, path)
    match error["type"]:
        case "extra_forbidden":
            fields: dict[str, Any] = Params.model_fields
            for section in keys[:-1]:
                fields = getattr(fields[section].annotation, "model_fields", {})
            near = difflib.get_close_matches(keys[-1], [*fields], 1)
            hint = f"did you mean {near[0]}?" if near else "remove it or correct its spelling"
            return f"{key} is not a parameter{where}; {hint}"
        case "missing":
            return f"{key} is missing{where}; no parameter has a default, copy it from the project's params.yaml"
        case "value_error":
            return "\n".join(_with_line(line, tree, path, where) for line in str(error["ctx"]["error"]).split("\n"))
    value = "null" if node is None else repr(node)
    fault, message = f"{key} is {value}", error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "string_pattern_mismatch":
        message = f"expected {IN_WORDS.get(error['ctx']['pattern'], message)}"
    if error["loc"][-1] == "[key]":
        fault = f"{'.'.join(keys[:-1])} has the key {keys[-1]}"
    return f"{fault}; {message}{where}"


def _with_line(sentence: str, tree: Any, path: Path, where: str) -> str:
    """Add the line of the parameter at its start to `sentence`, else `where`; nothing after a command."""
    parameter = re.match(r"(\w+)\.(\w+) ", sentence)
    if parameter and parameter[2] in (tree.get(parameter[1]) or {}):
        return sentence + _location([parameter[1], parameter[2]], tree, path)
    return sentence if sentence.startswith("`") else sentence + where


def _location(keys: list[str], node: Any, path: Path) -> str:
    """The file, and the line of the last of `keys` that is in it."""
    line = None
    for key in keys:
        if not isinstance(node, dict) or key not in node:
            break
        line, node = node.lc.key(key)[0] + 1, node[key]  # type: ignore[attr-defined]  # ruamel's dict
    return f" ({path}, line {line})" if line else f" ({path})"
