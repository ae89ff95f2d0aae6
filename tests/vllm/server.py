"""vLLM's OpenAI server over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE = 300.0
"""Seconds until the server answers, or is idle. On an idle machine it takes 30 and 1."""


class Server:
    """`vllm serve`, on a port of its own. It has started when it is made."""

    def __init__(self, model: Path, cache_dtype: str, log: Path, *more: str) -> None:
        """Starts a server with more options, whose log is written to a file."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._port = listener.getsockname()[1]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", "served"]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--kv-cache-dtype", cache_dtype]
        command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8"]
        command += ["--kv-cache-memory-bytes", str(64 << 20), "--worker-extension-cls", "probe.Probe", *more]
        here = str(Path(__file__).parent)
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        # On a machine of two cores, vLLM finds none that it could bind a second rank to.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self._log = log.open("w")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment)
        if not self.wait_until(lambda: self.request("/health") == b""):
            self.stop()
            raise AssertionError(log.read_text()[-4000:])

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
        body = {"model": "served", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
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

    def metrics(self) -> str:
        """The page of metrics."""
        return self.request("/metrics").decode()

    def groups(self) -> list[dict[str, Any]]:
        """What `Probe.kvarn_state` says of the first worker's groups."""
        return json.loads(self.request("/collective_rpc", {"method": "kvarn_state"}))["results"][0]["groups"]

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
