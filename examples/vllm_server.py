"""vLLM's server with a kvarn cache, and a client: `vllm_server.py [MODEL [FORMAT]]`. Without a model, a random one.

Starts `vllm serve` with the one flag, streams a completion with the `openai` client, and prints kvarn's metrics.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from openai import OpenAI  # pyright: ignore[reportMissingImports]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START_S = 600


def random_model(folder: str) -> str:
    """Saves a Llama of two layers with random weights, and a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get(url: str) -> str:
    """The body of a page; empty while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return page.read().decode()
    except urllib.error.URLError:
        return ""


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Waits until the server knows its models; raises if it ends, or after ten minutes."""
    deadline = time.monotonic() + START_S
    while not get(f"{url}/v1/models"):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server is not ready after {START_S} seconds")
        time.sleep(0.5)


def main() -> None:
    """Serves, asks, and prints."""
    model, cache_format = [*sys.argv[1:], *("", "int4")[len(sys.argv) - 1 :]][:2]
    vllm = Path(sys.executable).with_name("vllm")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [str(vllm) if vllm.exists() else shutil.which("vllm") or "vllm", "serve"]
        command += [model or random_model(folder), "--served-model-name", "served", "--port", str(port)]
        command += ["--kv-cache-dtype", f"kvarn_{cache_format}"]  # the one flag
        command += ["--max-model-len", "2048", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "64M"]
        server = subprocess.Popen(command)
        try:
            wait_until_ready(url, server)
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            prompt = "A cache of keys and values grows with every token. " * 12
            stream = client.completions.create(model="served", prompt=prompt, max_tokens=64, stream=True)
            for chunk in stream:
                print(chunk.choices[0].text, end="", flush=True)
            print()
            time.sleep(1)  # the step in which the engine hears that the request has ended
            for line in get(f"{url}/metrics").splitlines():
                if line.startswith("kvarn_") and "_created" not in line:
                    print(line)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
