"""`kvarn doctor` on this machine, and with parts of the installation missing."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

import kvarn_rs
from kvarn_rs.cli import doctor


def test_the_report_is_one_object_and_the_self_test_passes(kvarn: Callable[..., Any]) -> None:
    pytest.importorskip("numpy")
    report = kvarn("doctor", "--json").json
    assert report["version"] == kvarn_rs.__version__
    assert report["formats"] == list(kvarn_rs.FORMATS)
    assert report["threads"] >= 1
    assert report["simd_level"]
    assert report["self_test"]["status"] == "passed"
    assert all(f"{name}: relative error" in report["self_test"]["detail"] for name in ("int8", "int4"))
    assert report["ok"]
    assert set(report["packages"]) == {"numpy", "torch", "transformers", "vllm"}
    assert report["cuda"]["found"] == (report["cuda"]["reason"] is None)
    assert report["demo"]["found"] == (report["demo"]["reason"] is None)


def test_the_report_is_printed_with_a_line_per_item(kvarn: Callable[..., Any]) -> None:
    done = kvarn("doctor")
    assert done.code == 0
    assert done.err == ""
    words = (
        "kvarn-rs",
        "CPU",
        "CUDA driver",
        "torch",
        "transformers",
        "vllm",
        "vLLM plugin",
        "demo weights",
        "self-test",
    )
    assert [word for word in words if word not in done.out] == []


def test_without_a_driver_the_loaders_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    found = doctor.cuda_driver()
    assert not found["found"]
    assert "libcuda.so.1" in found["reason"]


def test_without_numpy_the_self_test_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.attention_self_test() == {"status": "skipped", "detail": "numpy is not installed"}


def test_a_failed_self_test_fails_the_command(kvarn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")
    monkeypatch.setattr(doctor, "SELF_TEST_TOLERANCE", 0.0)
    done = kvarn("doctor", "--json")
    assert done.code == 1
    assert not done.json["ok"]


def test_a_sealed_format_that_rounds_too_much_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")
    monkeypatch.setitem(doctor.ROUNDING_LIMITS, "int4", 0.1)
    assert doctor.attention_self_test()["status"] == "failed"


def test_a_package_out_of_range_is_named(kvarn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")
    monkeypatch.setattr(doctor, "supported_range", lambda name: ">=99,<100")
    assert kvarn("doctor", "--json").json["packages"]["numpy"]["in_range"] is False
    assert "NOT IN THIS RANGE" in kvarn("doctor").out


@pytest.mark.parametrize(
    ("version", "specifier", "expected"),
    [
        ("5.24.0", ">=5.16,<6", True),
        ("5.16", ">=5.16,<6", True),
        ("5.9.1", ">=5.16,<6", False),
        ("6.0.0.dev0", ">=5.16,<6", False),
        ("2.15.0+cu132", ">=2.6", True),
        ("6", ">=6.0.0", True),
    ],
)
def test_versions_compare_by_number(version: str, specifier: str, expected: bool) -> None:
    assert doctor.within(version, specifier) is expected
