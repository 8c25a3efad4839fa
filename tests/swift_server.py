"""OpenStack Swift with its S3 API on loopback: four real processes that store data in a folder and end with this one.

`start(folder)` yields the endpoint. Account and keys are fixed and useless outside the folder.
"""

import getpass
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
from local_servers import answers, wait_until

ACCESS_KEY, SECRET_KEY, REGION, BUCKET = "test:tester", "testing", "us-east-1", "retune"

COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
user = {user}
workers = 0
log_level = ERROR
fallocate_reserve = 0
disable_fallocate = true
eventlet_debug = false
"""
BACKEND = "[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
PROXY = f"""
[pipeline:main]
pipeline = catch_errors cache s3api tempauth bulk slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = {REGION}
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:tempauth]
use = egg:swift#tempauth
user_{ACCESS_KEY.replace(":", "_")} = {SECRET_KEY} .admin
"""
RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *ports = sys.argv[1:]
for kind, port in zip(("account", "container", "object"), ports):
    ring = RingBuilder(part_power=2, replicas=1, min_part_hours=0)
    ring.add_dev({"region": 0, "zone": 0, "ip": "127.0.0.1", "port": int(port), "device": "d", "weight": 1.0,
                  "replication_ip": "127.0.0.1", "replication_port": int(port)})
    ring.rebalance()
    ring.get_ring().save(f"{folder}/{kind}.ring.gz")
"""
SERVER = (
    "import sys; from pipeline.core.processes import end_with_parent; end_with_parent(); "
    "from swift.{kind}.server import main; sys.exit(main())"
)


@contextmanager
def start(folder: Path) -> Iterator[str]:
    """Start the server; yields its endpoint when it answers."""
    (folder / "devices" / "d").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = retune\n")
    ports = dict(zip(("account", "container", "object", "proxy"), free_ports(4), strict=True))
    rings = [str(ports[kind]) for kind in ("account", "container", "object")]
    environment = os.environ | {"SWIFT_CONF_DIR": str(folder), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", RINGS, str(folder), *rings], check=True, env=environment, capture_output=True)
    servers = []
    try:
        for kind, port in ports.items():
            text = COMMON.format(port=port, folder=folder, user=getpass.getuser())
            text += PROXY if kind == "proxy" else BACKEND.format(kind=kind)
            conf = folder / f"{kind}.conf"
            conf.write_text(text)
            module = kind if kind != "object" else "obj"
            command = [sys.executable, "-c", SERVER.format(kind=module), str(conf)]
            with (folder / f"{kind}.log").open("wb") as log:
                servers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        endpoint = f"http://127.0.0.1:{ports['proxy']}"
        wait_until(lambda: answers(f"{endpoint}/info") or any(server.poll() is not None for server in servers), 60)
        assert answers(f"{endpoint}/info"), "\n".join(path.read_text() for path in folder.glob("*.log"))
        # conftest puts the keys into the environment.
        boto3.client("s3", endpoint_url=endpoint, region_name=REGION).create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        for server in servers:
            server.kill()
        for server in servers:
            server.wait()


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
