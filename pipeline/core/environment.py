"""Settings for every process of a run: caches in the project, no telemetry, few threads and collections."""

import atexit
import gc
import logging
import os
import warnings
from contextlib import suppress
from pathlib import Path

from pipeline.core.files import WORK_DIR


def set_environment() -> None:
    """Keep caches in the project, turn telemetry off, and make no file world-writable."""
    os.umask(os.umask(0o077) | 0o002)
    if Path("params.yaml").exists():
        with suppress(PermissionError):  # another user's project: `--help` works, other commands say what is wrong
            WORK_DIR.mkdir(exist_ok=True)
            WORK_DIR.chmod(0o700)  # logs, checkpoints and Prefect's database are private
    work = WORK_DIR.resolve()
    defaults = {
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "HF_EVALUATE_CACHE": str(work / "evaluate"),
        "HF_METRICS_CACHE": str(work / "metrics"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",  # it does not honour DO_NOT_TRACK=1
        "TOKENIZERS_PARALLELISM": "false",
        # Spinning threads occupy the core that the others need: 3 times slower next to a busy process.
        "OMP_WAIT_POLICY": "PASSIVE",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # report a registry that is down within a minute, not ten
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(work / "dvc"),
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    _quiet()


def _quiet() -> None:
    """Silence warnings that libraries address to their own developers: they look like errors, and users cannot act."""
    for library in ("transformers", "trl", "peft", "torch", "accelerate"):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=library)
    # The second is of every AdaLoRA adapter, whose ranks are loaded all the same.
    for message in (
        "The PEFT config's `base_model_name_or_path` was renamed",
        "The following rank_pattern keys",
        "Position ids are not supported",
    ):
        warnings.filterwarnings("ignore", message=message)
    for library in ("accelerate", "bitsandbytes", "trl", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def collect_rarely() -> None:
    """Look for reference cycles every 100,000 objects, not 700: rows have none, and it takes a fifth of `prepare`."""
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
