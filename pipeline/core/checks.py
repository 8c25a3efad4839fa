"""Results of `retune doctor` and `retune verify`."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool | None  # None: there was nothing to check; `detail` says why
    detail: str
    advice: str = ""  # what to do


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"passed": all(check.passed is not False for check in checks), "checks": [vars(check) for check in checks]}
