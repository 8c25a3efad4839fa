"""The flow: from a data snapshot to a new champion or a reasoned refusal, one line per stage.

Each DVC stage runs as `dvc repro` of that stage in a child process, so `dvc repro` and this flow see each other's
work as done. If a GPU worker dies, its training is requested again (`operations.train_attempts`); a training that fails
is not: a person decides on a second attempt, which continues from the last checkpoint.
"""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.summary import describe_run, show_run, state_of
from flows.tasks import (
    ARTIFACTS,
    StageResult,
    evaluate,
    ingest,
    merge,
    prepare,
    promote,
    publish,
    train,
    wait_for_approval,
)
from pipeline.core.current_run import recorded
from pipeline.scoring.resampling import METRICS, read_scores
from pipeline.settings import load_params


@flow(name="retrain", flow_run_name="retrain-{trigger}", validate_parameters=False)
def retrain(trigger: str = "by-hand") -> State[Any]:
    result = run_stages(trigger)
    return state_of(result["decision"]["decision"], result["decision"]["reason"], result)


def run_stages(trigger: str) -> dict[str, Any]:
    with recorded(trigger):
        describe_run(trigger)
        params = load_params()
        states = [
            ingest(),
            prepare(),
            train(params),
            evaluate(),
            merge(),
            publish(params),
            promote(params),
        ]
        stages: list[StageResult] = [state.result() for state in states]
        scores = read_scores(ARTIFACTS / "evaluation") | read_scores(ARTIFACTS / "parity")
        systems = ("base", "adapter", "merged")
        result = {
            "changed": any(stage.outcome not in ("cached", "unchanged") for stage in stages),
            "stages": [{"stage": s.stage, "outcome": s.outcome, "seconds": s.seconds} for s in stages],
            "metrics": {system: {metric: scores[system][metric] for metric in METRICS} for system in systems},
            "version": stages[-2].detail,
            "decision": stages[-1].detail,
        }
        show_run(params, trigger, result)
        return wait_for_approval(params, trigger, result)
