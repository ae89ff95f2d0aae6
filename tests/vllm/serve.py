"""Serves a model over HTTP, asks for a completion, and prints the page of metrics: `serve.py MODEL RANKS`."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


def ask(url: str, body: dict[str, object] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as page:
        return page.read().decode()


def main() -> None:
    model, ranks = sys.argv[1:]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--served-model-name", "served"]
    command += ["--port", str(port), "--kv-cache-dtype", "kvarn_int4", "--tensor-parallel-size", ranks]
    command += ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"]
    command += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(command, stdout=sys.stderr)
    try:
        while True:
            try:
                ask(f"{url}/health")
                break
            except OSError:
                if server.poll() is not None:
                    raise
                time.sleep(0.5)
        prompt = [3 + i * 7 % 500 for i in range(300)]
        options = {"temperature": 0, "ignore_eos": True, "max_tokens": 5, "detokenize": False}
        ask(f"{url}/v1/completions", {"model": "served", "prompt": prompt, "return_token_ids": True, **options})
        metrics = ""
        for _ in range(60):  # until the workers have heard that the request has ended
            metrics = ask(f"{url}/metrics")
            if re.search(r'^kvarn_open_pages{.*state="used"} 0', metrics, re.MULTILINE):
                break
            time.sleep(0.5)
        print(json.dumps({"metrics": metrics}))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
