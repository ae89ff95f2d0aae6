"""vLLM with a kvarn cache: `vllm_offline.py [MODEL [FORMAT]]`. Without a model, on a tiny random one."""

import os
import sys
import tempfile

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]


def random_model(folder: str) -> str:
    """Saves a Llama of two layers with random weights."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, head_dim=64
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Continues two prompts that share 300 tokens, and prints the tokens."""
    model, format = [*sys.argv[1:], *("", "int8")[len(sys.argv) - 1 :]][:2]
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            model=model or random_model(folder),
            skip_tokenizer_init=True,
            kv_cache_dtype=f"kvarn_{format}",  # the one flag
            kv_cache_memory_bytes=64 << 20,
            max_model_len=1024,
            enforce_eager=True,
        )
        shared = [3 + i * 7 % 500 for i in range(300)]
        prompts = [{"prompt_token_ids": [*shared, *end]} for end in ([5, 6, 7], [8, 9])]
        parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        for output in llm.generate(prompts, parameters, use_tqdm=False):  # pyright: ignore[reportArgumentType]
            print(list(output.outputs[0].token_ids))


if __name__ == "__main__":
    main()
