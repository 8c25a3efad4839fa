"""Time and peak memory of each stage on this machine, recorded together with the digest of its output."""

from pathlib import Path

from pipeline.core.files import WORK_DIR, read_json, sha256_file, write_json

# One file of each stage's output; its digest shows whether a recorded time belongs to the present output.
MARKERS = {
    "prepare": "dataset/report.json",
    "train": "adapter/training.json",
    "evaluate": "evaluation/scores.json",
    "merge": "parity/parity.json",
}


def record(stage: str, seconds: float, peak_memory_bytes: int, root: Path = Path(".")) -> None:
    """Record a stage's time and memory; for a resumed training, the time before its checkpoint is added."""
    if stage == "train":
        seconds += read_json(root / "artifacts" / "training" / "run.json")["earlier_seconds"]
    marker = sha256_file(root / "artifacts" / MARKERS[stage])
    path = root / WORK_DIR / "stages" / f"{stage}.json"
    write_json(path, {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes, "output_sha256": marker})


def stage_seconds(root: Path = Path(".")) -> dict[str, float | None]:
    """Seconds of each stage; None if the present output was not made here (DVC restored it)."""
    seconds: dict[str, float | None] = dict.fromkeys(MARKERS)
    for stage, marker in MARKERS.items():
        path, output = root / WORK_DIR / "stages" / f"{stage}.json", root / "artifacts" / marker
        if path.is_file() and output.is_file():
            recorded = read_json(path)
            seconds[stage] = recorded["seconds"] if recorded["output_sha256"] == sha256_file(output) else None
    return seconds
