"""PagedCache and models that do with their keys, their calls and their copies as they like."""

from __future__ import annotations

import copy
import functools
import io
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache  # noqa: E402

import models_tiny as tiny  # noqa: E402
from pagedkv.errors import InvalidSpec, InvalidState  # noqa: E402
from pagedkv.integrations.transformers import PagedCache  # noqa: E402
from requests_tiny import dense, generate, paged, prompt, unattached  # noqa: E402


def other_model(name: str, **options: Any) -> Any:
    config = AutoConfig.for_model(
        name, vocab_size=tiny.VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["diffllama", "doge"])
def test_layers_that_read_their_values_apart(name: str, beams: int) -> None:
    """They get them all, gathered."""
    model, ids = other_model(name, **({"keep_window_size": 4} if name == "doge" else {})), prompt()
    with paged(model) as cache:
        found = generate(model, cache, ids, num_beams=beams)
    assert found.tolist() == dense(model, ids, num_beams=beams).tolist()


def test_paged_attention_forced_on_a_model_that_halves_its_values_says_so() -> None:
    model = other_model("diffllama")
    with (
        PagedCache.for_model(model, "4MiB", paged_attention=True) as cache,
        pytest.raises(InvalidState, match="paged_attention=False for this model"),
    ):
        generate(model, cache, prompt())


LATENTS = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 20, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("batch", ["one", "three_padded"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_latents(name: str, beams: int, batch: str) -> None:
    """The cache keeps what the layers hand over: latents, or what older versions make of them."""
    model = other_model(name, **LATENTS)
    with paged(model) as cache:
        layer = cache.kv.spec.layers[0]
        kept = layer.kind, layer.num_kv_heads, layer.k_dim, layer.v_dim
        assert kept in [("latent", 1, 16, 8), ("full", 4, 24, 20)]
        tiny.check_equal(model, cache, num_beams=beams, **tiny.prompts(batch))
        ids = prompt()
        cache.start(ids)
        found = generate(model, cache, ids, num_beams=beams)
        cache.finish(found)
        assert cache.start(ids) > 0
        assert generate(model, cache, ids, num_beams=beams).tolist() == found.tolist()


@pytest.mark.parametrize("chunk", [16, 40, 1000])
@pytest.mark.parametrize("batch", ["one", "three_padded"])
@pytest.mark.parametrize("beams", [1, 3])
def test_layers_that_see_their_chunk(beams: int, batch: str, chunk: int) -> None:
    """Prompt and answer in several chunks, the answer beyond the first one, and all in one."""
    model = other_model(
        "llama4_text", attention_chunk_size=chunk, num_local_experts=2, num_key_value_heads=2,
        intermediate_size_mlp=96, head_dim=16,
    )  # fmt: skip
    with paged(model) as cache:
        assert {layer.kind for layer in cache.kv.spec.layers} >= {"chunked"}
        tiny.check_equal(model, cache, num_beams=beams, **tiny.prompts(batch))


def test_asking_a_model_for_what_it_hands_over_leaves_it_as_it_was() -> None:
    model = other_model("deepseek_v3", **LATENTS, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with paged(model) as cache:
        assert cache.kv.spec.token_bytes > 0
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == modes


def test_keys_and_values_of_every_head_instead_of_latents_are_told() -> None:
    model = other_model("deepseek_v3", **LATENTS)
    for layer in model.model.layers:
        attention = layer.self_attn

        def forward(hidden_states: Any, past_key_values: Any, layer: int, **rest: Any) -> Any:
            past_key_values.update(torch.zeros(1, 4, 1, 24), torch.zeros(1, 4, 1, 20), layer)
            return hidden_states, None

        attention.forward = functools.partial(forward, layer=attention.layer_idx)
    with pytest.warns(RuntimeWarning, match="1,408 bytes per token, and not 192"):
        cache = paged(model)
    assert {layer.kind for layer in cache.kv.spec.layers} == {"full"}
    cache.close()


def test_a_model_that_keeps_more_beside_its_latents_is_refused() -> None:
    model = other_model("deepseek_v3", **LATENTS)
    attention = model.model.layers[1].self_attn
    whole = attention.forward

    def indexed(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs["past_key_values"]
        if hasattr(cache, "update_indexer"):
            cache.update_indexer(torch.zeros(1, 1, 8), attention.layer_idx)
        return whole(*args, **kwargs)

    attention.forward = indexed
    with pytest.raises(InvalidSpec, match="keeps an index beside its latents"):
        PagedCache.for_model(model, "4MiB")
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(InvalidSpec, match="weights are on meta"):
        PagedCache.for_model(copy.deepcopy(model).to("meta"), "4MiB")
    with pytest.raises(InvalidSpec, match=r"layers \[0\] use a cache, and its config has 2"):
        PagedCache.for_model(model, "4MiB")


@torch.no_grad()
def test_arguments_by_position_are_those_by_name() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.start(ids)
        with pytest.raises(InvalidState, match="start\\(\\) was given another prompt"):
            model((ids + 1) % tiny.VOCAB, past_key_values=cache)
        model(ids, None, None, cache)  # the cache, too
        cache.finish()
        assert cache.start(ids) > 0
        cache.reset()
        batch = ids.repeat(4, 1)
        model(batch, past_key_values=cache)
        assert cache.stats().num_rows == 4
        assert cache.stats().num_shared_blocks == cache.stats().num_blocks  # computed once


@torch.no_grad()
def test_embeddings_instead_of_the_prompt_that_was_started_leave_no_hits() -> None:
    model, ids = tiny.model("llama"), prompt()
    other = (ids + 1) % tiny.VOCAB
    with paged(model) as cache:
        cache.start(ids)
        model(inputs_embeds=model.get_input_embeddings()(other), past_key_values=cache)
        cache.finish()
        assert cache.start(ids) == 0
        cache.reset()
        assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()


def test_a_copy_of_an_attached_model_is_a_model() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model):
        twin = copy.deepcopy(model)
        torch.save(twin, io.BytesIO())
        with unattached(twin) as cache:
            assert generate(twin, cache, ids).tolist() == dense(model, ids).tolist()
        with paged(twin) as cache:
            found = generate(twin, cache, ids, num_beams=3)
    assert found.tolist() == dense(model, ids, num_beams=3).tolist()
    assert model.config._attn_implementation == twin.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("paged_ones", [1, 3])
def test_threads_may_share_a_model(paged_ones: int) -> None:
    """Each with a cache of its own, or with none of ours."""
    model = tiny.model("llama")
    prompts = [torch.randint(3, tiny.VOCAB, (1, 20 + i)) for i in range(3)]
    expected = [dense(model, ids).tolist() for ids in prompts]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(6):
                if i < paged_ones:
                    with PagedCache.for_model(model, "4MiB") as cache:
                        found = generate(model, cache, prompts[i])
                else:
                    found = dense(model, prompts[i])
                if found.tolist() != expected[i]:
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert model.config._attn_implementation == "sdpa"


def test_an_interrupt_in_a_forward_leaves_the_model_usable() -> None:
    model, ids = tiny.model("llama"), prompt()
    expected = dense(model, ids).tolist()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with paged(model) as cache:
        generate(model, cache, ids, new=4)
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(input_ids=ids[:, :1], past_key_values=cache)
        hook.remove()
        with torch.no_grad():
            inner = model.model(input_ids=ids).last_hidden_state  # around the hooks
        assert dense(model, ids).tolist() == expected
        assert model.config._attn_implementation == "sdpa"
        with torch.no_grad():
            torch.testing.assert_close(model.model(input_ids=ids).last_hidden_state, inner)
        cache.reset()
        assert generate(model, cache, ids).tolist() == expected


def test_gradients_are_right_where_k_and_v_need_none_and_else_refused() -> None:
    model, ids = copy.deepcopy(tiny.model("llama")), prompt()

    def loss(cache: Any, begin: int) -> Any:
        with torch.no_grad():
            model(input_ids=ids[:, :begin], past_key_values=cache)
        return model(input_ids=ids[:, begin:], past_key_values=cache).logits.square().sum()

    with paged(model) as cache:
        found = loss(cache, 30)  # as inference that forgot no_grad() has it
        torch.testing.assert_close(found, loss(DynamicCache(), 30))
        with pytest.raises(InvalidState, match="keeps K and V without gradients"):
            found.backward()
        cache.reset()
        learned = []
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad = "layers.1" in name and "q_proj" in name
            learned += [parameter] if parameter.requires_grad else []
        assert learned
        ours = torch.autograd.grad(loss(cache, 30), learned)
        theirs = torch.autograd.grad(loss(DynamicCache(), 30), learned)
        assert all(g.abs().sum() > 0 for g in theirs)
        torch.testing.assert_close(ours, theirs)


def test_what_backward_needs_is_not_overwritten_by_the_next_forward() -> None:
    model, ids = other_model("llama", num_key_value_heads=4), prompt()  # so K and V go in as kept
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1" in name and "q_proj" in name

    def gradients(cache: Any) -> Any:
        with torch.no_grad():
            model(input_ids=ids[:, :20], past_key_values=cache)
        loss = model(input_ids=ids[:, 20:30], past_key_values=cache).logits.square().sum()
        with torch.no_grad():
            model(input_ids=ids[:, 30:], past_key_values=cache)
        return torch.autograd.grad(loss, model.model.layers[1].self_attn.q_proj.weight)

    with paged(model) as cache:
        torch.testing.assert_close(gradients(cache), gradients(DynamicCache()))


@torch.no_grad()
def test_attention_weights_are_there_where_they_are_asked_for() -> None:
    model, ids = copy.deepcopy(tiny.model("llama")), prompt()
    model.set_attn_implementation("eager")
    with paged(model) as cache:
        model(input_ids=ids[:, :-1], past_key_values=cache)
        found = model(input_ids=ids[:, -1:], past_key_values=cache, output_attentions=True)
    expected = model(input_ids=ids, output_attentions=True)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, -1:])
