"""`make bench-stages`: time and peak memory of each stage's last run, as a table for docs/benchmarks.md."""

from pipeline.core import graph
from pipeline.core.files import WORK_DIR, read_json
from pipeline.core.progress import clock


def main() -> None:
    print("| stage | time | peak memory |\n|---|---|---|")
    for stage in graph.STAGES:
        path = WORK_DIR / "stages" / f"{stage}.json"
        if not path.exists():
            print(f"| {stage} | not run here | |")
            continue
        last = read_json(path)
        print(f"| {stage} | {clock(last['seconds'])} | {last['peak_memory_bytes'] / 2**30:.2f} GiB |")


if __name__ == "__main__":
    main()
