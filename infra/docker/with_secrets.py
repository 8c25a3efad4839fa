"""Starts a command with secrets in its environment: replaces `{secret:NAME}` by the content of /run/secrets/NAME.

`with_secrets.py [TEMPLATE:TARGET …] -- COMMAND…`; template files are filled in the same way. So no secret appears in
compose.yaml, in an image, on a command line or in the output of `docker inspect`. A missing or empty secret is an
error.
"""

import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

NAMED = re.compile(r"\{secret:(\w+)\}")


def filled(text: str, folder: Path) -> str:
    """`text` with its secrets in place; within a URL (after "://") they are quoted."""

    def secret(match: re.Match[str]) -> str:
        path = folder / match[1]
        try:
            value = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            sys.exit(f"the secret {match[1]} cannot be read: {error}; `python infra/make_secrets.py` creates it")
        if not value:
            sys.exit(f"the secret {match[1]} is empty ({path})")
        line = match.string[match.string.rfind("\n", 0, match.start()) + 1 : match.start()]
        return quote(value, safe="") if "://" in line else value

    return NAMED.sub(secret, text)


def main(arguments: list[str], folder: Path) -> None:
    if "--" not in arguments or arguments[-1] == "--":
        sys.exit("usage: with_secrets.py [TEMPLATE:TARGET …] -- COMMAND…")
    at = arguments.index("--")
    environment = {name: filled(value, folder) for name, value in os.environ.items()}
    for pair in arguments[:at]:
        template, _, target = pair.partition(":")
        text = filled(Path(template).read_text(encoding="utf-8"), folder)
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    os.execvpe(arguments[at + 1], arguments[at + 1 :], environment)


if __name__ == "__main__":
    main(sys.argv[1:], Path(os.environ.get("RETUNE_SECRETS", "/run/secrets")))
