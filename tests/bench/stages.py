"""`make bench-stages`: time and peak memory of each stage's last run."""

import sys

from pipeline.core import graph
from pipeline.core.files import WORK_DIR, read_json
from pipeline.core.progress import clock
from tests.bench.measuring import header, row

if __name__ == "__main__":
    header("stage", "time", "peak memory")
    for path in (WORK_DIR / "stages" / f"{stage}.json" for stage in graph.STAGES):
        if not path.exists():
            sys.exit(f"stage {path.stem} has not run in this clone; `make run` runs all stages")
        last = read_json(path)
        row(path.stem, clock(last["seconds"]), f"{last['peak_memory_bytes'] / 2**30:.2f} GiB")
