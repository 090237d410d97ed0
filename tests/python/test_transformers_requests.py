"""PagedCache across requests: prompts computed once, forks, prefix hits."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models_tiny as tiny  # noqa: E402
from pagedkv.errors import InvalidSpec, InvalidState  # noqa: E402
from pagedkv.integrations.transformers import PagedCache  # noqa: E402
from requests_tiny import (  # noqa: E402
    PROMPT,
    dense,
    forwards,
    generate,
    held,
    other_tail,
    paged,
    prompt,
    small,
    unattached,
)

# -- a prompt computed once, and forks ------------------------------------------------------------


def test_prefill_computes_the_prompt_once_and_beams_fork_it() -> None:
    model, ids = tiny.model("llama"), prompt()
    expected = dense(model, ids, num_beams=8, new=5)
    with paged(model) as cache, forwards(model) as seen:
        cache.prefill(model, ids)
        assert seen == [(1, PROMPT - 1)]
        assert cache.stats().num_blocks == 3
        found = generate(model, cache, ids, num_beams=8, new=5)
        assert seen == [(1, PROMPT - 1)] + [(8, 1)] * 5
        assert found.tolist() == expected.tolist()
        # Eight beams share the prompt's two full blocks.
        assert cache.stats().num_shared_blocks >= 2
        assert cache.stats().num_blocks <= 2 + 8


@pytest.mark.parametrize("batch", ["three", "three_padded"])
def test_prefill_of_a_batch(batch: str) -> None:
    model, inputs = tiny.model("llama"), tiny.prompts(batch)
    expected = tiny.dense(model, num_beams=4, do_sample=False, **inputs)
    with paged(model) as cache, forwards(model) as seen:
        cache.prefill(model, **inputs)
        found = tiny.generate(model, cache, num_beams=4, do_sample=False, **inputs)
        assert found.tolist() == expected.tolist()
        assert seen[:2] == [(3, PROMPT - 1), (12, 1)]


def test_prefill_goes_on_from_what_is_held() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache, forwards(model) as seen:
        cache.prefill(model, ids[:, :20])
        cache.prefill(model, ids)
        cache.prefill(model, ids)  # nothing is left to compute
        assert seen == [(1, 19), (1, PROMPT - 20)]
        assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()


def test_what_is_dropped_gives_its_rows_back() -> None:
    model, ids = tiny.model("llama"), prompt()
    with small(model, 12) as cache:
        cache.prefill(model, ids)
        answer = generate(model, cache.fork(), ids, new=30).tolist()
        for twin_of in (PagedCache.fork, copy.deepcopy, lambda cache: PagedCache(cache.kv)):
            for _ in range(12):
                assert generate(model, twin_of(cache), ids, new=30).tolist() == answer
        dropped = cache.fork()
        with cache.kv.step([cache.kv.create()]):
            del dropped  # amid a step of somebody else's
        dropped = cache.fork()
        dropped._rows.open(1, 1, None, knows_prompt=False)
        del dropped  # amid its own
        cache.reset()
        cache.kv.create()
        cache.kv.verify()
        assert cache.kv.stats().num_sequences == 2


@pytest.mark.parametrize("twin_of", [PagedCache.fork, copy.deepcopy])
def test_forks_go_on_apart(twin_of: Any) -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.prefill(model, ids)
        before = cache.kv.stats().device.num_active
        twin = twin_of(cache)
        assert cache.kv.stats().device.num_active == before  # the same blocks
        changed = other_tail(ids, PROMPT - 1)
        assert generate(model, twin, changed).tolist() == dense(model, changed).tolist()
        assert (twin.get_seq_length(), cache.get_seq_length()) == (PROMPT + 19, PROMPT - 1)
        beams = {"num_beams": 4}
        assert generate(model, cache, ids, **beams).tolist() == dense(model, ids, **beams).tolist()
        twin.close()  # the KVCache is the first one's
        cache.reset()
        tiny.check_empty(cache.kv)


def test_a_fork_leaves_hits_as_what_it_was_forked_from() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.start(ids)
        cache.prefill(model, ids)
        twin = cache.fork()
        found = generate(model, twin, ids)
        twin.finish(found)
        cache.reset()
        assert cache.start(found) == found.shape[1] - 1 - (found.shape[1] - 1) % 16


# -- prefix hits across requests ------------------------------------------------------------------


def test_a_request_hits_what_an_earlier_one_left() -> None:
    model, ids = tiny.model("llama"), prompt()
    expected = dense(model, ids)
    with paged(model) as cache, forwards(model) as seen:
        assert cache.start(ids) == 0
        answer = generate(model, cache, ids)
        cache.finish()
        tiny.check_empty(cache.kv)
        del seen[:]
        assert cache.start(ids) == PROMPT - 1
        found = generate(model, cache, ids)
        assert seen == [(1, 1)] * 20  # one token of the prompt, and 19 of the answer
        assert found.tolist() == answer.tolist() == expected.tolist()
        cache.finish()

        changed = other_tail(ids, 20)  # a block of 16 and 4 tokens of the next in common
        assert cache.start(changed) == 20
        assert generate(model, cache, changed).tolist() == dense(model, changed).tolist()
        assert cache.stats().num_hit_tokens == PROMPT - 1 + 20


@pytest.mark.parametrize("assistant", ["lookup", "model"])
def test_assisted_decoding_goes_on_from_what_the_cache_holds(assistant: str) -> None:
    """It hands the whole prompt to the model, which computes what is missing."""
    model, ids = tiny.model("llama"), prompt()
    end = {"eos_token_id": tiny.EOS}  # without, transformers 5.0 cannot look up
    helper: dict[str, Any] = {"prompt_lookup_num_tokens": 3, **end}
    if assistant == "model":
        helper = {"assistant_model": tiny.bare_model(), **end}
    with paged(model) as cache:
        cache.prefill(model, ids)
        with forwards(model) as seen:
            answer = generate(model, cache, ids, **helper)
        assert answer.tolist() == dense(model, ids, **end).tolist()
        assert seen[0][1] < PROMPT
        longer = torch.cat([answer, prompt(6)], dim=1)  # another turn
        answer = generate(model, cache, longer, **helper)
        assert answer.tolist() == dense(model, longer, **end).tolist()
        cache.reset()
        for hit in (0, PROMPT - 1, 20):
            request = ids if hit != 20 else other_tail(ids, 20)
            assert cache.start(request) == hit
            found = generate(model, cache, request, **helper)
            assert found.tolist() == dense(model, request, **end).tolist()
            cache.finish()
        cache.start(ids)
        with pytest.raises(InvalidState, match="given another prompt"):
            generate(model, cache, other_tail(ids, 3), **helper)


def test_a_request_hits_the_answer_of_an_earlier_one() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.start(ids)
        answer = generate(model, cache, ids)
        cache.finish()
        turn = torch.cat([answer, torch.full((1, 4), 9)], dim=1)
        # 56 tokens were computed, the last of the answer was not: three blocks of 16.
        assert cache.start(turn) == 48
        seen = {"attention_mask": torch.ones_like(turn)}  # the answer may have tokens like padding
        assert generate(model, cache, turn, **seen).tolist() == dense(model, turn, **seen).tolist()


def test_a_batch_takes_the_shortest_of_its_hits() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.start(ids)
        generate(model, cache, ids)
        cache.finish()
        for begin in (20, 32, 0):
            batch = torch.cat([ids, other_tail(ids, begin)])
            hits = cache.stats().num_hit_tokens
            assert cache.start(batch) == begin
            assert cache.stats().num_hit_tokens == hits + 2 * begin
            assert generate(model, cache, batch).tolist() == dense(model, batch).tolist()
            cache.reset()
            cache.kv.clear()
            cache.start(ids)
            generate(model, cache, ids)
            cache.finish()


def test_a_padded_batch_takes_and_leaves_no_hits() -> None:
    model, inputs = tiny.model("llama"), tiny.prompts("three_padded")
    with paged(model) as cache:
        for _ in range(2):
            assert cache.start(**inputs) == 0
            found = tiny.generate(model, cache, do_sample=False, **inputs)
            cache.finish(found)
        assert found.tolist() == tiny.dense(model, do_sample=False, **inputs).tolist()
        assert cache.start(inputs["input_ids"]) == 0
        assert cache.stats().num_hit_tokens == 0
        assert cache.kv.stats().device.num_cached == 0


def test_padding_that_start_was_not_told_of_is_seen_by_its_mask() -> None:
    model, inputs = tiny.model("llama"), tiny.prompts("three_padded")
    ids = inputs["input_ids"]
    with paged(model) as cache:
        cache.start(ids)
        cache.finish(tiny.generate(model, cache, do_sample=False, **inputs))
        assert cache.start(ids) == 0
        ones = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tiny.generate(model, cache, do_sample=False, **ones)
        cache.finish()
        assert cache.start(ids) == ids.shape[1] - 1
        before = held(cache)
        with pytest.raises(InvalidState, match="by its token ids alone: its mask"):
            tiny.generate(model, cache, do_sample=False, **inputs)
        assert held(cache) == before
        cache.reset()
        with pytest.raises(
            InvalidSpec, match=r"attention_mask is torch.Size\(\[2, 3\]\), expected"
        ):
            cache.start(ids, torch.ones(2, 3))


def test_a_later_turn_with_a_mask_or_other_positions_leaves_no_hits() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache, torch.no_grad():
        for untold in (
            {"attention_mask": torch.ones(1, PROMPT)},
            {"position_ids": torch.arange(8)[None]},
        ):
            cache.clear()
            assert cache.start(ids) == 0
            model(ids[:, :-8], past_key_values=cache)
            inputs = {name: value.clone() for name, value in untold.items()}
            if "attention_mask" in inputs:
                inputs["attention_mask"][:, 3:5] = 0
            model(ids[:, -8:], past_key_values=cache, **inputs)
            cache.finish(ids)
            assert cache.start(ids) == (PROMPT - 8) // 16 * 16  # the full block before
            cache.reset()


def test_embeddings_are_not_told_by_token_ids() -> None:
    model, ids = tiny.model("llama"), prompt()
    given = torch.randn(2, 1, PROMPT, model.config.hidden_size)
    with paged(model) as cache:
        for embeddings in given:
            inputs = {"inputs_embeds": embeddings}
            assert cache.start(ids) == 0
            found = generate(model, cache, ids, **inputs)
            assert found.tolist() == dense(model, ids, **inputs).tolist()
            cache.finish(found)
        cache.start(ids)
        cache.finish(generate(model, cache, ids))
        assert cache.start(ids) == PROMPT - 1
        with pytest.raises(InvalidState, match="the model is given inputs_embeds"):
            generate(model, cache, ids, inputs_embeds=given[0])


def test_clear_is_for_weights_that_changed() -> None:
    model, ids = copy.deepcopy(tiny.model("llama")), prompt()
    with paged(model) as cache:
        for salt in (None, "adapter"):
            cache.start(ids, salt=salt)
            cache.finish(generate(model, cache, ids))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) / 20)
        cache.clear("adapter")
        assert cache.start(ids, salt="adapter") == 0
        cache.reset()
        assert cache.start(ids) == PROMPT - 1
        cache.reset()
        cache.clear()
        assert cache.start(ids) == 0
        assert generate(model, cache, ids).tolist() == dense(model, ids).tolist()


def test_finish_takes_what_generate_returned_as_a_dict() -> None:
    model, ids = tiny.bare_model(), prompt()
    with unattached(model) as cache:
        cache.start(ids)
        found = generate(model, cache, ids, return_dict_in_generate=True)
        cache.finish(found)
        assert cache.start(found.sequences) > PROMPT


def test_a_mask_of_ones_is_no_padding() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.start(ids, torch.ones_like(ids))
        generate(model, cache, ids)
        cache.finish()
        assert cache.start(ids, torch.ones_like(ids)) == PROMPT - 1


def test_salt_separates_requests() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.start(ids, salt="one tenant")
        generate(model, cache, ids)
        cache.finish()
        for salt, hit in (("another tenant", 0), (None, 0), ("one tenant", PROMPT - 1)):
            assert cache.start(ids, salt=salt) == hit
            cache.reset()


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("ends", ["finish", "finish(out)", "reset"])
def test_without_start_nothing_is_left(starts: bool, ends: str) -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        if starts:
            cache.start(ids)
        out = generate(model, cache, ids)
        if ends == "reset":
            cache.reset()
        else:
            cache.finish(out if ends == "finish(out)" else None)
        assert cache.start(ids) == (PROMPT - 1 if starts else 0)


@pytest.mark.parametrize("told", [True, False])
def test_finish_tells_the_answer_where_the_model_is_not_attached(told: bool) -> None:
    model, ids = tiny.bare_model(), prompt()
    with unattached(model) as cache:
        assert cache.start(ids) == 0
        answer = generate(model, cache, ids)
        cache.finish(answer if told else None)
        turn = torch.cat([answer, torch.full((1, 4), 9)], dim=1)
        assert cache.start(turn) == (48 if told else 32)
        assert generate(model, cache, turn).tolist() == dense(model, turn).tolist()


def test_finish_refuses_other_sequences() -> None:
    model, ids = tiny.bare_model(), prompt()
    with unattached(model) as cache:
        cache.start(ids)
        answer = generate(model, cache, ids)
        before = held(cache)
        for wrong in (answer.repeat(2, 1), answer[:, :40]):
            with pytest.raises(InvalidSpec, match="sequences must be what generate"):
                cache.finish(wrong)
            assert held(cache) == before
        cache.finish(answer)
        assert cache.start(answer) == 48


@pytest.mark.parametrize("attached", [True, False])
def test_after_beam_search_hits_are_what_was_computed(attached: bool) -> None:
    model = tiny.model("llama") if attached else tiny.bare_model()
    ids = prompt()
    with paged(model) if attached else unattached(model) as cache:
        cache.start(ids)
        best = generate(model, cache, ids, num_beams=4)
        assert best.tolist() == dense(model, ids, num_beams=4).tolist()
        cache.finish(best)
        hit = cache.start(best)
        if attached:
            assert 32 <= hit < best.shape[1]
        else:
            assert hit == 32  # the prompt's full blocks
        seen = {"attention_mask": torch.ones_like(best)}  # the answer may have tokens like padding
        assert generate(model, cache, best, **seen).tolist() == dense(model, best, **seen).tolist()


def test_start_begins_one_request_at_a_time() -> None:
    model, ids = tiny.model("llama"), prompt()
    with paged(model) as cache:
        cache.start(ids)
        before = held(cache)
        with pytest.raises(InvalidState, match="finish\\(\\) or reset\\(\\) before start"):
            cache.start(ids)
        assert held(cache) == before
        cache.reset()
        for wrong in (ids[0], ids[:, :0], ids[:0]):
            with pytest.raises(InvalidSpec, match="input_ids must be \\[batch, tokens\\]"):
                cache.start(wrong)
        tiny.check_empty(cache.kv)
