"""What an attacker would put into a version, a model, an adapter, a checkpoint or a template, as files.

Everything is generated here: no real malware, only payloads that create the canary file when they run.
"""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

CANARY = "canary-was-here"
_armed: list["Witness"] = []


class Witness:
    """Sees, by Python's audit events, whether code ran, a file was written elsewhere, or a connection was tried."""

    def __init__(self, root: Path) -> None:
        self.root, self.secret, self.seen = root.resolve(), root.resolve() / "secret.txt", list[str]()
        self.allowed = (self.root, Path(os.environ["HF_DATASETS_CACHE"]).parent, Path("/dev"))

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if (
            name
            in (
                "socket.connect",
                "socket.getaddrinfo",
                "os.system",
                "os.exec",
                "os.posix_spawn",
                "webbrowser.open",
            )
            or name == "pickle.find_class"
        ):
            self.seen.append(f"{name} {arguments!r}")
        elif name == "open" and isinstance(arguments[0], str | bytes | Path):
            path = Path(os.fsdecode(arguments[0]))
            if path.name == CANARY or path == self.secret:
                self.seen.append(f"{name} {arguments!r}")
            elif isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                where = Path(os.path.abspath(path))
                if not any(where.is_relative_to(root) for root in self.allowed) and "__pycache__" not in where.parts:
                    self.seen.append(f"written outside: {where}")


def _hook(name: str, arguments: tuple[Any, ...]) -> None:
    for witness in _armed:
        witness.event(name, arguments)


sys.addaudithook(_hook)  # cannot be removed; without an armed witness it does nothing


@contextmanager
def watching(root: Path) -> Iterator[Witness]:
    """A witness of the block, which must end with nothing seen, no canary in `root`, and the environment as it was."""
    witness = Witness(root)
    witness.secret.write_text("the secret of somebody else")
    environment = dict(os.environ)
    _armed.append(witness)
    try:
        yield witness
    finally:  # whatever the block raised: a refusal that comes too late is none
        _armed.remove(witness)
        assert witness.seen == []
        assert not list(root.rglob(CANARY))
        changed = {key for key in os.environ.keys() | environment if os.environ.get(key) != environment.get(key)}
        assert not {key for key in changed if not key.startswith(("PYTEST", "TORCH", "KMP", "ACCELERATE"))}
        assert witness.secret.read_text() == "the secret of somebody else"


class _Reduced:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def objects(canary: Path) -> dict[str, Any]:
    """Objects whose unpickling would run something."""
    return {
        "os.system": _Reduced(os.system, f"touch {canary}"),
        "exec": _Reduced(exec, f"open({str(canary)!r}, 'w')"),
        "eval": _Reduced(eval, f"open({str(canary)!r}, 'w')"),
        "open": _Reduced(open, str(canary), "w"),
        "popen": _Reduced(subprocess.Popen, ["touch", str(canary)]),
        "getattr": _Reduced(getattr, _Reduced(__import__, "os"), "environ"),
        "nested": {"state": [{"deep": (_Reduced(os.system, f"touch {canary}"),)}], "lr": 0.1},
        "class": Witness,
    }


def programs(canary: Path) -> dict[str, bytes]:
    """Bytes that are an archive, a program or a pickle, by kind."""
    bad = objects(canary)["os.system"]
    torch_file = io.BytesIO()
    torch.save({"a": bad}, torch_file)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../" + CANARY, "x")
    return {
        **{f"pickle {protocol}": pickle.dumps(bad, protocol) for protocol in range(6)},
        "torch.save": torch_file.getvalue(),
        "zip": archive.getvalue(),
        "gzip": gzip.compress(b"{}", mtime=0),
        "elf": b"\x7fELF\x02\x01\x01" + b"\0" * 200,
        "windows": b"MZ\x90\0" + b"\0" * 200,
        "mach-o": b"\xcf\xfa\xed\xfe" + b"\0" * 200,
        "script": f"#!/bin/sh\ntouch {canary}\n".encode(),
        "hdf5": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
        "noise": bytes(range(256)) * 4,
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
        "cut header": safetensors(one, b"")[:12],
        "cut data": safetensors(one, b"0000"),
        "bytes after": safetensors(one, b"0" * 8 + b"PK\x03\x04"),
        "overlap": safetensors(one | {"b": tensor([2], 4, 12)}, b"0" * 12),
        "gap": safetensors(one | {"b": tensor([2], 12, 20)}, b"0" * 20),
        "wrong shape": safetensors({"a": tensor([3], 0, 8)}, b"0" * 8),
        "wrong type": safetensors({"a": tensor([2], 0, 8, "F64")}, b"0" * 8),
        "unknown type": safetensors({"a": tensor([2], 0, 8, "PICKLE")}, b"0" * 8),
        "overflow": safetensors({"a": tensor([2**62, 16], 0, 8)}, b"0" * 8),
        "negative": safetensors({"a": tensor([-2], 0, 8)}, b"0" * 8),
        "backwards": safetensors({"a": tensor([2], 8, 0)}, b"0" * 8),
        "huge header": safetensors(one, b"0" * 8, length=2**62),
        "header beyond the limit": safetensors(one, b"0" * 8, length=200_000_000),
        "not json": safetensors(b"os.system('x')", b""),
        "a list": safetensors(b"[]", b""),
        "deep": safetensors(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
        "metadata of objects": safetensors({"__metadata__": {"a": {"b": 1}}}, b""),
    }


def bad_json() -> dict[str, bytes]:
    return {
        "empty": b"",
        "not utf-8": b'{"a": "\xff"}',
        "python": b"{'a': 1}",
        "two values": b"{} {}",
        "repeated key": b'{"auto_map": null, "auto_map": {"AutoModelForCausalLM": "evil.M"}}',
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "digits": b"[" + b"9" * 10_000 + b"]",
        "cut": b'{"a": [1, 2',
        "javascript": b"alert(1)",
        "yaml": b"!!python/object/apply:os.system ['true']",
        "utf-16": '{"a": 1}'.encode("utf-16-le"),
    }


def bad_parquet(folder: Path) -> dict[str, bytes]:
    path = folder / "table.parquet"

    def written(table: pa.Table) -> bytes:
        pq.write_table(table, path)
        return path.read_bytes()

    good = written(pa.table({"a": [1, 2]}))
    # What pyarrow before 14.0.1 unpickled when it read such a file (CVE-2023-47248).
    payload = pickle.dumps(objects(folder / CANARY)["os.system"])
    fields = [
        pa.field(
            "a",
            pa.int64(),
            metadata={b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload},
        )
    ]
    struct_column = pa.array([{"x": 1}], pa.struct([("x", pa.int64())]))
    return {
        "empty": b"",
        "magic alone": b"PAR1PAR1",
        "cut": good[:-9],
        "footer beyond": good[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
        "damaged footer": good[:-30] + b"\xff" * 22 + good[-8:],
        "extension": written(pa.table([pa.array([1])], schema=pa.schema(fields))),
        "uuid": written(
            pa.table({"a": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))})
        ),
        "binary": written(pa.table({"a": [payload]})),
        "struct": written(pa.table({"a": struct_column})),
    }


def bad_text() -> dict[str, bytes]:
    return {"nul": b"a\0b", "not utf-8": b"caf\xe9", "utf-16": "text".encode("utf-16")}


_IN_MERGED = """
    ../../x.json ../config.json ./config.json config.json. con.json additional_chat_templates/con.jinja
    additional_chat_templates/aux.jinja additional_chat_templates/com1.jinja
    additional_chat_templates/lpt9.jinja additional_chat_templates/../../x.jinja
    additional_chat_templates/A.jinja CONFIG.JSON Config.json .hidden.json .git/config.json modeling_evil.py
    tokenization_evil.py custom_generate/generate.py setup.py sitecustomize.py evil.pth pytorch_model.bin
    training_args.bin model.pt model.pkl model.ckpt model.h5 model.npz model.gguf model.so model.dll run.sh
    model.exe model.jar index.html icon.svg requirements.txt Makefile Dockerfile model.safetensors.bin
    model.safetensors.exe pytorch_model.bin.index.json model-1-of-2.safetensors optimizer.pt rng_state.pth
"""
BAD_NAMES = [
    *(f"merged/{name}" for name in _IN_MERGED.split()),
    "../x.json", "merged//config.json", "/etc/config.json", "//server/share/config.json", "~/config.json",
    "~root/.ssh/config.json", "merged\\config.json", "merged\\..\\..\\config.json", "..\\config.json",
    "C:\\config.json", "C:config.json", "\\\\server\\share\\config.json", "merged/config.json\0.safetensors",
    "merged/config\0.json", "merged/config.json\n", "merged/config\n.json", "merged/config.json\r",
    "merged/\x1b[2Jconfig.json", "merged/config.json ", " merged/config.json", "merged/config.json/",
    "merged/config.json::$DATA", "merged/config.json:stream",
    "merged/additional_chat_templates/" + "a" * 65 + ".jinja", "merged/" + "a/" * 200 + "config.json",
    "merged/" + "c" * 300 + ".json", "MERGED/config.json", "merged/ｃonfig.json", "merged/conﬁg.json",
    "merged/confi\u200bg.json", "merged/\u202enosj.gifnoc", "merged/cafe\u0301.json", "merged/café.json",
    "merged/config.jsоn", "merged/%2e%2e/config.json", "merged/..%2fconfig.json", ".git/hooks/post-checkout",
    ".dvc/config", "dvc.yaml", "pipeline/train.py", "adapter/adapter_model.bin", "dataset/train.parquet", "merged",
    "", ".", "..",
]  # fmt: skip

GOOD_NAMES = [
    f"{folder}/{name}"
    for folder, names in {
        "adapter": "README.md adapter_config.json adapter_model.safetensors chat_template.jinja contract.json "
        "loss.csv tokenizer.json tokenizer_config.json training.json",
        "evaluation": "evaluation.json general.adapter.parquet general.base.parquet general.json items.adapter.parquet "
        "items.base.parquet metrics.json prompts.json report.md scores.json",
        "merged": "added_tokens.json additional_chat_templates/rag.jinja additional_chat_templates/tool_use.jinja "
        "config.json generation_config.json merges.txt model-00001-of-00002.safetensors "
        "model-00002-of-00002.safetensors model.safetensors model.safetensors.index.json "
        "sentencepiece.bpe.model special_tokens_map.json spiece.model tokenizer.model vocab.json "
        "vocab.txt",
        "parity": "items.merged.parquet metrics.json parity.json scores.json",
    }.items()
    for name in names.split()
]  # fmt: skip


def good_content(name: str, folder: Path) -> bytes:
    """Sound bytes for a file of that name."""
    path = folder / "made"
    match Path(name).suffix:
        case ".safetensors":
            save_file({"a": torch.zeros(2, dtype=torch.bfloat16), "b.c": torch.ones(1, 3)}, path, {"format": "pt"})
        case ".json":
            path.write_text(json.dumps({"name": "值", "list": [1, 2.5, None], "html": "<script>alert(1)</script>"}))
        case ".parquet":
            columns = {"id": ["a"], "ids": [[1, 2]], "score": [0.5], "right": [None]}
            pq.write_table(pa.table(columns | {"right": pa.array([None], pa.float64())}), path)
        case ".model":
            path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
        case _:
            path.write_text("a,b\n1,2\n# Überschrift <b>{{ x }}</b>\n", encoding="utf-8")
    return path.read_bytes()


# Chat templates that reach for Python, after the Jinja escapes in use.
BAD_TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{{ messages[0]['content'].__class__ }}",
    "{{ (messages|attr('__class__'))|attr('__mro__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ ''['__class__'] }}",
    "{{ '%s'.format.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{% set f = raise_exception.__globals__ %}{{ f['jinja2'] }}",
    "{{ raise_exception.__globals__['__builtins__']['exec']('x') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{% for m in messages %}{{ m.update({'content': 'x'}) }}{% endfor %}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'SECRET' %}",
    "{{ open('SECRET').read() }}",
    "{{ import_module('os') }}",
    "{{ config.__class__.from_envvar('X') }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ range.__class__ }}",
    "{{ tojson.__globals__ }}",
    "{{ (1).__class__.__bases__ }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{% generation %}{{ ''.__class__ }}{% endgeneration %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ dict.__base__ }}",
    "{{ unclosed",
    "{% for %}",
]
