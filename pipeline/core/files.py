"""Writing files atomically, reading JSON strictly, and SHA-256 digests."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.core.processes import identity, lives

WORK_DIR = Path(".retune")  # git-ignored: Prefect database, logs, checkpoints, timings; may be deleted between runs
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to `target` that replaces it when the block ends without an error.

    Else nothing changes. Of several processes the last wins; leftovers of killed ones are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if not lives(left.name.split(".", 2)[2].removesuffix(".partial")):
            shutil.rmtree(left, ignore_errors=True)
    partial = target.with_name(f".{target.name}.{identity()}.partial")
    try:
        with _blaming(target, partial):
            partial.mkdir()
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not target.exists():
        with suppress(OSError):  # another process was quicker
            partial.rename(target)
            return
    _exchange(partial, target)
    shutil.rmtree(partial)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, atomically on Linux; elsewhere a kill between the two renames leaves no `old`."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):  # the kernel or file system cannot exchange
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    aside = new.with_name(f"{new.name}.aside")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _blaming(path, partial):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


@contextmanager
def _blaming(target: Path, partial: Path) -> Iterator[None]:
    """An error names `target`, not the `partial` that would have replaced it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL_DISK:
            error.filename = str(target)
        elif isinstance(error.filename, str):
            error.filename = error.filename.replace(str(partial), str(target))
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def conflict_line(path: Path) -> int | None:
    """Number of the first line with git's conflict markers, counted from 1; None without any."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return next((number for number, line in enumerate(lines, 1) if line.startswith("<<<<<<< ")), None)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_of_living(path: Path) -> dict[str, Any]:
    """The JSON object at `path` if the process that it names as `process` still runs, else {}."""
    with suppress(OSError, ValueError):
        record = read_json(path)
        return record if lives(record.get("process")) else {}
    return {}


class KeyTwiceError(ValueError):
    """JSON with a repeated key; readers differ in which value they take."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} comes twice")
        self.key = key


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`, for `object_pairs_hook` of `json.loads`. Raises KeyTwiceError at a repeated key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyTwiceError(next(key for key in keys if keys.count(key) > 1))
    return value


def strict_json(data: bytes) -> Any:
    """JSON without repeated keys, so that every reader sees the value that was checked."""
    try:
        return json.loads(data.decode(), object_pairs_hook=unique_keys)  # json alone would guess UTF-16 and 32
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of `value` as canonical JSON: sorted keys, no spaces, UTF-8."""
    return hashlib.sha256(CANONICAL.encode(value).encode()).hexdigest()
