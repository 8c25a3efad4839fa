"""`python -m flows`: one run of the retrain flow, in the process that `retune run` starts."""

import json
import os
import sys
import time
from typing import Any

from pipeline.core.environment import collect_rarely
from pipeline.core.redaction import redact, redact_process
from pipeline.core.run_lock import name_holder


def main() -> None:
    """Run the flow; this project's own errors become one sentence and exit status 1."""
    started = time.monotonic()
    collect_rarely()
    redact_process()
    from flows.retrain import retrain
    from flows.summary import show

    if lock := os.environ.get("RETUNE_RUN_LOCK"):
        name_holder(int(lock))
    try:
        state: Any = retrain(os.environ.get("RETUNE_TRIGGER", "by-hand"), return_state=True)
        # A refusal is not an error, although its state is not green.
        result: dict[str, Any] = state.result(raise_on_failure=not (state.is_cancelled() and state.data))
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith(("pipeline.", "flows.")):
            raise
        print(redact(f"error: {error}"), file=sys.stderr)
        sys.exit(1)
    if "--json" in sys.argv:
        print(json.dumps(result))
    else:
        show(result, time.monotonic() - started)


if __name__ == "__main__":
    main()
