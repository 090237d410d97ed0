"""How long steps take: the service-rate model, in closed form over many steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from pagedkv.errors import InvalidSpec

__all__ = ["ServiceModel"]


@dataclass(frozen=True)
class ServiceModel:
    """Seconds of a step, by what it reads and computes; nothing overlaps.

        decode step    step_seconds + token_seconds * sequences + context_seconds * context tokens
        prefill        token_seconds * tokens; everybody waits for it
        swap           bytes / copy_bandwidth; everybody waits for it

    The defaults are `from_hardware()` of OPT-13B in 16 bit on an A100 with 40 GB.

    Attributes:
        step_seconds: of one step, however many sequences are in it: reading the weights.
        context_seconds: for each token whose K and V the step reads, in every sequence anew.
        token_seconds: for each token that is computed, in prefill and decode.
        copy_bandwidth: bytes per second between device and host.
    """

    step_seconds: float = 25_706_946_560 / 1.555e12
    context_seconds: float = 819_200 / 1.555e12
    token_seconds: float = 2 * 12_853_473_280 / (0.5 * 312e12)
    copy_bandwidth: float = 25e9

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            may_be_0 = field.name in ("context_seconds", "token_seconds")
            if not (value > 0 or (value == 0 and may_be_0)) or math.isinf(value):
                least = "of 0 or more" if may_be_0 else "above 0"
                raise InvalidSpec(f"{field.name} is {value}, expected a number {least}")

    @classmethod
    def from_hardware(
        cls,
        *,
        weight_bytes: float,
        num_parameters: float,
        token_bytes: float,
        bandwidth: float,
        flops: float,
        efficiency: float = 0.5,
        copy_bandwidth: float = 25e9,
    ) -> ServiceModel:
        """From a model and a GPU: a step reads all weights and all K and V once, at full bandwidth.

        A token takes 2 FLOPs for each (active) parameter, at `efficiency` of the peak `flops`; the
        operations of attention are left out. After the roofline of Pope et al., "Efficiently
        Scaling Transformer Inference", 2022, but with the times added.

        Args:
            weight_bytes: bytes of the weights that a step reads.
            num_parameters: parameters that a token is multiplied with.
            token_bytes: K and V of one token, `KVSpec.token_bytes`.
            bandwidth: bytes per second from the GPU's memory.
            flops: floating-point operations per second at the peak.
        """
        for name, value in (("bandwidth", bandwidth), ("flops", flops), ("efficiency", efficiency)):
            if not value > 0:
                raise InvalidSpec(f"{name} is {value}, expected a number above 0")
        if efficiency > 1:
            raise InvalidSpec(f"efficiency is {efficiency}, expected a share, up to 1")
        return cls(
            step_seconds=weight_bytes / bandwidth,
            context_seconds=token_bytes / bandwidth,
            token_seconds=2 * num_parameters / (efficiency * flops),
            copy_bandwidth=copy_bandwidth,
        )

    @property
    def prefill_rate(self) -> float:
        """Tokens per second."""
        return 1 / self.token_seconds if self.token_seconds else math.inf

    def steps_seconds(self, num_steps: int, num_sequences: int, context: int) -> float:
        """Of `num_steps` decode steps of the same sequences, which begin with `context` tokens in
        sum and grow by one each: the sum over steps of the formula above."""
        first = self.step_seconds + self.token_seconds * num_sequences
        first += self.context_seconds * context
        growth = self.context_seconds * num_sequences
        return num_steps * first + growth * (num_steps * (num_steps - 1) / 2)

    def num_steps(self, seconds: float, num_sequences: int, context: int) -> int:
        """The fewest steps that last at least `seconds`, and at least one."""
        growth = self.context_seconds * num_sequences / 2
        first = self.steps_seconds(1, num_sequences, context) - growth
        # growth * k^2 + first * k = seconds, in the form that is right for a small growth, too
        root = 2 * seconds / (first + math.sqrt(first * first + 4 * growth * max(0.0, seconds)))
        k = max(1, math.ceil(root))
        while k > 1 and self.steps_seconds(k - 1, num_sequences, context) >= seconds:
            k -= 1
        while self.steps_seconds(k, num_sequences, context) < seconds:
            k += 1
        return k
