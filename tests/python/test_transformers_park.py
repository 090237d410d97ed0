"""Parked and resumed, a PagedCache goes on to the tokens of a DynamicCache that was left alone."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import models_tiny as tiny  # noqa: E402
from pagedkv import InvalidState, KVCache, KVSpec, NotResident, OutOfBlocks  # noqa: E402
from pagedkv.integrations.transformers import PagedCache  # noqa: E402
from pagedkv.testing import SimulatedDevice  # noqa: E402


class Parks(transformers.LogitsProcessor):  # type: ignore[misc]
    """Parks and resumes `cache` in the middle of a generate(), between two forwards."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self.num_bytes = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.num_bytes += self._cache.park().num_bytes
        assert self._cache.kv.stats().device.num_active == 0
        self._cache.resume()
        return scores


def two_tiers(name: str = "llama") -> PagedCache:
    return PagedCache.for_model(tiny.model(name), "4MiB", host_memory="4MiB", block_size=8)


@pytest.mark.parametrize("batch", ["one", "three_padded"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_parked_after_every_forward(name: str, options: dict[str, Any], batch: str) -> None:
    model, prompt = tiny.model(name), tiny.prompts(batch)
    expected = tiny.dense(model, **prompt, **options)
    with two_tiers(name) as cache:
        parks = Parks(cache)
        found = tiny.generate(model, cache, **prompt, **options, logits_processor=[parks])
        assert found.tolist() == expected.tolist()
        assert parks.num_bytes > 0
        cache.reset()
        tiny.check_empty(cache.kv)


def test_parked_between_turns_while_another_request_uses_the_device() -> None:
    model = tiny.model("llama")
    ids = other = tiny.prompts("one")["input_ids"]
    reference = transformers.DynamicCache(config=model.config)
    with two_tiers() as cache:
        stranger = PagedCache(cache.kv)
        cache.start(ids)
        for turn in range(3):
            expected = tiny.generate(model, reference, input_ids=ids, do_sample=False)
            assert tiny.generate(model, cache, input_ids=ids, do_sample=False).equal(expected)
            cache.park()
            tiny.generate(model, stranger, input_ids=other, do_sample=False, num_beams=4)
            stranger.reset()
            assert cache.resume() == expected.shape[1] - 1
            ids = torch.cat([expected, other[:, turn : turn + 5]], dim=1)
        cache.finish(expected)
        tiny.check_empty(cache.kv)


@pytest.mark.parametrize("seed", range(5))
def test_with_copies_that_run_late_and_out_of_order(seed: int) -> None:
    model, prompt = tiny.model("llama"), tiny.prompts("one")
    options: dict[str, Any] = {"do_sample": False, "num_beams": 3}
    device = SimulatedDevice(seed)
    spec = KVSpec.from_config(model.config, dtype="float32", block_size=8)
    with KVCache(spec, device=device, num_device_blocks=40, num_host_blocks=40) as kv:
        cache = PagedCache(kv)
        found = tiny.generate(model, cache, **prompt, **options, logits_processor=[Parks(cache)])
        cache.reset()
        tiny.check_empty(kv)
    assert found.tolist() == tiny.dense(model, **prompt, **options).tolist()
    assert device.violations == []


def test_dropped_rows_are_in_nobodys_way() -> None:
    """Not of rows that come back, and on the host not of rows that leave."""
    model, prompt = tiny.model("llama"), tiny.prompts("one")
    with two_tiers() as cache:
        found = tiny.generate(model, cache, **prompt, do_sample=False)
        length = cache.get_seq_length()
        for _ in range(30):  # of which few would fit
            dropped = cache.fork()
            tiny.generate(model, dropped, input_ids=found, do_sample=False)
            dropped.park()
            del dropped
            cache.park()
            assert cache.resume() == length


def test_a_forward_on_parked_rows_says_to_resume() -> None:
    model, prompt = tiny.model("llama"), tiny.prompts("one")
    with two_tiers() as cache:
        found = tiny.generate(model, cache, **prompt, do_sample=False)
        cache.park()
        with pytest.raises(InvalidState, match="parked already"):
            cache.park()
        with pytest.raises(NotResident, match=r"resume\(\) first"):
            model(found[:, -1:], past_key_values=cache)
        assert cache.resume() == cache.resume() == found.shape[1] - 1
        model(found[:, -1:], past_key_values=cache)
        cache.park()
        cache.reset()  # parked rows can be given up
        tiny.check_empty(cache.kv)


def test_without_host_memory_and_with_too_little() -> None:
    model, prompt = tiny.model("llama"), tiny.prompts("one")
    with PagedCache.for_model(model, "4MiB") as cache:
        tiny.generate(model, cache, **prompt, do_sample=False)
        with pytest.raises(InvalidState, match="no host tier"):
            cache.park()
    with PagedCache.for_model(model, "4MiB", host_memory="16KiB") as cache:
        tiny.generate(model, cache, **prompt, do_sample=False, num_beams=4)
        with pytest.raises(OutOfBlocks, match="host tier"):
            cache.park()
        assert cache.kv.ready(cache._rows.ids)  # nothing has changed


def test_an_empty_cache_parks_nothing() -> None:
    with two_tiers() as cache:
        assert cache.park().num_bytes == 0
        assert cache.resume() == 0


def test_rows_whose_copy_failed_are_computed_again() -> None:
    model, prompt = tiny.model("llama"), tiny.prompts("one")
    device = SimulatedDevice()
    spec = KVSpec.from_config(model.config, dtype="float32", block_size=8)
    with KVCache(spec, device=device, num_device_blocks=40, num_host_blocks=40) as kv:
        cache = PagedCache(kv)
        ids = tiny.generate(model, cache, **prompt, do_sample=False)
        device.fail_copy()
        transfer = cache.park()
        while not transfer.done:
            pass
        assert transfer.error is not None
        assert cache.resume() == 0
        found = tiny.generate(model, cache, input_ids=ids, do_sample=False)
        assert found.equal(tiny.dense(model, input_ids=ids, do_sample=False))
        cache.reset()
        tiny.check_empty(kv)
