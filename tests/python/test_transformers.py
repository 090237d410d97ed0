"""generate() with PagedCache gives the tokens of one with DynamicCache, and leaks nothing."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models_tiny as tiny  # noqa: E402
from pagedkv import KVCache, KVSpec  # noqa: E402
from pagedkv.integrations._forward import fold_rows  # noqa: E402
from pagedkv.integrations.transformers import PagedCache, attach  # noqa: E402

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "num_return_sequences": 4},
    "beam": {"do_sample": False, "num_beams": 4},
    "beam_return_3": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "beam_sample": {"do_sample": True, "num_beams": 4},
}
BATCHES = ("one", "three", "three_padded")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral", "gemma2"])
def test_generates_as_dense(name: str, mode: str, batch: str) -> None:
    model = tiny.model(name)
    with PagedCache.for_model(model, "4MiB", block_size=8) as cache:
        tiny.check_equal(model, cache, **tiny.prompts(batch), **MODES[mode])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generates_as_dense_with_the_models_own_attention(name: str, mode: str, batch: str) -> None:
    model = tiny.model(name)
    with PagedCache.for_model(model, "4MiB", paged_attention=False) as cache:
        tiny.check_equal(model, cache, **tiny.prompts(batch), **MODES[mode])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", MODES)
def test_generates_as_dense_on_a_model_without_hooks(mode: str, batch: str) -> None:
    model = tiny.bare_model()
    with KVCache(KVSpec.from_config(model.config, dtype="float32"), device_memory="4MiB") as kv:
        tiny.check_equal(model, PagedCache(kv), **tiny.prompts(batch), **MODES[mode])


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_prompt_lookup_crops(name: str, paged: bool) -> None:
    model, prompt = tiny.model(name), tiny.prompts("one")
    prompt["input_ids"] = prompt["input_ids"].clone()
    prompt["input_ids"][:, 20:] = prompt["input_ids"][:, :17]  # something to look up
    # Dense layers in full: with windows, which come with a config, transformers 5.0 cannot crop.
    reference = transformers.DynamicCache()
    with PagedCache.for_model(model, "4MiB", paged_attention=paged) as cache:
        tiny.check_equal(model, cache, reference, prompt_lookup_num_tokens=5, **prompt)


def test_assistant_model() -> None:
    model, assistant = tiny.model("llama"), tiny.bare_model(seed=0)
    with PagedCache.for_model(model, "4MiB") as cache:
        tiny.check_equal(model, cache, assistant_model=assistant, **tiny.prompts("one"))


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("batch", BATCHES)
def test_turns_reuse_what_is_held(name: str, batch: str) -> None:
    model, prompt = tiny.model(name), tiny.prompts(batch)

    def converse(cache: Any) -> list[torch.Tensor]:
        ids, mask, answers = prompt["input_ids"], prompt["attention_mask"], []
        for turn in range(3):
            answer = tiny.generate(
                model, cache, new=9, input_ids=ids, attention_mask=mask, eos_token_id=None
            )
            answers.append(answer)
            question = torch.full((len(answer), 4), 10 + turn)
            ids = torch.cat([answer, question], dim=1)
            mask = torch.cat([mask, torch.ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
        return answers

    expected = converse(transformers.DynamicCache(config=model.config))
    with PagedCache.for_model(model, "4MiB", block_size=8) as cache:
        found = converse(cache)
        assert [a.tolist() for a in found] == [a.tolist() for a in expected]
        assert cache.get_seq_length() == expected[-1].shape[1] - 1
        cache.kv.manager.verify()


def test_logits_are_those_of_a_dense_cache() -> None:
    """Beams of several lengths in common, several new tokens at once, padding: to 1e-4."""
    model, prompt = tiny.model("llama"), tiny.prompts("three_padded")
    cache, reference = (
        PagedCache.for_model(model, "4MiB", block_size=4),
        transformers.DynamicCache(),
    )
    mask = prompt["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    new = {**prompt, "position_ids": positions}
    with torch.no_grad(), cache:
        for chunk, order in enumerate([[0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 1, 5], [1, 0, 2, 3, 4, 5]]):
            got = model(past_key_values=cache, **new).logits
            expected = model(past_key_values=reference, **new).logits
            real = new["attention_mask"][:, -got.shape[1] :].bool()
            torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)
            index = torch.tensor(order)
            for held in (cache, reference):
                held.batch_select_indices(index)
            ids = torch.randint(3, tiny.VOCAB, (6, 1 + 2 * chunk))
            mask = torch.cat([mask[index], torch.ones_like(ids)], dim=1)
            positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
            new = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def test_equal_prompt_rows_are_computed_and_stored_once() -> None:
    model, prompt = tiny.model("llama"), tiny.prompts("three_padded")
    seen: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        with PagedCache.for_model(model, "4MiB") as cache:
            tiny.generate(model, cache, new=3, num_beams=4, eos_token_id=None, **prompt)
            assert seen == [3, 12, 12]
            stats = cache.stats()
    finally:
        handle.remove()
    # 39 tokens are 3 blocks of 16 per row: two of the prompt shared, one diverged.
    assert (stats.num_rows, stats.length) == (12, 39)
    assert stats.num_shared_blocks >= 3 * 2
    assert stats.num_blocks <= 3 * 2 + 12
    assert stats.kv_bytes == stats.num_blocks * cache.kv.spec.block_bytes
    assert stats.dense_peak_bytes == 12 * 39 * cache.kv.spec.token_bytes
    assert stats.peak_bytes < stats.dense_peak_bytes


def test_folds_only_rows_that_are_equal_in_all_inputs() -> None:
    ids = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 8], [5, 6, 7]])

    def places(num_rows: int = 0, **inputs: Any) -> list[int] | None:
        folded = fold_rows({"input_ids": ids, **inputs}, num_rows)
        return None if folded is None else folded[1].tolist()

    assert places() == [0, 0, 1, 2]  # neighbours only: what generate() repeats
    assert places(position_ids=torch.arange(3)[None]) == [0, 0, 1, 2]
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]])
    assert places(attention_mask=mask) is None
    assert places(num_rows=2) == [0, 0, 1, 2]
    assert places(num_rows=4) is None  # each row continues a row of its own
    assert places(pixel_values=torch.zeros(4, 2)) is None  # an input that it does not know
    assert places(images=[1, 2, 3, 4]) is None
    same = ids[:1].repeat(4, 1)
    folded = fold_rows({"input_ids": same, "use_cache": True}, 2)
    assert folded is not None
    assert folded[1].tolist() == [0, 0, 1, 1]  # not across rows of the cache
    assert folded[0]["input_ids"].tolist() == same[:2].tolist()
    assert fold_rows({"input_ids": same[:, :1]}, 0) is None  # one token: nothing to save


def test_model_is_left_as_it_was() -> None:
    model, prompt = tiny.bare_model(), tiny.prompts("one")
    before, expected = model.config._attn_implementation, tiny.dense(model, **prompt)
    with PagedCache.for_model(model, "4MiB") as cache:
        attach(model)  # again: no second pair of hooks
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
        tiny.generate(model, cache, num_beams=2, **prompt)
        assert model.config._attn_implementation == before
        with pytest.raises(IndexError):  # a token that the model does not have
            model(input_ids=torch.full((2, 1), 10**6), past_key_values=cache)
        assert model.config._attn_implementation == before
    assert tiny.dense(model, **prompt).tolist() == expected.tolist()
