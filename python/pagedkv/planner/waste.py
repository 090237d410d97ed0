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
        name: "contiguous-max", "contiguous-pow2", "contiguous-oracle", "paged" or "sharing", as
            in `pagedkv simulate`.
        requests: how many the memory holds at once, whatever a step may hold.
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
    if fit.num_blocks < 1:
        return ()
    memory = fit.num_blocks * fit.pool.block_bytes
    if fit.pool.spec.state_bytes:  # which comes out of the same memory
        memory = fit.available - fit.pool.block_bytes
    found = [
        _contiguous(fit, memory, "contiguous-max", fit.load.longest),
        _contiguous(fit, memory, "contiguous-pow2", _power_of_two(fit)),
        _contiguous(fit, memory, "contiguous-oracle", fit.load.length),
        _paged(fit, memory, "paged", shared=False),
    ]
    if fit.load.sequences > 1:
        found.append(_paged(fit, memory, "sharing", shared=True))
    return tuple(found)


def _power_of_two(fit: Fit) -> int:
    """The output's length rounded up to a power of two, within the longest sequence."""
    output = 1 << (fit.load.output_len - 1).bit_length() if fit.load.output_len else 0
    return min(fit.load.input_len + output, fit.load.longest)


def _lengths(fit: Fit) -> list[int]:
    """A sequence's lengths over its life, from its prompt to its last token, evenly spaced."""
    first, output = max(1, fit.load.input_len), fit.load.length - max(1, fit.load.input_len)
    steps = min(output, _SAMPLES - 1)
    return [first + output * i // steps for i in range(steps + 1)] if steps else [fit.load.length]


def _contiguous(fit: Fit, memory: int, name: str, slots: int) -> Policy:
    """One run of `slots` slots for each sequence, all layers in full, nothing shared.

    The runs lie one behind the other: an allocator that rounds them up wastes more.
    """
    token_bytes, state = fit.pool.spec.token_bytes, fit.pool.spec.state_bytes
    lengths, sequences = _lengths(fit), fit.load.sequences
    stored = sum(lengths) / len(lengths)
    held = sequences * (slots * token_bytes + state)
    requests = memory // held
    each = requests * sequences / memory
    return Policy(
        name=name,
        requests=requests,
        request_bytes=held,
        tokens=each * (stored * token_bytes + state),
        reserved=each * (fit.load.length - stored) * token_bytes,
        internal=each * (slots - fit.load.length) * token_bytes,
        external=1 - requests * held / memory,
        free=0.0,
    )


def _paged(fit: Fit, memory: int, name: str, *, shared: bool) -> Policy:
    """Blocks as they are needed; of a request that shares, the prompt's full blocks once."""
    load, spec = fit.load, fit.pool.spec
    lengths = _lengths(fit)
    prompt = load.input_len if shared else 0
    blocks = [
        fit.pool.request_blocks(n, load.max_batched_tokens, load.sequences, prompt) for n in lengths
    ]
    state = load.sequences * spec.state_bytes
    held = sum(blocks) / len(blocks) * fit.pool.block_bytes + state
    common = prompt // load.block_size * load.block_size
    stored = sum(
        load.sequences * spec.kept_bytes(n) - (load.sequences - 1) * spec.kept_bytes(common)
        for n in lengths
    ) / len(lengths) + state  # fmt: skip
    requests = int(memory // held)
    return Policy(
        name=name,
        requests=requests,
        request_bytes=int(held),
        tokens=requests * min(stored, held) / memory,
        reserved=0.0,
        internal=requests * max(0.0, held - stored) / memory,
        external=0.0,
        free=1 - requests * held / memory,
    )
