"""Latent attention (MLA) off its latents: a DeepSeek-V3-shaped model in a loop of one's own.

    python examples/latent.py                    # random weights, no download

The cache keeps one vector per token, from which the model would make keys and values of all heads,
and the part of the keys that turns with the position. Instead of making them, the matrix for keys
is applied to the queries, and that for values to what attention gives: all heads then attend to one
vector, which is its own value. So a step reads a few hundred numbers per token and layer, whatever
the number of heads; the tokens are those of `generate()`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import transformers as _transformers
from rich.console import Console

import pagedkv as pk
from pagedkv.demo.model import spread_logits

transformers: Any = _transformers  # whose types are partly missing


def random_model() -> Any:
    """Small, and always with the same weights."""
    config = transformers.DeepseekV3Config(
        vocab_size=300, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
        num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=48,
        kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    spread_logits(model)
    return model


class Loop:
    """Greedy decoding of `model`, whose attention layers read and write `kv`."""

    def __init__(self, model: Any, kv: pk.KVCache) -> None:
        self.model, self.kv = model, kv
        self.step: pk.Step | None = None
        module = transformers.models.deepseek_v3.modeling_deepseek_v3
        turn = (
            module.apply_rotary_pos_emb_interleave
            if model.config.rope_interleave
            else module.apply_rotary_pos_emb
        )
        for layer in model.model.layers:
            layer.self_attn.forward = MethodType(self._attention(turn), layer.self_attn)

    def _attention(self, turn: Callable[..., Any]) -> Callable[..., Any]:
        def forward(
            layer: Any, hidden_states: torch.Tensor, position_embeddings: Any, **rest: Any
        ) -> tuple[torch.Tensor, None]:
            num_tokens, config = hidden_states.shape[1], layer.config
            rank, nope = config.kv_lora_rank, config.qk_nope_head_dim
            q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(hidden_states)))
            q = q.view(1, num_tokens, layer.num_heads, -1).transpose(1, 2)
            latent, beside = layer.kv_a_proj_with_mqa(hidden_states).tensor_split([rank], -1)
            latent = layer.kv_a_layernorm(latent)
            turned_q, turned_k = turn(q[..., nope:], beside[:, None], *position_embeddings)

            up = layer.kv_b_proj.weight.view(layer.num_heads, -1, rank)
            up_k, up_v = up[:, :nope], up[:, nope:]  # what makes keys and values of a latent
            to_latent = torch.einsum("bhtn,hnr->thr", q[..., :nope], up_k)
            asked = torch.cat((to_latent, turned_q[0].transpose(0, 1)), -1)  # [T, heads, 32 + 8]

            assert self.step is not None
            i = layer.layer_idx
            self.kv.write(i, latent[0, :, None], turned_k[0].transpose(0, 1), self.step)
            found = self.kv.attention(i, asked, self.step, scale=layer.scaling)  # [T, heads, 32]
            values = torch.einsum("thr,hvr->thv", found, up_v)
            return layer.o_proj(values.flatten(1)[None]), None

        return forward

    @torch.no_grad()
    def run(self, prompt: torch.Tensor, num_new: int) -> list[int]:
        """The tokens after `prompt` [T], which takes what earlier ones have in common with it."""
        kv, sequence = self.kv, self.kv.create(prompt)
        new, tokens = prompt[kv.num_cached(sequence) :], []
        for _ in range(num_new):
            with kv.step([sequence], new, counts=[len(new)]) as self.step:
                logits = self.model(
                    input_ids=new[None], position_ids=self.step.positions[None], use_cache=False
                ).logits
            new = logits[0, -1:].argmax(-1)
            tokens.append(int(new))
        kv.release([sequence])
        return tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=48, help="new tokens")
    args = parser.parse_args()
    console, model = Console(), random_model()
    prompt = torch.arange(3, 90)
    expected = model.generate(prompt[None], max_new_tokens=args.tokens, do_sample=False)
    spec = pk.KVSpec.from_config(model.config)
    with pk.KVCache(spec, device_memory="8MiB") as kv:
        loop = Loop(model, kv)
        same = []
        for _ in range(2):  # the second has the first one's blocks
            same.append(loop.run(prompt, args.tokens) == expected[0, len(prompt) :].tolist())
        hits = kv.stats().num_hit_tokens
    config = model.config
    dims = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    of_heads = config.num_hidden_layers * config.num_attention_heads * dims * 4
    console.print(f"Bytes per token: {spec.token_bytes}; keys and values of all heads: {of_heads}.")
    console.print(f"Tokens of the second prompt that were there: {hits} of {len(prompt)}.")
    console.print(f"The tokens are those of generate(): {all(same)}.")
    return 0 if all(same) else 1


if __name__ == "__main__":
    raise SystemExit(main())
