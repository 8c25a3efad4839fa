"""Files that an attacker could put into a version, a model, an adapter, a checkpoint or a template.

All are generated here, without real malware: the payloads only create the canary file when they run.
"""

import io
import json
import os
import pickle
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CANARY = "canary-was-here"
FORBIDDEN = {"socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class"}
_armed: list["Witness"] = []


class Witness:
    """Records forbidden audit events: code that ran, files written elsewhere, attempted connections."""

    def __init__(self, root: Path) -> None:
        self.root, self.secret, self.violations = root.resolve(), root.resolve() / "secret.txt", list[str]()
        self.allowed = (self.root, Path(os.environ["HF_DATASETS_CACHE"]).parent, Path("/dev"))

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in FORBIDDEN:
            self.violations.append(f"{name} {arguments!r}")
        elif name == "open" and isinstance(arguments[0], str | bytes | Path):
            path = Path(os.fsdecode(arguments[0]))
            if path.name == CANARY or path == self.secret:
                self.violations.append(f"{name} {arguments!r}")
            elif isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                full = Path(os.path.abspath(path))
                if not any(full.is_relative_to(root) for root in self.allowed) and "__pycache__" not in full.parts:
                    self.violations.append(f"written outside: {full}")


def _hook(name: str, arguments: tuple[Any, ...]) -> None:
    for witness in _armed:
        witness.event(name, arguments)


sys.addaudithook(_hook)  # cannot be removed; does nothing without a witness


@contextmanager
def watching(root: Path) -> Iterator[Witness]:
    """Fail if the block causes a violation, creates a canary in `root`, or changes the environment."""
    witness = Witness(root)
    witness.secret.write_text("the secret of somebody else")
    environment = dict(os.environ)
    _armed.append(witness)
    try:
        yield witness
    finally:  # also if the block raises, because a refusal can come too late
        _armed.remove(witness)
        assert witness.violations == []
        assert not list(root.rglob(CANARY))
        changed = {key for key in os.environ.keys() | environment if os.environ.get(key) != environment.get(key)}
        assert not {key for key in changed if not key.startswith(("PYTEST", "TORCH", "KMP", "ACCELERATE"))}
        assert witness.secret.read_text() == "the secret of somebody else"


class Payload:
    """An object whose unpickling runs a command."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def programs(canary: Path) -> dict[str, bytes]:
    torch_file = io.BytesIO()
    torch.save({"a": Payload(canary)}, torch_file)
    return {
        "pickle 0": pickle.dumps(Payload(canary), 0),
        "pickle 4": pickle.dumps(Payload(canary), 4),
        "torch.save": torch_file.getvalue(),
        "elf": b"\x7fELF\x02\x01\x01" + b"\0" * 200,
    }


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def bad_safetensors() -> dict[str, bytes]:
    one = {"a": tensor([2], 0, 8)}
    return {
        "empty": b"",
        "cut data": safetensors(one, b"0000"),
        "bytes after": safetensors(one, b"0" * 8 + b"PK\x03\x04"),
        "overlap": safetensors(one | {"b": tensor([2], 4, 12)}, b"0" * 12),
        "huge header": safetensors(one, b"0" * 8, length=2**62),
        "not json": safetensors(b"os.system('x')", b""),
    }


def bad_json() -> dict[str, bytes]:
    return {
        "empty": b"",
        "not utf-8": b'{"a": "\xff"}',
        "repeated key": b'{"auto_map": null, "auto_map": {"AutoModelForCausalLM": "evil.M"}}',
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "utf-16": '{"a": 1}'.encode("utf-16-le"),
    }


_IN_MERGED = """
    ../../x.json ./config.json con.json additional_chat_templates/aux.jinja additional_chat_templates/../../x.jinja
    CONFIG.JSON .hidden.json modeling_evil.py custom_generate/generate.py evil.pth pytorch_model.bin training_args.bin
    model.pkl model.gguf model.so index.html Makefile model.safetensors.exe pytorch_model.bin.index.json optimizer.pt
"""
BAD_NAMES = [
    *(f"merged/{name}" for name in _IN_MERGED.split()),
    "../x.json", "merged//config.json", "/etc/config.json", "~/config.json", "merged\\config.json", "C:\\config.json",
    "\\\\server\\share\\config.json", "merged/config.json\0.safetensors", "merged/config.json\n", "merged/config.json ",
    "merged/config.json:stream", "merged/" + "c" * 300 + ".json", "merged/ｃonfig.json", "merged/confi\u200bg.json",
    "merged/%2e%2e/config.json", ".git/hooks/post-checkout", ".dvc/config", "dataset/train.parquet", "merged", "",
]  # fmt: skip

# Chat templates that try to escape from Jinja's sandbox, by known techniques.
BAD_TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ (messages|attr('__class__'))|attr('__mro__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ ''['__class__'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ raise_exception.__globals__['__builtins__']['exec']('x') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{% for m in messages %}{{ m.update({'content': 'x'}) }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'SECRET' %}",
    "{{ open('SECRET').read() }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{% generation %}{{ ''.__class__ }}{% endgeneration %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ unclosed",
]
