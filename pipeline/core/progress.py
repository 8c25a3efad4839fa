"""Lines of progress, in a format that people read and the flow parses: `train 35% · … · ETA 0:48`."""

import re
import sys
import time

LINE = re.compile(r"^(?P<stage>[a-z]+) +(?P<percent>\d+)% · ")


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def counted(number: int, noun: str) -> str:
    """`number` with its noun: 1 row, 2 rows, 3 classes."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending * (number != 1)}"


def note(text: str) -> None:
    """Print a line for people, on stderr: stdout may be JSON for a program."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Prints a stage's progress, at most every `every` seconds, with the remaining time at the rate so far."""

    def __init__(self, stage: str, total: int, unit: str, every: float = 5.0) -> None:
        self.stage, self.total, self.unit, self.every = stage, total, unit, every
        self.first = self.printed = time.monotonic()
        self.start = 0  # steps that were done before a resumed run began

    def resume_at(self, done: int) -> None:
        self.start = done

    def update(self, done: int, detail: str = "") -> None:
        now = time.monotonic()
        if now - self.printed < self.every:
            return
        self.printed = now
        eta = (now - self.first) / max(done - self.start, 1) * (self.total - done)
        parts = [f"{self.stage} {100 * done // self.total}%", f"{done:,}/{self.total:,} {self.unit}", detail]
        note(" · ".join([part for part in parts if part] + [f"ETA {clock(eta)}"]))
