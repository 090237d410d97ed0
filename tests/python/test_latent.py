"""Layers that keep a latent vector per token, of which their keys and values are made."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from pagedkv.attention import BACKENDS  # noqa: E402
from pagedkv.graphs import DecodeGraph, Padded  # noqa: E402

HEADS, NOPE, RANK, ROPE, OUT = 4, 12, 32, 8, 20
SCALE = (NOPE + ROPE) ** -0.5
SPEC = pk.KVSpec(layers=[pk.LayerSpec("latent", 1, RANK, ROPE, "float32")], block_size=4)


class Layer:
    """Multi-head latent attention as DeepSeek-V2 has it, both ways."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(3)
        self.up_k, self.up_v = self.randn(HEADS, NOPE, RANK), self.randn(HEADS, OUT, RANK)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def expanded(self, q: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """The last queries [n, H, NOPE + ROPE] over all tokens, by keys and values of each head."""
        k = torch.einsum("tr,hnr->thn", latent, self.up_k)
        k = torch.cat((k, rope[:, None].expand(-1, HEADS, -1)), -1)
        v = torch.einsum("tr,hvr->thv", latent, self.up_v)
        scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
        at = torch.arange(len(k) - len(q), len(k))[:, None]
        weights = scores.masked_fill(torch.arange(len(k)) > at, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khv->qhv", weights, v)

    def absorbed(self, q: torch.Tensor) -> torch.Tensor:
        """The same queries as such to the latents."""
        latent = torch.einsum("qhn,hnr->qhr", q[..., :NOPE], self.up_k)
        return torch.cat((latent, q[..., NOPE:]), -1)

    def values(self, found: torch.Tensor) -> torch.Tensor:
        return torch.einsum("qhr,hvr->qhv", found, self.up_v)


@pytest.mark.parametrize("backend", ["gather", "blockwise", "auto"])
def test_it_is_attention_to_the_keys_and_values_that_latents_stand_for(backend: str) -> None:
    layer = Layer()
    latent, rope = layer.randn(19, RANK), layer.randn(19, ROPE)
    q = layer.randn(19, HEADS, NOPE + ROPE)
    with pk.KVCache(SPEC, num_device_blocks=20) as kv:
        assert kv.spec.token_bytes == 4 * (RANK + ROPE)
        seq = kv.create()
        for at, count in ((0, 13), (13, 5), (18, 1)):
            new = slice(at, at + count)
            with kv.step([seq], counts=[count]) as step:
                kv.write(0, latent[new, None], rope[new, None], step)
                asked = layer.absorbed(q[new])
                found = kv.attention(0, asked, step, scale=SCALE, backend=backend)
            assert found.shape == (count, HEADS, RANK)
            seen = slice(at + count)
            expected = layer.expanded(q[new], latent[seen], rope[seen])
            torch.testing.assert_close(layer.values(found), expected, atol=1e-4, rtol=1e-4)


def test_a_decode_step_for_graphs() -> None:
    layer = Layer()
    latent, rope = layer.randn(3, 1, RANK), layer.randn(3, 1, ROPE)
    q = layer.randn(3, HEADS, NOPE + ROPE)
    at: dict[str, int] = {"token": 0}

    def model(step: Padded) -> torch.Tensor:
        i = at["token"]
        step.write(0, latent[i : i + 1].expand(2, -1, -1), rope[i : i + 1].expand(2, -1, -1))
        asked = layer.absorbed(q[i : i + 1]).expand(2, -1, -1)
        says = rf"expected \[2, query heads, {RANK + ROPE}\]"
        for wrong in (asked[:1], asked[..., :-1]):
            with pytest.raises(pk.InvalidSpec, match=says):
                step.attention(0, wrong, scale=SCALE)
        return step.attention(0, asked, scale=SCALE)

    with pk.KVCache(SPEC, num_device_blocks=20) as kv:
        seq, decode = kv.create(), DecodeGraph(kv, model, num_rows=2, width=8)
        for token in range(3):
            at["token"] = token
            with kv.step([seq], [token]) as step:
                found = decode(step)
            seen = slice(token + 1)
            expected = layer.expanded(q[token : token + 1], latent[seen, 0], rope[seen, 0])
            torch.testing.assert_close(layer.values(found), expected, atol=1e-4, rtol=1e-4)


def test_an_engine_s_own_tensor_of_both_parts() -> None:
    """As vLLM and FlashMLA have it: one row for each token."""
    mine = torch.zeros(11, 4, RANK + ROPE)
    layer = Layer()
    with pk.KVCache(SPEC, tensors=[(mine[..., None, :RANK], mine[..., None, RANK:])]) as kv:
        seq = kv.create()
        with kv.step([seq], counts=[3]) as step:
            slots = step.slots
        mine.flatten(0, 1)[slots] = layer.randn(3, RANK + ROPE)
        twin = kv.fork(seq, 2)[1]
        with kv.step([twin], counts=[1]):
            pass
        table, copy = kv.block_table(seq)[0], kv.block_table(twin)[0]
        assert table != copy
        assert torch.equal(mine[table, :3], mine[copy, :3])
        assert mine[table, :3].any()


def test_what_nobody_can_know_is_asked_for() -> None:
    q = torch.zeros(1, HEADS, RANK + ROPE)
    with (
        pk.KVCache(SPEC, num_device_blocks=4) as kv,
        kv.step([kv.create()], counts=[1]) as step,
    ):
        with pytest.raises(pk.InvalidSpec, match="scale is None, and a latent layer"):
            kv.attention(0, q, step)
        for scale in ("a", float("nan"), float("inf")):
            with pytest.raises(pk.InvalidSpec, match="expected a finite number"):
                kv.attention(0, q, step, scale=scale)  # type: ignore[arg-type]
        with pytest.raises(pk.InvalidSpec, match=rf"expected \[1, query heads, {RANK + ROPE}\]"):
            kv.attention(0, q[..., :RANK], step, scale=1.0)
        for name in set(BACKENDS) - {"gather", "blockwise", "varlen", "flashinfer", "flash_attn"}:
            with pytest.raises(pk.InvalidSpec, match=f'"{name}" does not attend over latents'):
                kv.attention(0, q, step, scale=1.0, backend=name)


def test_chunked_layers_are_held_and_want_a_mask() -> None:
    layer = pk.LayerSpec("chunked", 2, 8, 8, "float32", window=4)
    q = torch.randn(6, 2, 8)
    with pk.KVCache(pk.KVSpec(layers=[layer], block_size=4), num_device_blocks=4) as kv:
        with kv.step([kv.create()], counts=[6]) as step:
            kv.write(0, q, q, step)
            with pytest.raises(pk.InvalidSpec, match="6 tokens are more than a chunk of 4"):
                kv.attention(0, q, step)
            at = torch.arange(6)
            mask = (at <= at[:, None]) & (at >= at[:, None] // 4 * 4)
            found = kv.attention(0, q, step, attn_mask=mask)
        rows: Any = q.transpose(0, 1)
        dense = torch.nn.functional.scaled_dot_product_attention
        torch.testing.assert_close(found, dense(rows, rows, rows, mask).transpose(0, 1))
        with kv.step([kv.create()], counts=[4]) as step:  # as many as a chunk has
            kv.write(0, q[:4], q[:4], step)
            found = kv.attention(0, q[:4], step)
        first = rows[:, :4]
        expected = dense(first, first, first, is_causal=True)
        torch.testing.assert_close(found, expected.transpose(0, 1))


def test_the_spec_of_a_config() -> None:
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 2, "num_attention_heads": 4,
        "hidden_size": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "dtype": "bfloat16",
    }  # fmt: skip
    spec = pk.KVSpec.from_config(config)
    assert spec.layers == (pk.LayerSpec("latent", 1, 512, 64, "bfloat16"),) * 2
    assert spec.token_bytes == 2 * 576 * 2
    assert (spec.layers[0].query_dim, spec.layers[0].output_dim) == (576, 512)
