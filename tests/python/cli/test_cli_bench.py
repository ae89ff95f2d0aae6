"""`kvarn bench` at small sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvarn_rs.cli import bench, bench_seal

pytest.importorskip("torch")

SMALL = (
    *(
        "bench",
        "attend",
        "--context",
        "160",
        "--head-dim",
        "64",
        "--heads",
        "6/2",
        "--batch",
        "2",
        "--block-size",
        "16",
    ),
    *("--repetitions", "2", "--working-set", "1MiB", "--threads", "1"),
)


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_STREAM_BYTES", 1 << 20)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # restored after what the command sets


def test_results_are_checked_and_compared(kvarn: Callable[..., Any]) -> None:
    report = kvarn(*SMALL, "--json").json
    assert report["ok"]
    assert (report["num_q_heads"], report["num_kv_heads"], report["batch"], report["context"]) == (6, 2, 2, 160)
    results = {result["name"]: result for result in report["results"]}
    assert list(results) == [
        "stream",
        "sdpa f32",
        "sdpa f32 grouped",
        "sdpa bf16",
        "sdpa bf16 grouped",
        "raw",
        "int8",
        "int4",
        "int3",
        "int2",
    ]
    assert results["stream"]["stream_share"] == 1
    assert results["sdpa bf16"]["bytes"] == 2 * 160 * 2 * 64 * 2 * 2
    assert results["int8"]["bytes"] == 2 * 160 * 2 * (2 * 16 * 64 + 6 * 16 + 4 * 64) / 16
    assert results["raw"]["max_relative_error"] <= results["raw"]["tolerance"] == 1e-5
    assert results["int8"]["max_relative_error"] <= results["int8"]["tolerance"] == 2e-3
    # Tiles of the nine blocks before the last 16 tokens, which are in pages: 15, and the new one.
    for name, bits in (("int4", 4), ("int3", 3), ("int2", 2)):
        tile = 2 * 16 * 64 * bits // 8 + 6 * 16 + 5 * 64 + 8
        assert results[name]["bytes"] == 2 * 2 * (9 * (tile + -tile % 16) + 2 * 16 * 64 + 6 * 16 + 4 * 64)
        assert results[name]["max_relative_error"] <= results[name]["tolerance"] == 2e-3
    assert max(result["speedup"] for name, result in results.items() if name.startswith("sdpa")) == 1
    assert all(result["q1_us"] <= result["median_us"] <= result["q3_us"] for result in results.values())


def test_a_wrong_result_fails_the_command(kvarn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TOLERANCE", 0.0)
    done = kvarn(*SMALL, "--formats", "int8", "--json")
    assert done.code == 1
    assert not done.json["ok"]
    assert "OVER" in kvarn(*SMALL, "--formats", "int8").out


def test_torch_keeps_its_number_of_threads(kvarn: Callable[..., Any]) -> None:
    import torch

    before = torch.get_num_threads()
    assert kvarn(*SMALL, "--formats", "raw").code == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--heads", "6"), "6"),
        (("--heads", "6/4"), "divide"),
        (("--heads", "6/0"), "heads"),
        (("--formats", "int9"), "int9"),
        (("--head-dim", "72"), "72"),
        (("--context", "1"), "context"),
        (("--block-size", "48"), "block_size"),
        (("--threads", "0"), "threads"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: tuple[str, ...], word: str, kvarn: Callable[..., Any]) -> None:
    assert word in kvarn(*SMALL, *arguments).refused()


SEAL = ("bench", "seal", "--kv-heads", "2", "--block-size", "16", "--repetitions", "2")


def test_sealing_is_timed_by_format_head_dim_and_calibration(kvarn: Callable[..., Any]) -> None:
    report = kvarn(*SEAL, "--json").json
    assert report["ok"]
    assert (report["num_kv_heads"], report["block_size"], report["repetitions"]) == (2, 16, 2)
    cases = [(result["format"], result["head_dim"], result["calibrated"]) for result in report["results"]]
    assert len(set(cases)) == len(cases) == 3 * 2 * 2
    for result in report["results"]:
        assert result["head_ms"] == result["block_ms"] / 2
        assert result["token_us"] == pytest.approx(result["block_ms"] * 1000 / 16)
        assert 0.05 < result["v_relative_error"] <= result["tolerance"]
    assert "us/token" in kvarn(*SEAL).out


def test_a_block_that_was_sealed_wrong_fails_the_command(
    kvarn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_seal, "TOLERANCES", {"int4": 0.0})
    done = kvarn(*SEAL, "--json")
    assert (done.code, done.json["ok"]) == (1, False)
    assert "OVER" in kvarn(*SEAL).out
    assert "block_size" in kvarn(*SEAL, "--block-size", "48").refused()
