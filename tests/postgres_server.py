"""A real PostgreSQL on loopback: a cluster in a folder of its own, which goes when the server ends, and that with us.

`start(owners)` takes each database's owner, of the same name, with a password, and yields the port. The server does
not run as root: for root it runs as `postgres`, or else `nobody`, in a folder of theirs.
"""

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from swift_server import free_ports

AS_ANOTHER_USER = """
import os, signal, sys
from pipeline.core.processes import end_with_parent
uid, gid, *command = sys.argv[1:]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(int(gid))
    os.setuid(int(uid))
os.chdir("/")
end_with_parent(signal.SIGQUIT)  # PostgreSQL's own "at once"; a change of user would have cleared it
os.execv(command[0], command)
"""


def binaries() -> Path | None:
    """The folder with `initdb` and `postgres`, the newest of several; None where PostgreSQL is not installed."""
    known = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    initdb = shutil.which("initdb")
    places = [*([Path(initdb).resolve().parent] if initdb else []), *reversed(known)]
    return next((each for each in places if (each / "initdb").exists() and (each / "postgres").exists()), None)


@contextmanager
def start(owners: Mapping[str, str]) -> Iterator[int]:
    place = binaries()
    assert place is not None
    folder = Path(tempfile.mkdtemp(prefix="retune-postgres-"))  # pytest's own folders are closed to other users
    server = None
    try:
        (folder / "password").write_text("postgres\n")
        user = _user()
        if os.getuid() == 0:
            for path in (folder, folder / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)
        as_user = [sys.executable, "-c", AS_ANOTHER_USER, str(user.pw_uid), str(user.pw_gid)]
        options = ["--username=postgres", f"--pwfile={folder}/password", "--auth=scram-sha-256", "--data-checksums"]
        options += ["--no-sync", "--no-locale", "--encoding=UTF8", f"--pgdata={folder}/data"]
        made = subprocess.run([*as_user, str(place / "initdb"), *options], capture_output=True, text=True)
        if made.returncode != 0:
            raise RuntimeError(f"initdb ended with status {made.returncode}: {made.stderr}")
        [port] = free_ports(1)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [*as_user, str(place / "postgres"), "-D", f"{folder}/data", *words], stdout=log, stderr=log
            )
        asyncio.run(_make_databases(port, owners, server, folder / "log"))
        yield port
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # what is under way is broken off
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _user() -> pwd.struct_passwd:
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid())
    known = {each.pw_name: each for each in pwd.getpwall()}
    return known.get("postgres") or known["nobody"]


async def _make_databases(port: int, owners: Mapping[str, str], server: "subprocess.Popen[bytes]", log: Path) -> None:
    import asyncpg

    deadline = time.monotonic() + 60
    while True:
        try:
            connection = await asyncpg.connect(
                host="127.0.0.1", port=port, user="postgres", password="postgres", database="postgres"
            )
            break
        except (OSError, asyncpg.CannotConnectNowError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not answer: {log.read_text()}") from None
            await asyncio.sleep(0.2)
    for name, password in owners.items():  # a superuser, as the official image makes POSTGRES_USER
        quoted = password.replace("'", "''")
        await connection.execute(f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD '{quoted}'")
        await connection.execute(f"CREATE DATABASE {name} OWNER {name}")
    await connection.close()
