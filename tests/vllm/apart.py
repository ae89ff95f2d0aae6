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


def run(model: Path, cache_dtype: str, environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """Greedy answers and what is left in use, of an engine with options.

    Returns:
        `answers`: of each of `runs.prompts`, tokens and log probabilities. `workers`: of each, `Probe.kvarn_state`.
        `cache_usage`: vLLM's own metric.
    """
    asked = json.dumps({"model": str(model), "cache_dtype": cache_dtype, "options": options})
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, asked, str(found)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads(found.read_text())


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
    answers = runs.greedy(llm)
    time.sleep(SETTLED)
    usage = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:kv_cache_usage_perc"]
    found = {"answers": answers, "workers": llm.collective_rpc("kvarn_state"), "cache_usage": usage}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
