"""Synthetic loads: lengths with the published means of ShareGPT and Alpaca.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
2023, give the mean lengths only (Figure 11). Lengths here are lognormal. Their spread is
calibrated: for ShareGPT on Figure 2; for Alpaca, which is not in it, on the first bar of Figure 15,
two samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pagedkv.errors import InvalidSpec
from pagedkv.simulator.trace import Request, Trace

__all__ = ["SYNTHETIC", "LengthModel", "synthetic_trace"]

_Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class LengthModel:
    """Lognormal lengths of prompts and outputs, drawn again where both together exceed the limit.

    Attributes:
        input_mu, output_mu: means of the logarithms, such that the mean lengths *after* the limit
            are `input_mean` and `output_mean`.
        input_sigma, output_sigma: their standard deviations.
        max_model_len: most tokens of prompt and output together.
    """

    input_mean: float
    output_mean: float
    input_mu: float
    output_mu: float
    input_sigma: float
    output_sigma: float
    max_model_len: int = 2048

    def draw(self, num_requests: int, seed: int) -> tuple[_Lengths, _Lengths]:
        """Lengths of prompts and of outputs, int64 [num_requests] each, 1 or more."""
        rng = np.random.default_rng(seed)
        inputs = outputs = np.zeros(0, np.int64)
        while len(inputs) < num_requests:
            new_inputs = _lognormal(self.input_mu, self.input_sigma, num_requests, rng)
            new_outputs = _lognormal(self.output_mu, self.output_sigma, num_requests, rng)
            fits = new_inputs + new_outputs <= self.max_model_len
            inputs = np.concatenate((inputs, new_inputs[fits]))
            outputs = np.concatenate((outputs, new_outputs[fits]))
        return inputs[:num_requests], outputs[:num_requests]


SYNTHETIC = {
    "sharegpt": LengthModel(161.31, 337.99, 4.0775, 5.5604, input_sigma=1.8, output_sigma=0.78),
    "alpaca": LengthModel(19.31, 58.45, 2.6399, 3.5705, input_sigma=0.8, output_sigma=1.0),
}


def _lognormal(mu: float, sigma: float, n: int, rng: np.random.Generator) -> _Lengths:
    """n evenly spaced quantiles in random order: so that small loads have the same mean, too."""
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])
    lengths = np.exp(mu + sigma * rng.permutation(quantiles))
    return np.maximum(1, np.rint(lengths)).astype(np.int64)


def synthetic_trace(name: str, num_requests: int = 2000, seed: int = 0) -> Trace:
    """`num_requests` of the load `name`, "sharegpt" or "alpaca", that all arrive at once.

    `Trace.at_rate()` spreads them. Raises InvalidSpec: no such load, or no requests.
    """
    if name not in SYNTHETIC:
        raise InvalidSpec(f"synthetic load {name!r}, expected one of {', '.join(SYNTHETIC)}")
    if not 1 <= num_requests <= 10_000_000:
        raise InvalidSpec(f"num_requests is {num_requests}, expected 1 to 10,000,000")
    model = SYNTHETIC[name]
    inputs, outputs = model.draw(num_requests, seed)
    requests = (Request(0.0, i, o) for i, o in zip(inputs.tolist(), outputs.tolist(), strict=True))
    return Trace(f"synthetic:{name}", tuple(requests), max_model_len=model.max_model_len)
