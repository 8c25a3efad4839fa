"""Changes to `params.yaml` asked for from elsewhere: checked as a whole first, comments kept, or nothing is written."""

import json
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.files import write_text
from pipeline.params import ParamsError, load_params

_VALUE = re.compile(r"(.*?)(\s+#.*)?")


def change_params(changes: dict[str, Any], path: Path = Path("params.yaml")) -> None:
    """Write `changes`, such as {"train.lora_r": 32}, into the file at `path`.

    Raises:
        ParamsError: a key is not in the file, or the whole would not be valid; the file is as it was.
    """
    text = path.read_text(encoding="utf-8")
    for key, value in changes.items():
        *sections, last = key.split(".")
        node: Any = YAML(typ="rt").load(text)
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ParamsError(f"{key} is not a parameter of {path}; expected a name such as train.lora_r")
        line, column = node.lc.value(last)  # type: ignore[attr-defined]  # ruamel gives its dictionaries positions
        if line != node.lc.key(last)[0]:  # type: ignore[attr-defined]
            raise ParamsError(f"{key} spans several lines of {path}; change it there by hand, or one key in it")
        lines = text.split("\n")
        old, comment = _VALUE.fullmatch(lines[line][column:]).groups()  # type: ignore[union-attr]  # it takes any line
        new = json.dumps(value, ensure_ascii=False).ljust(len(old) if comment else 0)
        lines[line] = lines[line][:column] + new + (comment or "")
        text = "\n".join(lines)
    checked = path.with_name(f".{path.name}.checked")
    write_text(checked, text)
    try:
        load_params(checked)
    except ParamsError as error:
        raise ParamsError(str(error).replace(checked.name, path.name)) from None
    finally:
        checked.unlink()
    write_text(path, text)
