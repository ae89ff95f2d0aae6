"""kvarn's metrics in vLLM's Prometheus registry, against the engines' own figures."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from prometheus_client import REGISTRY  # pyright: ignore[reportMissingImports]
from prometheus_client.parser import text_string_to_metric_families  # pyright: ignore[reportMissingImports]
from runs import core, finish, greedy, groups, make_llm, num_blocks
from server import Server
from vllm import SamplingParams  # pyright: ignore

from kvarn_rs.vllm import compat_metrics, formats

PAGES = 32  # 3 a sequence, of 8, and one more of each


def samples(registry: Any = REGISTRY) -> dict[tuple[str, str | None], float]:
    """Values of kvarn's metrics by name and state."""
    return {
        (sample.name, sample.labels.get("state")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name.startswith("kvarn_") and not sample.name.endswith("_created")
    }


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages of the plugin. The first engine of a process sets vLLM's loggers up anew, without handlers of others."""
    messages: list[str] = []
    for name in ("info", "exception"):
        monkeypatch.setattr(
            logging.getLogger("vllm.kvarn_rs"), name, lambda text, *values: messages.append(text % values)
        )
    return messages


def test_the_log_says_at_the_start_what_fits_and_what_is_beside_it(model: Path, logged: list[str]) -> None:
    llm = make_llm(model, "kvarn_int4")
    (line,) = [message for message in logged if message.startswith("kvarn-rs: int4")]
    blocks, mebibytes = num_blocks(llm), PAGES * 2 * 2 * formats.open_page_bytes(64) / 2**20
    assert f"2 layers, 292 bytes a token, {blocks} blocks of 128 tokens: {blocks * 128} tokens; " in line
    assert f"{PAGES} open pages a layer, {mebibytes:.1f} MiB beside vLLM's blocks; calibration: learned" in line


def test_an_engine_in_this_process_reports_its_blocks_pages_and_seals(model: Path) -> None:
    llm = make_llm(model, "kvarn_int4", disable_log_stats=False, enable_prefix_caching=True)
    assert samples()["kvarn_sealed_blocks_total", None] == 0
    greedy(llm)
    (group,) = groups(llm)
    stats, found = group.engine.stats(), samples()
    page = 2 * 2 * formats.open_page_bytes(64)
    block = 2 * 2 * formats.BLOCK_SIZE * formats.token_bytes("int4", 64, "float32")
    assert stats["open_pages"] > 0
    assert found["kvarn_blocks", "used"] == 0
    assert found["kvarn_blocks", "free"] == num_blocks(llm) - 1
    assert found["kvarn_blocks_bytes", "free"] == (num_blocks(llm) - 1) * block
    assert found["kvarn_open_pages", "used"] == stats["open_pages"]
    assert found["kvarn_open_pages", "free"] == PAGES - stats["open_pages"]
    assert found["kvarn_open_pages_bytes", "used"] == stats["open_pages"] * page
    assert found["kvarn_open_pages_bytes", "free"] == (PAGES - stats["open_pages"]) * page
    assert found["kvarn_open_pages_peak", None] == stats["peak_open_pages"]
    assert found["kvarn_sealed_blocks_total", None] == stats["sealed"] > 0
    assert found["kvarn_out_of_range_tokens_total", None] == 0
    assert found["kvarn_saturation_ratio", None] == max(stats["saturation"])
    assert found["kvarn_drift_ratio", None] in stats["drift"]
    assert found["kvarn_calibration", stats["calibrated"]] == 1
    assert sum(value for (name, _), value in found.items() if name == "kvarn_calibration") == 1
    outputs, _ = core(llm).step()  # in which workers hear that requests have ended; 0.26 does not record it offline
    assert outputs[0].scheduler_stats.kvarn["open_pages"] == {"used": 0, "free": PAGES}
    again = make_llm(model, "kvarn_int8", disable_log_stats=False)
    assert samples()["kvarn_sealed_blocks_total", None] == 0, "metrics are of the latest engine"
    greedy(again)
    assert samples()["kvarn_open_pages", "free"] == 0
    assert ("kvarn_calibration", "no") not in samples()
    make_llm(model, "auto", disable_log_stats=False)
    assert samples() == {}


def test_blocks_of_running_requests_are_used(model: Path) -> None:
    llm = make_llm(model, "kvarn_int4", disable_log_stats=False)
    parameters = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("one", {"prompt_token_ids": [5] * 300}, parameters)  # pyright: ignore
    llm.llm_engine.step()
    assert samples()["kvarn_blocks", "used"] == 3
    assert samples()["kvarn_open_pages", "used"] == groups(llm)[0].engine.stats()["open_pages"] > 0


def test_nothing_is_asked_of_workers_without_log_stats_or_for_other_cache_dtypes(model: Path) -> None:
    for options in ({"cache_dtype": "kvarn_int4"}, {"cache_dtype": "auto", "disable_log_stats": False}):
        llm = make_llm(model, **options)  # pyright: ignore[reportArgumentType]
        assert "step" not in vars(core(llm))
        greedy(llm, 1)
        del llm  # or it would end the process groups of the next


def test_figures_that_cannot_be_read_end_metrics_and_not_the_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no figures")

    monkeypatch.setattr(compat_metrics, "read_worker", fail)
    llm = make_llm(model, "kvarn_int8", disable_log_stats=False)
    assert len(greedy(llm, 3)[0][0]) == 3
    assert [message for message in logged if "no metrics" in message] == ["kvarn-rs: no metrics from now on"]
    finish(llm)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_has_the_metrics_at_its_endpoint(model: Path, ranks: int, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    server = Server(model, "kvarn_int4", log, "--tensor-parallel-size", str(ranks))
    try:
        assert len(server.stream([3 + i * 7 % 500 for i in range(300)], 5)) == 5
        # Until the workers have heard that the request has ended.
        assert server.wait_until(lambda: re.search(r'^kvarn_open_pages{.*"used"} 0', server.metrics(), re.MULTILINE))
        served = server.metrics()
    finally:
        server.stop()
    assert log.read_text().count("kvarn-rs: int4") == 1, "one rank says what fits"
    labels = [
        sample.labels
        for metric in text_string_to_metric_families(served)
        for sample in metric.samples
        if sample.name.startswith("kvarn_")
    ]
    assert all(label["model_name"] == "served" and label["engine"] == "0" for label in labels)

    class Served:
        def collect(self) -> Any:
            return text_string_to_metric_families(served)

    found = samples(Served())
    block = 2 * 2 * formats.BLOCK_SIZE * formats.token_bytes("int4", 64, "float32")  # over all ranks
    assert found["kvarn_blocks", "used"] == 0
    assert found["kvarn_blocks_bytes", "free"] == found["kvarn_blocks", "free"] * block
    assert found["kvarn_open_pages", "used"] == 0
    assert found["kvarn_open_pages_bytes", "free"] == PAGES * 2 * 2 * formats.open_page_bytes(64)
    assert found["kvarn_sealed_blocks_total", None] == 2  # of 300 tokens
    assert found["kvarn_open_pages_peak", None] >= 2
