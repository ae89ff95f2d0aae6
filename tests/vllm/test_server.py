"""vLLM's OpenAI server over HTTP: many streams at once, of which some are cancelled."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")

pytestmark = pytest.mark.slow

PATIENCE = 300.0
"""Seconds until the server answers, or is idle. On an idle machine it takes 30 and 1."""
NUM_STREAMS = 20
CANCELLED = range(1, NUM_STREAMS, 3)
NUM_TOKENS = 16


def prompt(number: int, length: int) -> list[int]:
    return [3 + (number * 101 + i * (7 + number)) % 500 for i in range(length)]


PROMPTS = [prompt(number, 40 + 13 * number) for number in range(NUM_STREAMS)]


class Server:
    """`vllm serve`, on a port of its own."""

    def __init__(self, model: Path, cache_dtype: str, log: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._port = listener.getsockname()[1]
        here = str(Path(__file__).parent)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--kv-cache-dtype", cache_dtype, "--enforce-eager", "--dtype", "float32"]
        command += ["--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)]
        # Whole prompts in one step, and none from the cache, so that a request is computed as it is alone.
        command += ["--max-num-batched-tokens", "4096", "--no-enable-prefix-caching"]
        command += ["--worker-extension-cls", "probe.Probe"]
        self._log = log.open("w")
        environment = {**os.environ, "PYTHONPATH": here, "VLLM_SERVER_DEV_MODE": "1"}
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment)

    def wait_until(self, condition: Any) -> bool:
        """Whether a condition comes true while the server lives."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if condition():
                    return True
            except OSError:  # not listening yet
                pass
            time.sleep(0.2)
        return False

    def request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The answer to one request, whose status must be 200."""
        connection, response = self._ask(path, body)
        answer = response.read()
        connection.close()
        assert response.status == 200, answer
        return answer

    def stream(self, prompt: list[int], num_tokens: int, cancel_after: int | None = None) -> list[int]:
        """The tokens that a prompt is completed by; fewer if the connection is closed after some chunks."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        connection, response = self._ask("/v1/completions", {**body, "stream": True, "return_token_ids": True})
        assert response.status == 200, response.read()
        tokens: list[int] = []
        num_chunks = 0
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if line.startswith(b"data: ") and data != b"[DONE]":
                tokens += json.loads(data)["choices"][0]["token_ids"] or []
                num_chunks += 1
                if num_chunks == cancel_after:
                    break
        connection.close()
        return tokens

    def in_use(self) -> list[float]:
        """vLLM's requests and share of blocks, kvarn's open pages and requests."""
        lines = self.request("/metrics").decode().splitlines()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] in names]
        assert len(found) == len(names)
        state = self.state()
        return [*found, state["open_pages"], state["requests"]]

    def state(self) -> dict[str, Any]:
        """`Probe.kvarn_state` of the worker."""
        return json.loads(self.request("/collective_rpc", {"method": "kvarn_state"}))["results"][0]

    def stop(self) -> None:
        """Ends the server."""
        self._process.terminate()
        self._process.wait(60)
        self._log.close()

    def _ask(self, path: str, body: dict[str, Any] | None) -> tuple[http.client.HTTPConnection, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
        return connection, connection.getresponse()


@pytest.fixture(params=["raw", "int4"])
def server(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that answers, with a frozen calibration."""
    log = tmp_path / "server.log"
    started = Server(model, f"kvarn_{request.param}", log)
    try:
        assert started.wait_until(lambda: started.request("/health") == b""), log.read_text()[-4000:]
        for number in range(3):  # 2,048 tokens freeze the calibration
            started.stream(prompt(50 + number, 900), 1)
        assert started.state()["formats"] == [request.param]
        yield started
    finally:
        started.stop()


def test_many_streams_are_answered_as_alone_while_others_are_cancelled(server: Server) -> None:
    kept = [number for number in range(NUM_STREAMS) if number not in CANCELLED]
    alone = {number: server.stream(PROMPTS[number], NUM_TOKENS) for number in kept}
    assert {len(tokens) for tokens in alone.values()} == {NUM_TOKENS}

    def ask(number: int) -> list[int]:
        if number in CANCELLED:
            return server.stream(PROMPTS[number], 700, cancel_after=1 + number % 5)
        return server.stream(PROMPTS[number], NUM_TOKENS)

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        found = list(pool.map(ask, range(NUM_STREAMS)))
    assert {number: found[number] for number in kept} == alone
    assert all(0 < len(found[number]) < 700 for number in CANCELLED)
    # vLLM hears of closed connections later.
    server.wait_until(lambda: not any(server.in_use()))
    assert server.in_use() == [0] * 5
    assert server.stream(PROMPTS[0], NUM_TOKENS) == alone[0]
