"""A run of vLLM in a process of its own: `apart.py RUN FILE`, where RUN is JSON, as what it writes to the file.

`run` starts it. vLLM reads its environment once a process, and spawns its workers by importing the main module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETTLED = 1.0
"""Seconds after which an engine has made the step in which its workers hear of the last requests that finished."""
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def run(
    model: Path, cache_dtype: str, environment: dict[str, str] | None = None, num_tokens: int = 20, **options: Any
) -> dict[str, Any]:
    """Greedy answers and what is left in use, of an engine with options.

    Returns:
        `answers`: of each of `runs.prompts`, a `runs.Answer`. `workers`: of each, `Probe.kvarn_state`. `metrics`:
        vLLM's own, by name. `log`: what was printed.
    """
    import runs

    asked = json.dumps({"model": str(model), "cache_dtype": cache_dtype, "num_tokens": num_tokens, "options": options})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, __file__, asked, str(file)]
        environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        found = json.loads(file.read_text())
    answers = [runs.Answer(*answer) for answer in found["answers"]]
    return {**found, "answers": answers, "log": done.stdout + done.stderr}


def main() -> None:
    """Runs what the command line asks for."""
    asked = json.loads(sys.argv[1])
    import runs

    llm = runs.make_llm(
        Path(asked["model"]),
        asked["cache_dtype"],
        worker_extension_cls="probe.Probe",
        disable_log_stats=False,
        **asked["options"],
    )
    answers = runs.greedy(llm, asked["num_tokens"])
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        runs.finish(llm)
    else:
        time.sleep(SETTLED)
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    found = {"answers": answers, "workers": llm.collective_rpc("kvarn_state"), "metrics": metrics}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
