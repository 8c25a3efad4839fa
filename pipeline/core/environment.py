"""What every process of a run begins with: caches in the project, no telemetry, few threads and collections."""

import atexit
import gc
import logging
import os
import warnings
from contextlib import suppress
from pathlib import Path

from pipeline.core.files import WORK_DIR


def set_environment() -> None:
    """Caches in the project, no telemetry, no file that everybody may write, no Hub unless a parameter names one."""
    os.umask(os.umask(0o077) | 0o002)
    if Path("params.yaml").exists():
        with suppress(PermissionError):  # another user's: `--help` works there, and what needs it says why it cannot
            WORK_DIR.mkdir(exist_ok=True)
            WORK_DIR.chmod(0o700)  # logs, checkpoints and Prefect's database are nobody else's business
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
        # Threads that wait by spinning take the core that the others wait for: 3 times slower beside a busy process.
        "OMP_WAIT_POLICY": "PASSIVE",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a registry that is down is said within a minute, not ten
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(work / "dvc"),
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    _quiet()


def _quiet() -> None:
    """What libraries say to their own developers, and nobody here can act on: it looks like an error and is none."""
    for library in ("transformers", "trl", "peft", "torch", "accelerate"):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=library)
    warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
    for library in ("accelerate", "bitsandbytes", "trl", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def collect_rarely() -> None:
    """Have Python look for cycles every 100,000 objects instead of 700, and not at all at the end of this process.

    Libraries and rows are objects without cycles: looking is a fifth of the time of `prepare`.
    """
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
