"""A real PostgreSQL on loopback: a cluster in a folder of its own, which goes when the server ends, and that with us.

`start(owners)` takes each database's owner, of the same name, with a password, and yields the port. The server does
not run as root: for root it runs as `postgres`, or else `nobody`, in a folder of theirs.
"""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from local_servers import wait_until
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
        user = _user()
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = [sys.executable, "-c", AS_ANOTHER_USER, str(user.pw_uid), str(user.pw_gid)]

        def run(program: str, *options: str, typed: str = "") -> None:
            command = [*as_user, str(place / program), *options]
            done = subprocess.run(command, input=typed, capture_output=True, text=True)
            assert done.returncode == 0, f"{program} ended with status {done.returncode}: {done.stderr}"

        run("initdb", "--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync", "--no-locale", "--encoding=UTF8",
            f"--pgdata={folder}/data", "--data-checksums", "--username=postgres")  # fmt: skip
        for name, password in owners.items():  # a superuser, as the official image makes POSTGRES_USER
            quoted = password.replace("'", "''")
            role = f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD '{quoted}'\n"
            typed = f"{role}CREATE DATABASE {name} OWNER {name}\n"
            run("postgres", "--single", "-D", f"{folder}/data", "postgres", typed=typed)
        [port] = free_ports(1)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with (folder / "log").open("wb") as log:
            command = [*as_user, str(place / "postgres"), "-D", f"{folder}/data", *words]
            server = subprocess.Popen(command, stdout=log, stderr=log)
        state = folder / "data" / "postmaster.pid"
        wait_until(lambda: server.poll() is not None or (state.exists() and "ready" in state.read_text()), 60)
        assert server.poll() is None, (folder / "log").read_text()
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
    known = {each.pw_name: each for each in pwd.getpwall()}
    return pwd.getpwuid(os.getuid()) if os.getuid() != 0 else known.get("postgres") or known["nobody"]
