"""`kvarn doctor --vllm` where vLLM is not: what becomes of the results of its process. tests/vllm has the real run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvarn_rs.cli import doctor

TESTED = {"version": "0.32.0+cpu", "supported": "0.26.x, 0.32.x", "in_range": True}
GOOD = {"version": "0.32.0", "divergence": {"int8": 1e-4, "int4": 2e-2}, "error": None}


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a vLLM, and sets what its process does."""

    def install(stdout: str = "", stderr: str = "", code: int = 0, raises: Exception | None = None) -> None:
        def run(command: list[str], **options: Any) -> Any:
            assert command[1:] == ["-m", "kvarn_rs.vllm.check"]
            assert options["timeout"] == doctor.RUN_TIMEOUT_S
            if raises is not None:
                raise raises
            return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=code)

        monkeypatch.setattr(doctor, "package", lambda name: TESTED)
        monkeypatch.setattr(doctor, "vllm_plugin", lambda: {"found": True, "entry_point": "x:y", "reason": None})
        monkeypatch.setattr(subprocess, "run", run)

    return install


@pytest.mark.parametrize("after", ["", "INFO engine shut down\n", "\n{}\n3\n"])
def test_a_run_close_to_vllm_s_own_cache_passes(process: Callable[..., None], after: str) -> None:
    process(f"INFO something\n{json.dumps(GOOD)}\n{after}")
    assert doctor.run_vllm() == {
        "status": "passed",
        "detail": "vLLM 0.32.0: KL divergence from its own cache: int8 1.0e-04 (at most 1e-03), "
        "int4 2.0e-02 (at most 1e-01)",
    }


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_run_far_from_vllm_s_own_cache_fails(process: Callable[..., None], format: str) -> None:
    process(json.dumps({**GOOD, "divergence": {**GOOD["divergence"], format: 0.5}}))
    found = doctor.run_vllm()
    assert found["status"] == "failed"
    assert f"{format} 5.0e-01" in found["detail"]


def test_an_error_of_vllm_is_the_reason(process: Callable[..., None]) -> None:
    process(json.dumps({**GOOD, "divergence": {}, "error": "UnsupportedError: set\nthis"}))
    assert doctor.run_vllm() == {"status": "failed", "detail": "UnsupportedError: set this"}


@pytest.mark.parametrize("stdout", ["", "INFO no result\n", '{"other": 1}\n'])
def test_a_process_that_ends_without_a_result_fails_with_its_last_words(
    process: Callable[..., None], stdout: str
) -> None:
    process(stdout, "Traceback\nSegmentation fault\n", -11)
    assert doctor.run_vllm() == {"status": "failed", "detail": "vLLM ended with code -11: Segmentation fault"}


def test_a_process_that_does_not_end_fails(process: Callable[..., None]) -> None:
    process(raises=subprocess.TimeoutExpired("python", 1))
    assert f"within {doctor.RUN_TIMEOUT_S} seconds" in doctor.run_vllm()["detail"]


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ({**TESTED, "version": None, "in_range": None}, "not installed"),
        ({**TESTED, "version": "0.40.1", "in_range": False}, "vLLM 0.40.1 is not a tested release (0.26.x, 0.32.x)"),
    ],
)
def test_no_vllm_and_other_releases_fail_without_a_run(
    package: dict[str, Any], words: str, process: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    process(raises=AssertionError("it ran"))
    monkeypatch.setattr(doctor, "package", lambda name: package)
    found = doctor.run_vllm()
    assert found["status"] == "failed"
    assert words in found["detail"]


def test_plugins_that_leave_kvarn_out_are_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="kvarn", value="x:y", load=lambda: None)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
    assert doctor.vllm_plugin()["found"]
    monkeypatch.setenv("VLLM_PLUGINS", "other,kvarn")
    assert doctor.vllm_plugin()["found"]
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert doctor.vllm_plugin() == {
        "found": False,
        "entry_point": "x:y",
        "reason": "VLLM_PLUGINS is 'other': it must name 'kvarn', or be unset",
    }
    monkeypatch.setattr(doctor, "package", lambda name: TESTED)
    assert "VLLM_PLUGINS" in doctor.run_vllm()["detail"]


def test_a_failed_run_fails_the_command_and_none_is_made_unasked(
    kvarn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "run_vllm", lambda: {"status": "failed", "detail": "no luck"})
    assert kvarn("doctor", "--json").json["vllm_run"]["status"] == "skipped"
    done = kvarn("doctor", "--vllm", "--json")
    assert done.code == 1
    assert done.json["vllm_run"] == {"status": "failed", "detail": "no luck"}
    assert not done.json["ok"]
    assert "no luck" in kvarn("doctor", "--vllm").out
