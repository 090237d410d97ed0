"""What becomes of a pool's memory under each way of giving it to sequences of this load.

The categories are those of Kwon et al. 2023, "Efficient Memory Management for Large Language Model
Serving with PagedAttention", figure 2: tokens stored, slots reserved for tokens to come, slots that
will never be used (internal), and what is between the reservations (external).
"""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.planner.fit import Fit

__all__ = ["Policy", "policies"]

_SAMPLES = 257  # lengths at which the mean over a sequence's life is taken


@dataclass(frozen=True)
class Policy:
    """A pool that is full of requests of this load.

    Attributes:
        name: "contiguous, maximum", "contiguous, power of two", "contiguous, exact", "paged" or
            "paged, shared".
        requests: how many fit at once.
        request_bytes: what one holds on average over its life, reservations among it.
        tokens, reserved, internal, external: shares of the pool; with `free`, blocks or slots that
            another sequence could have, they add up to 1.
        free: see there.
    """

    name: str
    requests: int
    request_bytes: int
    tokens: float
    reserved: float
    internal: float
    external: float
    free: float


def policies(fit: Fit) -> tuple[Policy, ...]:
    """All five for this load; none where the pool is empty or the model keeps nothing per token."""
    pool = fit.pool.pool_bytes(fit.num_blocks)
    if fit.num_blocks < 1:
        return ()
    found = [
        _contiguous(fit, pool, "contiguous, maximum", fit.load.max_model_len),
        _contiguous(fit, pool, "contiguous, power of two", _power_of_two(fit)),
        _contiguous(fit, pool, "contiguous, exact", fit.load.length),
        _paged(fit, pool, "paged", shared=False),
    ]
    if fit.load.sequences > 1:
        found.append(_paged(fit, pool, "paged, shared", shared=True))
    return tuple(found)


def _power_of_two(fit: Fit) -> int:
    """The next power of two, but no more than the longest sequence."""
    power = 1 << (fit.load.length - 1).bit_length()
    return min(power, fit.load.max_model_len)


def _lengths(fit: Fit) -> list[int]:
    """A sequence's lengths over its life, from its prompt to its last token, evenly spaced."""
    first, output = max(1, fit.load.input_len), fit.load.length - max(1, fit.load.input_len)
    steps = min(output, _SAMPLES - 1)
    return [first + output * i // steps for i in range(steps + 1)] if steps else [fit.load.length]


def _contiguous(fit: Fit, pool: int, name: str, slots: int) -> Policy:
    """One run of `slots` slots for each sequence, all layers in full, nothing shared."""
    token_bytes = fit.pool.spec.token_bytes
    lengths, sequences = _lengths(fit), fit.load.sequences
    stored = sum(lengths) / len(lengths)
    requests = pool // (slots * token_bytes * sequences)
    share = requests * sequences * token_bytes / pool
    return Policy(
        name=name,
        requests=requests,
        request_bytes=slots * token_bytes * sequences,
        tokens=share * stored,
        reserved=share * (fit.load.length - stored),
        internal=share * (slots - fit.load.length),
        external=1 - share * slots,
        free=0.0,
    )


def _paged(fit: Fit, pool: int, name: str, *, shared: bool) -> Policy:
    """Blocks as they are needed; of a request that shares, the prompt's full blocks once."""
    load, spec = fit.load, fit.pool.spec
    lengths = _lengths(fit)
    prompt = load.input_len if shared else 0
    blocks = [
        fit.pool.request_blocks(n, load.max_batched_tokens, load.sequences, prompt) for n in lengths
    ]
    held = sum(blocks) / len(blocks) * fit.pool.block_bytes
    common = prompt // load.block_size * load.block_size
    stored = sum(
        load.sequences * spec.kept_bytes(n) - (load.sequences - 1) * spec.kept_bytes(common)
        for n in lengths
    ) / len(lengths)  # fmt: skip
    requests = int(pool // held)
    return Policy(
        name=name,
        requests=requests,
        request_bytes=int(held),
        tokens=requests * min(stored, held) / pool,
        reserved=0.0,
        internal=requests * max(0.0, held - stored) / pool,
        external=0.0,
        free=1 - requests * held / pool,
    )
