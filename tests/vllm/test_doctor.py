"""`kvarn doctor --vllm` in an environment that has vLLM."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")

from kvarn_rs.cli import main


@pytest.mark.slow
def test_the_doctor_runs_vllm_with_kvarn_s_formats(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["doctor", "--vllm", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["packages"]["vllm"]["in_range"], "also where the version ends with +cpu"
    assert report["vllm_run"]["status"] == "passed"
    assert all(f"{name} " in report["vllm_run"]["detail"] for name in ("int8", "int4"))
