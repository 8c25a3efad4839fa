"""Creates one file in `infra/secrets/` for each password and key that compose.yaml and the Kubernetes example read.

Existing files are kept. Only the owner can open the folder; the files in it are readable, because Docker mounts them
as they are and the containers run as other users.
"""

import secrets
import sys
from pathlib import Path

MADE = {
    "prefect_auth": lambda: f"admin:{secrets.token_urlsafe(24)}",  # user:password of dashboard and API
    "prefect_db_password": lambda: secrets.token_urlsafe(24),
    "redis_password": lambda: secrets.token_urlsafe(24),
    "mlflow_db_password": lambda: secrets.token_urlsafe(24),
    "mlflow_admin_password": lambda: secrets.token_urlsafe(24),  # for MLflow's user admin
    "mlflow_worker_password": lambda: secrets.token_urlsafe(24),  # for its user retune, used by workers
    "mlflow_csrf_key": lambda: secrets.token_urlsafe(32),
    "s3_access_key": lambda: secrets.token_hex(10),
    "s3_secret_key": lambda: secrets.token_urlsafe(30),
}
ASKED = {"git_token": "a token that may fetch from and push to RETUNE_GIT_URL"}


def main(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    for name, make in MADE.items():
        path = folder / name
        if not path.exists():
            path.write_text(make() + "\n", encoding="utf-8")
            path.chmod(0o444)
            print(f"created {path}")
    missing = [f"{folder / name}: {what}" for name, what in ASKED.items() if not (folder / name).exists()]
    if missing:
        sys.exit("create by hand: " + "; ".join(missing))


if __name__ == "__main__":
    main(Path(__file__).parent / "secrets")
