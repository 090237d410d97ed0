"""Decode steps in CUDA graphs: captured once, replayed while sequences grow, fork and move.

    decode = DecodeGraph(kv, model, num_rows=64, width=4096)
    with kv.step(ids, tokens) as step:
        logits = decode(step)

`model` gets a `Padded` step: tensors of fixed shapes at fixed addresses, which hold each step's
arrays, and behind its rows padding that does nothing. On a CPU, where there are no graphs, it is
called each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pagedkv import ops
from pagedkv.attention.call import check_chunk, keys_and_values, scale_of
from pagedkv.attention.gather import dense
from pagedkv.config import check_int
from pagedkv.errors import InvalidSpec, InvalidState

if TYPE_CHECKING:
    from pagedkv.cache import KVCache
    from pagedkv.step import Step

__all__ = ["DecodeGraph", "Padded"]


class Padded(NamedTuple):
    """A step of one token for each sequence, padded to n rows of slot 0 and no length.

    Attributes:
        kv: the cache.
        width: tokens that attention looks at, of which each row has seq_lens. It costs what so many
            tokens of n rows cost, however few there are.
        input_ids: int64 [n]; 0 if the step was opened without tokens.
        slots, positions: int64 [n].
        seq_lens: int32 [n].
        block_tables: int32 [n, W], W the same in every step.
    """

    kv: KVCache
    width: int
    input_ids: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Scatter a layer's keys [n, H, k_dim] and values [n, H, v_dim], of the pool's type."""
        ops.write(self.kv.k(layer), self.kv.v(layer), k, v, self.slots)

    def attention(
        self, layer: int, q: torch.Tensor, *, scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Each row's query [n, Hq, k_dim] over its tokens, [n, Hq, v_dim]; rows of padding are 0.

        Sliding layers see their window. Of latent layers see `KVCache.attention`.
        """
        spec = self.kv.spec.layers[layer]
        if q.shape[2:] != (spec.query_dim,) or q.shape[0] != len(self.slots):
            raise InvalidSpec(
                f"q is {list(q.shape)}, expected [{len(self.slots)}, query heads, {spec.query_dim}]"
            )
        if spec.kind == "chunked":
            check_chunk(spec, self.width)
        kept = ops.gather(
            self.kv.k(layer), self.kv.v(layer), self.block_tables, self.seq_lens, self.width
        )
        k, v = keys_and_values(spec, kept)
        places, lens = torch.arange(self.width, device=q.device), self.seq_lens[:, None]
        visible = places < lens
        if spec.window is not None:
            visible &= places >= lens - spec.window
        empty = lens == 0  # which would see nothing: a softmax over that is NaN
        mask = (visible | empty)[:, None, None]
        found = dense(q[:, :, None], k, v, scale_of(spec, scale), softcap, mask)
        return found.squeeze(2)[..., : spec.output_dim].masked_fill(empty[..., None], 0)


class DecodeGraph:
    """A model's decode step for up to `num_rows` sequences of up to `width` tokens.

    Args:
        kv: whose steps it is called with.
        model: is given a Padded, and returns a tensor [num_rows, ...]. Of what changes it reads
            that alone, and it writes every layer.
        num_rows: at most max_batch.
        width: tokens, at most max_model_len.
        pool: memory that the capture allocates from, such as torch.cuda.graph_pool_handle(); None
            for one of its own. Graphs that share it reuse each other's memory, so that a call of
            one may overwrite what another has returned.

    On a GPU the first call runs the model, captures it and replays that, as later ones do. No call
    keeps gradients.

    Raises:
        InvalidSpec: num_rows or width is out of range, or the cache has scales.
    """

    def __init__(
        self, kv: KVCache, model: Callable[[Padded], torch.Tensor], *, num_rows: int, width: int,
        pool: Any = None,
    ) -> None:  # fmt: skip
        check_int("num_rows", num_rows, 1, kv.manager.max_batch)
        check_int("width", width, 1, kv.manager.max_model_len)
        if any(scales != (1.0, 1.0) for scales in kv.scales):
            raise InvalidSpec("the cache has scales, which a graph does not apply: expected none")
        self._kv, self._model = kv, model
        self._num_rows, self._width, self._pool = num_rows, width, pool
        self._pool_at = self._pools()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, step: Step) -> torch.Tensor:
        """The model's output for this step's rows, [B, ...]; on a GPU the next call overwrites it.

        Raises:
            InvalidState: `step` is not open in this cache, or the cache's tensors have moved since
                the graph was made.
            InvalidSpec: the step is not one token for each of at most num_rows sequences, or one
                of them is longer than width.
        """
        self._check(step)
        self._kv._follow()
        batch = step.plan.batch_size
        if self._kv.device.type != "cuda":
            return self._model(self._padded(step))[:batch]
        if self._graph is None:
            self._capture(self._padded(step))
        assert self._graph is not None
        assert self._output is not None
        self._graph.replay()
        return self._output[:batch]

    def _capture(self, padded: Padded) -> None:
        """Runs the model once, since what is made when it is first used cannot be captured."""
        with torch.cuda.device(self._kv.device):
            self._model(padded)
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(self._kv.device)
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                output = self._model(padded)
        self._graph, self._output = graph, output

    def _pools(self) -> list[int]:
        """Where the cache's tensors are, if they may be elsewhere later: its own may not."""
        adopted = self._kv._adopted is not None
        return [t.data_ptr() for layer in self._kv.pools() for t in layer] if adopted else []

    def _check(self, step: Step) -> None:
        self._kv._require(step)
        if self._pools() != self._pool_at:
            raise InvalidState(
                "the cache's tensors have moved since this graph was made: make another"
            )
        plan = step.plan
        if plan.num_tokens != plan.batch_size or plan.batch_size > self._num_rows:
            raise InvalidSpec(
                f"the step has {plan.num_tokens} tokens of {plan.batch_size} sequences, expected "
                f"one each of at most {self._num_rows}"
            )
        longest = int(plan.seq_lens.max()) if plan.batch_size else 0
        if longest > self._width:
            raise InvalidSpec(f"a sequence has {longest} tokens, expected at most {self._width}")

    def _padded(self, step: Step) -> Padded:
        """Of this step; at the same addresses of every other."""
        arrays = (
            self._kv.machine.padded_tensor(step.plan, name, self._num_rows)
            for name in Padded._fields[2:]
        )
        return Padded(self._kv, self._width, *arrays)
