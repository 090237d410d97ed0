"""Small random models and prompts, and the comparison that all tests of the integration make."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pagedkv import KVCache
from pagedkv.demo.model import spread_logits
from pagedkv.integrations.transformers import PagedCache

VOCAB, EOS, PAD = 300, 2, 0
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
# Prompts and answers are longer than this window, so that it cuts.
_WINDOW = 24


@functools.cache
def model(name: str) -> Any:
    """The model of this name: always the same weights, float32, in eval mode."""
    torch.manual_seed(0)
    if name == "llama":
        made = LlamaForCausalLM(LlamaConfig(**_COMMON))
    elif name == "qwen3":
        made = Qwen3ForCausalLM(Qwen3Config(**_COMMON, head_dim=16))
    elif name == "gpt2":
        made = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=256)
        )
    elif name == "mistral":
        made = MistralForCausalLM(MistralConfig(**_COMMON, sliding_window=_WINDOW))
    elif name == "gemma2":  # windowed and full layers in turn, softcap
        made = Gemma2ForCausalLM(
            Gemma2Config(**_COMMON, head_dim=16, sliding_window=_WINDOW, query_pre_attn_scalar=16)
        )
    else:
        raise AssertionError(name)
    spread_logits(made)
    return made.eval()


def bare_model(seed: int = 1) -> Any:
    """A Llama of its own for each call: no cache has attached its hooks to it."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_COMMON)).eval()


def prompts(batch: str, length: int = 37) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a batch "one", "three", or "three_padded" on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (1 if batch == "one" else 3, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch == "three_padded":
        mask[0, :5] = 0
        mask[2, :18] = 0
        ids[mask == 0] = PAD
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, cache: Any, new: int = 20, **options: Any) -> torch.Tensor:
    """Tokens of a seeded generate(): [rows, prompt + new]."""
    torch.manual_seed(7)
    options.setdefault("eos_token_id", EOS)
    return model.generate(past_key_values=cache, max_new_tokens=new, pad_token_id=PAD, **options)


def dense(model: Any, reference: Any = None, **options: Any) -> torch.Tensor:
    if reference is None:
        reference = DynamicCache(config=model.config)
    return generate(model, reference, **options)


def check_empty(kv: KVCache) -> None:
    """Nothing is held any more, and every count adds up."""
    kv.manager.verify()
    assert kv.stats().num_sequences == 0
    assert kv.stats().device.num_active == 0


def check_equal(model: Any, cache: PagedCache, reference: Any = None, **options: Any) -> None:
    """`cache` gives the tokens of a DynamicCache, and nothing is left after a reset."""
    expected = dense(model, reference, **options)
    found = generate(model, cache, **options)
    assert found.tolist() == expected.tolist()
    cache.kv.manager.verify()
    cache.reset()
    check_empty(cache.kv)
