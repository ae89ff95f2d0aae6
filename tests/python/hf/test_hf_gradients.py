"""Gradients: a backward through pages, which have no graph, raises; others equal those of `DynamicCache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from hf.families import CACHE_NAME, decode, kvarn_cache, make_model, prompt
from kvarn_rs.errors import UnsupportedError
from kvarn_rs.hf import KvarnCache
from kvarn_rs.hf.attention import kvarn_attention

pytestmark = pytest.mark.filterwarnings("ignore::kvarn_rs.hf.DenseFallbackWarning")

# name: which parameters are trained
TRAINED: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "q": lambda name: "q_proj" in name,
    "k": lambda name: "k_proj" in name,
    "v": lambda name: "v_proj" in name,
    "v_of_the_last_layer": lambda name: "2.self_attn.v_proj" in name,
    "v_and_head": lambda name: "v_proj" in name or "lm_head" in name,
    "o": lambda name: "o_proj" in name,
    "o_of_the_last_layer": lambda name: "2.self_attn.o_proj" in name,
    "embedding": lambda name: "embed_tokens" in name,
    "head": lambda name: "lm_head" in name,
    "last_mlp": lambda name: "2.mlp" in name,
}
HARMLESS = {"o_of_the_last_layer", "head", "last_mlp"}  # after all K and V
LENGTH = 20


def make_trained(family: str, trained: str) -> Any:
    model = make_model(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[trained](name))
    return model


def whole_mask(kind: str) -> torch.Tensor | None:
    """None, or an additive 4-D mask that hides some of the past."""
    if kind == "none":
        return None
    seen = torch.ones(LENGTH, LENGTH).tril().bool()
    seen[10:, :5] = False
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def gradients(model: Any, cache: Any, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = prompt(1, LENGTH)
    model(input_ids=ids, labels=ids, attention_mask=mask, **{CACHE_NAME: cache}).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("mask", ["none", "own"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("implementation", ["kvarn", "eager", "sdpa"])
@pytest.mark.parametrize("trained", TRAINED)
def test_a_backward_raises_or_is_that_of_a_dynamic_cache(trained, implementation, mode, mask):
    model = make_trained("llama", trained)
    model.train(mode == "train")
    model.set_attn_implementation("eager")
    expected = gradients(model, transformers.DynamicCache(config=model.config), whole_mask(mask))
    cache = kvarn_cache(model)
    model.set_attn_implementation(implementation)
    if trained in HARMLESS:
        actual = gradients(model, cache, whole_mask(mask))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    else:
        with pytest.raises(UnsupportedError, match="unquantized cache"):
            gradients(model, cache, whole_mask(mask))


@pytest.mark.parametrize("implementation", ["kvarn", "eager"])
def test_a_forward_without_a_backward_is_fine(implementation):
    model = make_trained("qwen3_mixed", "v")
    expected = decode(model, kvarn_cache(model), prompt(2, 30), 20)
    cache = kvarn_cache(model)
    model.set_attn_implementation(implementation)
    ids, tokens = prompt(2, 30), []
    for _ in range(20):
        logits = model(input_ids=ids, **{CACHE_NAME: cache}).logits
        assert logits.requires_grad
        ids = logits[:, -1:].argmax(-1)
        tokens.append(ids)
    assert torch.equal(torch.cat(tokens, 1), expected)
    assert cache.stats()["dropped_forwards"] == 0


@pytest.mark.parametrize("implementation", ["kvarn", "sdpa"])
def test_lora_on_v_is_refused(implementation):
    class Lora(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.a = torch.nn.Linear(base.in_features, 2, bias=False)
            self.b = torch.nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.b(self.a(x))

    model = make_model("llama").requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.v_proj = Lora(layer.self_attn.v_proj)
    for mode in (False, True):
        model.train(mode)
        cache = kvarn_cache(model)
        model.set_attn_implementation(implementation)
        with pytest.raises(UnsupportedError, match="unquantized cache"):
            gradients(model, cache)


def test_gradients_of_sinks_alone_are_refused():
    model = make_model("gpt_oss")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("2.self_attn.sinks" in name)
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        gradients(model, kvarn_cache(model))


def test_gradients_through_shared_k_and_v_are_refused():
    model = make_model("gemma4_shared").requires_grad_(False)
    model.model.layers[1].self_attn.v_proj.requires_grad_(True)
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()  # so that only the sharing layer carries a gradient
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        gradients(model, kvarn_cache(model))


@pytest.mark.parametrize("implementation", ["kvarn", "eager"])
@pytest.mark.parametrize("trained", ["v", "k", "embedding"])
def test_k_and_v_of_an_earlier_forward_are_not_forgotten(trained, implementation):
    """What is trained is frozen after the first forward: the second one's loss depends on it all the same."""
    model = make_trained("llama", trained)
    cache = kvarn_cache(model)
    model.set_attn_implementation(implementation)
    model(input_ids=prompt(1, LENGTH), **{CACHE_NAME: cache})
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        gradients(model, cache)
    cache.crop(-3)
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        gradients(model, cache)
    cache.reset()
    with torch.no_grad():  # a prefix that is a constant, and a forward that raised
        model.requires_grad_(True)
        model(input_ids=prompt(1, LENGTH), **{CACHE_NAME: cache})
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=prompt(1, LENGTH), **{CACHE_NAME: cache})
    hook.remove()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="dropped a forward"):
        assert set(gradients(model, cache)) == {"lm_head.weight"}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("implementation", ["kvarn", "eager"])
@pytest.mark.parametrize("trained", ["all", "v", "last_mlp"])
def test_a_forward_cannot_be_run_again_within_a_backward(trained, implementation, reentrant):
    model = make_trained("llama", trained)
    cache = kvarn_cache(model)
    model.set_attn_implementation(implementation)
    embedded = model.get_input_embeddings()(prompt(1, LENGTH)).detach().requires_grad_(True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x, **{CACHE_NAME: cache}).logits

    logits = checkpoint(run, embedded, use_reentrant=reentrant)
    assert isinstance(logits, torch.Tensor)
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        logits.sum().backward()
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("half", ["keys", "values"])
@pytest.mark.parametrize("when", ["within", "after", "later"])
def test_a_loss_on_k_and_v_that_were_read_is_refused(half, when):
    model = make_trained("llama", "k" if half == "keys" else "v")
    cache: KvarnCache = kvarn_cache(model)
    read: list[torch.Tensor] = []
    if when == "within":
        model.model.layers[1].self_attn.register_forward_hook(
            lambda *_: read.append(getattr(cache.layers[1], half)) if not read else None
        )
    model(input_ids=prompt(1, LENGTH), **{CACHE_NAME: cache})
    if when == "later":
        cache.crop(-2)
    loss = (read or [getattr(cache.layers[1], half)])[0].sum()
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        loss.backward()
    with torch.no_grad():
        assert not getattr(cache.layers[1], half).requires_grad


def test_gradients_requested_by_name_are_refused():
    model = make_trained("llama", "v_and_head")
    loss = model(input_ids=prompt(1, LENGTH), **{CACHE_NAME: kvarn_cache(model)}).logits.sum()
    (head,) = torch.autograd.grad(loss, [model.lm_head.weight], retain_graph=True)
    assert head.abs().sum() > 0
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        torch.autograd.grad(loss, [model.model.layers[0].self_attn.v_proj.weight], allow_unused=True)


@pytest.mark.parametrize("learned", ["scaling", "softcap"])
def test_a_learned_scale_is_refused(learned):
    cache = kvarn_cache(make_model("llama"))
    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    key, value = cache.update(k, v, 0)
    scale = {learned: torch.tensor(0.5, requires_grad=True)}
    out, _ = kvarn_attention(torch.nn.Identity().eval(), q, key, value, None, **scale)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        out.sum().backward()


@pytest.mark.parametrize("is_grad_enabled", [True, False])
@pytest.mark.parametrize("implementation", ["kvarn", "eager"])
def test_tangents_are_refused_and_change_nothing(implementation, is_grad_enabled):
    model = make_model("llama")
    cache = kvarn_cache(model)
    model.set_attn_implementation(implementation)
    embedded = model.get_input_embeddings()(prompt(1, LENGTH)).detach()
    with torch.set_grad_enabled(is_grad_enabled), forward_ad.dual_level():
        dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
        with pytest.raises(UnsupportedError, match="unquantized cache"):
            model(inputs_embeds=dual, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 0


def test_a_tangent_of_the_queries_alone_is_refused():
    cache = kvarn_cache(make_model("llama"))
    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    with forward_ad.dual_level():
        key, value = cache.update(k, v, 0)
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(UnsupportedError, match="unquantized cache"):
            kvarn_attention(torch.nn.Identity().eval(), dual, key, value, None)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_of_functions_are_refused(transform):
    model = make_model("llama")
    cache = kvarn_cache(model)

    def run(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x[None], **{CACHE_NAME: cache}).logits.sum()

    embedded = model.get_input_embeddings()(prompt(1, LENGTH)).detach()
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        transform(run)(embedded if transform is torch.func.vmap else embedded[0])
    assert cache.get_seq_length() == 0
