"""The simulator against its naive twins, and against published figures."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pagedkv
from naive_simulator import BitmapBuddy, lru_hits, paged_by_the_token
from pagedkv import InvalidSpec, ServiceModel, SimulationSetting, simulate
from pagedkv.simulator import Request, Trace, hit_rates, synthetic_trace
from pagedkv.simulator.contiguous import Buddy
from pagedkv.simulator.lengths import SYNTHETIC
from pagedkv.simulator.memory import CATEGORIES
from pagedkv.simulator.paged import PagedMemory
from pagedkv.simulator.scheduler import Scheduler
from pagedkv.simulator.setting import POLICIES

# A step is a second, whatever is in it: times can be counted by hand.
SECONDS = ServiceModel(step_seconds=1.0, context_seconds=0.0, token_seconds=0.0, copy_bandwidth=1e9)


def trace_of(*rows: tuple[float, int, int]) -> Trace:
    return Trace("small", tuple(Request(*row) for row in sorted(rows)))


def of(trace: Trace | str, policy: str, service: ServiceModel | None = None, **values: Any) -> Any:
    report = simulate(trace, SimulationSetting(**values), policies=[policy], service=service)
    return report.policy(policy)


requests = st.tuples(st.integers(0, 30).map(float), st.integers(1, 40), st.integers(0, 25))
traces = st.lists(requests, min_size=1, max_size=25).map(lambda rows: trace_of(*rows))


@given(
    st.integers(1, 150),
    st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=40),
)
def test_the_buddy_allocator_is_that_of_a_bitmap(
    num_slots: int, calls: list[tuple[bool, int]]
) -> None:
    buddy, bitmap = Buddy(num_slots), BitmapBuddy(num_slots)
    taken: list[tuple[int, int]] = []
    for takes, size in calls:
        if takes or not taken:
            start = buddy.take(size)
            assert start == bitmap.take(size)
            if start is not None:
                taken.append((start, size))
        else:
            chunk = taken.pop(size % len(taken))
            buddy.give(*chunk)
            bitmap.give(*chunk)
        assert buddy.num_free == bitmap.taken.count(False)


@settings(max_examples=60, deadline=None)
@example(trace_of((0.0, 2, 0), (0.0, 2, 1)), 1, 0, 0.0)  # the first ends when it begins
@given(traces, st.integers(1, 8), st.integers(0, 10), st.sampled_from([0.0, 0.25]))
def test_paged_is_what_one_token_after_the_other_gives(
    trace: Trace, block_size: int, spare: int, token: float
) -> None:
    """Times, preemptions, recomputed tokens, and the tokens in memory on average."""
    watermark = 1
    num_blocks = max(-(-r.num_tokens // block_size) for r in trace.requests) + watermark + spare
    share = (watermark + 0.5) / num_blocks
    setting = SimulationSetting(
        num_slots=num_blocks * block_size, block_size=block_size, watermark=share
    )
    assert setting.watermark_blocks == watermark
    service = ServiceModel(1.0, 0.0, token)
    found = simulate(trace, setting, policies=["paged"], service=service).policies[0]
    naive = paged_by_the_token(trace, num_blocks, block_size, watermark, 1.0, token)
    assert found.num_finished == len(trace.requests)
    assert found.seconds == pytest.approx(naive.seconds)
    assert found.num_preempted == naive.num_preempted
    if naive.seconds:
        slots = num_blocks * block_size
        assert found.shares["tokens"] == pytest.approx(naive.mean_tokens / slots, abs=1e-9)
    assert found.num_recomputed_tokens == naive.num_recomputed
    waited = list(naive.waited.values())
    assert found.queueing.mean == pytest.approx(np.mean(waited), abs=1e-9)
    assert found.queueing.p99 == pytest.approx(np.percentile(waited, 99), abs=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15, deadline=None)
@given(trace=traces, width=st.sampled_from([(1, 1), (3, 1), (1, 3)]), seed=st.integers(0, 5))
def test_every_policy_ends_every_request_that_fits(
    policy: str, trace: Trace, width: tuple[int, int], seed: int
) -> None:
    """And shares of the memory are shares: none is negative, and they sum to 1."""
    samples, beams = width
    setting = SimulationSetting(
        num_slots=300, block_size=4, samples=samples, beams=beams, max_batch=12, seed=seed
    )
    report = simulate(trace, setting, policies=[policy]).policies[0]
    assert report.num_finished + report.num_refused + report.num_too_long == len(trace.requests)
    assert set(report.shares) == set(CATEGORIES)
    assert sum(report.shares.values()) == pytest.approx(1.0)
    assert min(report.shares.values()) >= 0
    assert 0 <= report.saved_by_sharing < 1
    assert report.max_batch <= 12
    if policy.startswith("contiguous"):
        assert report.num_preempted == 0


@pytest.mark.parametrize(("samples", "beams"), [(1, 1), (4, 1), (1, 4)])
@pytest.mark.parametrize("preempt", ["swap", "recompute"])
def test_the_manager_is_sound_after_a_run_under_pressure(
    samples: int, beams: int, preempt: Any
) -> None:
    trace = synthetic_trace("sharegpt", 80, seed=1)
    setting = SimulationSetting(
        num_slots=10_000, host_slots=100_000, samples=samples, beams=beams, preempt=preempt
    )
    memory = PagedMemory("swap", trace, setting, ServiceModel(), 2048)
    report = Scheduler("swap", memory, trace, ServiceModel(), setting, 2048).run()
    manager = memory._manager
    manager.verify()
    stats = manager.stats()
    assert stats.num_sequences == 0
    assert stats.device.num_active == stats.host.num_active == 0
    assert report.num_preempted > 0
    assert (report.num_swapped_bytes > 0) == (preempt == "swap")
    assert (report.num_recomputed_tokens > 0) == (preempt == "recompute")
    copied = stats.num_swapped_out_blocks + stats.num_swapped_in_blocks
    assert report.num_swapped_bytes == copied * 16 * 819_200


def test_a_schedule_by_hand() -> None:
    """Three requests that need 3 blocks in a memory of 5: one can run at a time, two can begin."""
    trace = trace_of((0, 8, 4), (0, 8, 4), (1, 8, 4))
    report = of(trace, "paged", SECONDS, num_slots=20, block_size=4, watermark=0.0)
    # The second is preempted at once and waits for the first, the third for the second.
    assert report.num_preempted == 2
    assert report.num_recomputed_tokens == 16
    assert report.seconds == 12.0
    assert report.queueing.mean == pytest.approx((0 + 0 + 3) / 3)
    assert report.max_batch == 2


def test_what_can_never_fit_is_refused_and_counted() -> None:
    trace = trace_of((0, 10, 10), (0, 30, 20), (0, 100, 1))
    report = of(trace, "paged", num_slots=48, block_size=4, watermark=0.0, max_model_len=90)
    assert (report.num_finished, report.num_refused, report.num_too_long) == (1, 1, 1)
    assert of(trace, "contiguous-max", num_slots=48, max_model_len=90).num_refused == 2
    alone = of(trace, "sharing", num_slots=48, block_size=4, samples=12, max_model_len=90)
    assert alone.num_refused == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_runs_where_nothing_fits(policy: str) -> None:
    report = of(trace_of((0, 2_000_000_000, 3), (1, 100, 9)), policy, num_slots=64)
    assert (report.num_finished, report.num_refused) == (0, 2)
    assert report.shares["free"] == 1
    assert sum(report.shares.values()) == 1
    assert (report.seconds, report.mean_batch, report.hit_rate) == (0, 0, 0)


def test_contiguous_shares_of_one_request() -> None:
    """Averages of a chunk that fills up evenly, against the arithmetic."""
    trace = trace_of((0, 20, 40))
    report = of(trace, "contiguous-max", SECONDS, num_slots=256, max_model_len=128)
    assert report.shares["tokens"] == pytest.approx((20 + 40 / 2) / 256)
    assert report.shares["reservation"] == pytest.approx(20 / 256)
    assert report.shares["internal"] == pytest.approx((128 - 60) / 256)
    assert report.shares["free"] == pytest.approx(128 / 256)
    assert report.shares["external"] == 0
    half = of(trace, "contiguous-pow2", SECONDS, num_slots=256, max_model_len=128)
    assert half.shares["internal"] == pytest.approx((20 + 64 - 60) / 256)


def test_memory_is_external_waste_only_while_somebody_waits_for_it() -> None:
    waits = of(trace_of((0, 60, 40), (0, 60, 40), (0, 60, 40)), "contiguous-oracle", SECONDS,
               num_slots=256, max_model_len=128)  # fmt: skip
    assert waits.shares["external"] == pytest.approx(56 / 256)
    assert waits.shares["free"] == 0


def test_samples_share_the_full_blocks_of_their_prompt() -> None:
    trace = trace_of((0, 33, 15), (50, 1, 1))  # two full blocks, and one for each sample
    report = of(trace, "sharing", SECONDS, num_slots=1600, samples=4)
    assert report.saved_by_sharing == pytest.approx(1 - (2 + 4) / 12, abs=0.02)
    assert of(trace, "paged", SECONDS, num_slots=1600, samples=4).saved_by_sharing == 0


def test_beams_share_what_comes_after_the_prompt_too() -> None:
    setting = {"num_slots": 15_728, "seed": 3}
    samples = of(synthetic_trace("sharegpt", 40), "sharing", samples=4, **setting)
    beams = of(synthetic_trace("sharegpt", 40), "sharing", beams=4, **setting)
    apart = of(synthetic_trace("sharegpt", 40), "sharing", beams=4, beam_switch=0.0, **setting)
    assert beams.saved_by_sharing > samples.saved_by_sharing + 0.2
    assert apart.saved_by_sharing == pytest.approx(samples.saved_by_sharing, abs=0.01)


def test_prompts_that_begin_alike_are_computed_once() -> None:
    ids = (7, 8, 9)
    same = [Request(float(i), 1500, 10, ids) for i in range(5)]
    trace = Trace("alike", tuple(same), hash_block_size=512)
    report = of(trace, "prefix", num_slots=8192)
    full_blocks = 1500 // 16 * 16  # and the first tokens of the block that the first output fills
    assert full_blocks * 4 <= report.num_hit_tokens <= 1499 * 4
    assert report.hit_rate == pytest.approx(report.num_hit_tokens / 7500)
    assert of(trace, "paged", num_slots=8192).num_hit_tokens == 0
    assert report.seconds < of(trace, "paged", num_slots=8192).seconds


def prefix_trace(data: st.DataObject) -> Trace:
    """Prompts that go on from earlier ones: a hash id names all that comes before it."""
    size = data.draw(st.sampled_from([4, 16]))
    paths: list[tuple[int, ...]] = [()]
    rows = []
    for i in range(data.draw(st.integers(1, 40))):
        path = data.draw(st.sampled_from(paths))[: data.draw(st.integers(0, 12))]
        fresh = data.draw(st.integers(0 if path else 1, 5))
        path = path + tuple(1000 * (i + 1) + k for k in range(fresh))
        paths.append(path)
        length = len(path) * size - data.draw(st.integers(0, size - 1))
        rows.append(Request(float(i), length, 1, path))
    return Trace("prefixes", tuple(rows), hash_block_size=size)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_hits_are_those_of_an_lru_over_hash_ids(data: st.DataObject, num_blocks: int) -> None:
    trace = prefix_trace(data)
    bounded, unbounded = hit_rates(trace, (num_blocks * trace.hash_block_size, None))
    assert (bounded.num_hit_tokens, bounded.num_refused) == lru_hits(trace, num_blocks)
    assert (unbounded.num_hit_tokens, unbounded.num_refused) == lru_hits(trace, None)
    assert bounded.num_prompt_tokens == sum(r.input_length for r in trace.requests)


def test_smaller_blocks_find_the_same_prefixes() -> None:
    rows = [Request(float(i), 1024, 1, (0, i % 3 + 1)) for i in range(9)]
    trace = Trace("small blocks", tuple(rows), hash_block_size=512)
    coarse = hit_rates(trace, (None,))[0]
    fine = hit_rates(trace, (None,), block_size=16)[0]
    assert coarse.num_hit_tokens == fine.num_hit_tokens == 2 * 512 + 6 * 1024


def test_the_same_seed_gives_the_same_report() -> None:
    def report(seed: int) -> dict[str, Any]:
        trace = synthetic_trace("alpaca", 120, seed).at_rate(20, seed)
        return simulate(trace, SimulationSetting(beams=3, num_slots=4000, seed=seed)).to_dict()

    assert report(4) == report(4)
    assert report(4)["policies"] != report(5)["policies"]


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("seed", [0, 1])
def test_synthetic_lengths_have_the_published_means(name: str, seed: int) -> None:
    model = SYNTHETIC[name]
    inputs, outputs = model.draw(20_000, seed)
    assert np.mean(inputs) == pytest.approx(model.input_mean, rel=0.01)
    assert np.mean(outputs) == pytest.approx(model.output_mean, rel=0.01)
    assert (inputs + outputs).max() <= model.max_model_len
    assert min(inputs.min(), outputs.min()) >= 1
    assert Counter(inputs.tolist()) != Counter(outputs.tolist())


# Kwon et al., 2023, Figure 2: token states, reservation, internal and external, %.
FIGURE_2 = {
    "contiguous-max": (20.4, 13.3, 57.3, 8.9),
    "contiguous-pow2": (26.8, 17.9, 13.6, 41.6),
    "contiguous-oracle": (38.2, 25.2, 0.0, 36.6),
}


def test_figure_2_within_3_points() -> None:
    report = simulate("synthetic:sharegpt", policies=[*FIGURE_2, "paged"])
    for policy, published in FIGURE_2.items():
        shares = report.policy(policy).shares
        found = [100 * shares[c] for c in ("tokens", "reservation", "internal", "external")]
        assert found == pytest.approx(published, abs=3.0), policy
    assert 100 * report.policy("paged").shares["tokens"] == pytest.approx(96.3, abs=3.0)


@pytest.mark.parametrize(("samples", "published"), [(2, 6.09), (4, 8.53), (6, 9.79)])
def test_figure_15_within_2_points(samples: int, published: float) -> None:
    saved = of("synthetic:alpaca", "sharing", samples=samples).saved_by_sharing
    assert 100 * saved == pytest.approx(published, abs=2.0)


@given(
    st.floats(0, 1e4), st.integers(1, 300), st.integers(0, 10**7),
    st.floats(1e-6, 10), st.floats(0, 1e-3), st.floats(0, 1e-3),
)  # fmt: skip
def test_the_number_of_steps_is_the_fewest(
    seconds: float, num_sequences: int, context: int, step: float, per_context: float, token: float
) -> None:
    model = ServiceModel(step, per_context, token)
    k = model.num_steps(seconds, num_sequences, context)
    assert k >= 1
    assert model.steps_seconds(k, num_sequences, context) >= seconds
    assert k == 1 or model.steps_seconds(k - 1, num_sequences, context) < seconds


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 1000))
def test_many_steps_take_the_sum_of_each(k: int, num_sequences: int, context: int) -> None:
    model = ServiceModel(0.01, 1e-4, 1e-3)
    each = sum(model.steps_seconds(1, num_sequences, context + i * num_sequences) for i in range(k))
    assert model.steps_seconds(k, num_sequences, context) == pytest.approx(each)


def test_the_default_service_is_opt_13b_on_an_a100() -> None:
    hardware = ServiceModel.from_hardware(
        weight_bytes=2 * 12_853_473_280, num_parameters=12_853_473_280, token_bytes=819_200,
        bandwidth=1.555e12, flops=312e12,
    )  # fmt: skip
    assert hardware == ServiceModel()


def test_arrivals_at_a_rate() -> None:
    trace = synthetic_trace("alpaca", 4000).at_rate(10, seed=1)
    times = [request.arrival for request in trace.requests]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(400, rel=0.1)
    assert {r.arrival for r in trace.at_rate(math.inf, 1).requests} == {0.0}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_slots": 0}, "num_slots is 0"),
        ({"num_slots": 8}, "num_slots is 8, expected a block"),
        ({"block_size": 5000}, "1 to 4096"),
        ({"watermark": 1.0}, "watermark is 1.0"),
        ({"beam_switch": -0.1}, "beam_switch"),
        ({"samples": 2, "beams": 2}, "choose one"),
        ({"samples": 300}, "max_batch is 256"),
        ({"preempt": "drop"}, "preempt is 'drop'"),
        ({"seed": True}, "seed is True, expected an int of 0 to 1099511627776"),
        ({"num_slots": 2**40 + 1}, "expected an int of 1 to 1099511627776"),
        ({"max_model_len": 0}, "max_model_len is 0"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        SimulationSetting(**values)


def test_bad_calls_are_named() -> None:
    with pytest.raises(InvalidSpec, match="policy 'best'"):
        simulate("synthetic:alpaca", policies=["best"])
    with pytest.raises(InvalidSpec, match="synthetic load 'gpt'"):
        simulate("synthetic:gpt")
    with pytest.raises(InvalidSpec, match="has no hash_ids"):
        simulate("synthetic:alpaca", policies=[], cache_sizes=[1024])
    with pytest.raises(InvalidSpec, match="no requests"):
        simulate(Trace("empty", ()))
    with pytest.raises(InvalidSpec, match="holds no block of 512"):
        hit_rates(Trace("one", (Request(0.0, 5, 1, (1,)),)), [100])
    with pytest.raises(InvalidSpec, match="step_seconds is 0"):
        ServiceModel(step_seconds=0.0)
    with pytest.raises(InvalidSpec, match="bandwidth is nan"):
        ServiceModel.from_hardware(
            weight_bytes=1, num_parameters=1, token_bytes=1, bandwidth=math.nan, flops=1
        )


def test_reports_print_as_tables() -> None:
    report = pagedkv.simulate(synthetic_trace("alpaca", 30), SimulationSetting(samples=2))
    text = str(report)
    for word in ("synthetic:alpaca", "15,728 slots", "reservation", "sharing", "queued, p99 s"):
        assert word in text
    assert report == simulate(synthetic_trace("alpaca", 30), SimulationSetting(samples=2))
    with pytest.raises(KeyError):
        report.policy("prefix")
