"""A small inference engine over pagedkv, in one file: what a server does between its requests.

    python examples/engine.py                                     # random weights, no download
    python examples/engine.py --model smollm2 --device-blocks 40  # real text, under pressure
    python examples/throughput.py --model smollm2                 # beside transformers' own ways

Requests join and leave a running batch at every step (continuous batching), long prompts are
computed in chunks beside the others' decoding, prompts that begin alike share what is computed
(prefix hits), samples and beams share their prompt, and when blocks run out the newest request is
preempted, by swap or recomputation. Tokens are streamed as they come.

Each row of a running request has tokens that the cache does not hold yet: its prompt, or what a
prefix hit left of it; the one token that was just generated; or what is to be computed again after
a preemption. So there is one path for prefill, decode and recompute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import pagedkv as pk
from pagedkv.demo.model import DemoModel, load
from pagedkv.preemption import PreemptMode

MODEL_TYPES = ("llama", "qwen2", "qwen3")  # whose modules are put together in the same way


@dataclass(eq=False)
class Row:
    """A request's prompt and one continuation of it, in the sequence `id` of the cache."""

    id: int
    tokens: list[int]
    sample: int = 0
    score: float = 0.0  # of a beam: the sum of its logarithms of probabilities


@dataclass(eq=False)
class Request:
    """A prompt, and how to go on.

    Greedily, or with n samples at a temperature, or with the best of n beams; each until a token
    of `stop`, or for num_new tokens. `outputs` are the new tokens of each, when they are complete.
    """

    prompt: list[int]
    num_new: int
    n: int = 1
    temperature: float = 0.0
    beams: bool = False
    stop: frozenset[int] = frozenset()
    seed: int = 0
    number: int = -1
    rows: list[Row] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
    ended_beams: list[tuple[float, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outputs = [[] for _ in range(1 if self.beams else self.n)]
        self.random = torch.Generator().manual_seed(self.seed)

    @property
    def num_rows(self) -> int:
        """Rows that it has, or will have when its prompt is computed."""
        return len(self.rows) if any(self.outputs) or len(self.rows) > 1 else self.n


Output = tuple[Request, int, int]  # whose token it is: request, sample, token


class Engine:
    """Runs requests to their end, always the oldest ones first.

    Args:
        network: a causal language model of transformers, of one of MODEL_TYPES.
        mode: how requests are preempted, "swap", "recompute" or "auto".
        max_tokens: in one step. Longer prompts are computed in chunks, beside what decodes.
        max_rows: rows that are admitted at a time.
    """

    def __init__(
        self,
        network: Any,
        kv: pk.KVCache,
        mode: PreemptMode = "auto",
        max_tokens: int = 256,
        max_rows: int = 64,
    ) -> None:
        self.network, self.kv, self.mode = network, kv, mode
        self.max_tokens, self.max_rows = max_tokens, max_rows
        # Each request is in one of these, from the oldest to the newest.
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preempted: list[Request] = []
        self.returning: list[Request] = []  # resumed, and its blocks are still on their way
        self.num_requests = self.num_preemptions = self.num_recomputed = self.num_hits = 0

    def add(self, requests: Iterable[Request]) -> None:
        """Have them run as soon as there is room, also while stream() is under way."""
        for request in requests:
            request.number, self.num_requests = self.num_requests, self.num_requests + 1
            self.waiting.append(request)

    def run(self, requests: list[Request]) -> list[list[list[int]]]:
        """The outputs of each request."""
        self.add(requests)
        for _ in self.stream():
            pass
        return [request.outputs for request in requests]

    def stream(self) -> Iterator[Output]:
        """Each token when it is known; those of beams when their search has ended."""
        while self.waiting or self.running or self.preempted or self.returning:
            self.schedule()
            yield from self.step()

    def schedule(self) -> None:
        """Before a step: take in what has arrived, bring back what fits, then admit."""
        self.kv.poll()  # raises the error of a transfer that failed
        if not self.running:  # nothing to compute until something arrives
            self.wait()
        for request in [r for r in self.returning if self.is_ready(r)]:
            self.returning.remove(request)
            self.running.append(request)
        while self.preempted and self.has_room(self.preempted[0]):
            self.resume(self.preempted.pop(0))
        room = self.max_tokens - sum(map(self.num_missing, self.running))
        # No sooner than it is computed: those before it may leave it a prefix to hit.
        while self.waiting and not self.preempted and room > 0 and self.has_room(self.waiting[0]):
            request = self.waiting.pop(0)
            request.rows = [Row(self.kv.create(request.prompt), list(request.prompt))]
            self.num_hits += self.kv.num_cached(request.rows[0].id)
            self.running.append(request)
            room -= self.num_missing(request)
        self.running.sort(key=lambda r: r.number)

    def num_missing(self, request: Request) -> int:
        return sum(len(row.tokens) - self.kv.length(row.id) for row in request.rows)

    def wait(self) -> None:
        for transfer in self.kv.under_way():
            transfer.wait()

    def is_ready(self, request: Request) -> bool:
        return self.kv.ready([r.id for r in request.rows if not self.kv.is_dropped(r.id)])

    def has_room(self, request: Request) -> bool:
        """Whether the device holds its tokens, and one to come, beside those that are active."""
        active = self.running + self.returning
        if not active:
            return True
        if sum(r.num_rows for r in [*active, request]) > self.max_rows:
            return False
        # Of those that have not run yet, the blocks are promised and not taken.
        device = self.kv.stats().device
        promised = sum(self.num_blocks(r) - self.num_blocks(r, held=True) for r in active)
        return promised + self.num_blocks(request) <= device.num_free + device.num_cached

    def num_blocks(self, request: Request, held: bool = False) -> int:
        """Blocks for its tokens and one more of each row, or for those that it holds.

        Its rows share the full blocks of the prompt; each copies the last one before it is forked.
        """
        size, full = self.kv.spec.block_size, len(request.prompt) // self.kv.spec.block_size
        if held:
            lengths = [self.kv.length(row.id) for row in request.rows]
            full = min(full, min(lengths) // size)
        else:
            lengths = [len(row.tokens) + 1 for row in request.rows] or [len(request.prompt) + 1]
            lengths += lengths[-1:] * (request.num_rows - len(lengths))
        return full + sum(-(-n // size) - full for n in lengths)

    def preempt(self, request: Request) -> None:
        """Give its blocks to older requests. A swap's copies run beside the following steps."""
        self.running.remove(request)
        self.num_preemptions += 1
        held = [r.id for r in request.rows if not self.kv.is_dropped(r.id)]
        self.kv.preempt(held, mode=self.mode)
        self.preempted.append(request)
        self.preempted.sort(key=lambda r: r.number)

    def resume(self, request: Request) -> None:
        """Bring back what was swapped out; what was dropped is computed by the next steps."""
        if not all(self.kv.is_dropped(r.id) for r in request.rows):
            self.kv.resume([r.id for r in request.rows if not self.kv.is_dropped(r.id)])
        self.returning.append(request)

    def plan(self) -> list[tuple[Request, Row, list[int]]]:
        """Each row that decodes, by their lengths, then of prompts what max_tokens leaves room for.

        Rows of a request go on together. If they have to be computed again, it is one after the
        other, so that each finds what the ones before it have left in the cache.
        """
        decoding, filling = [], []
        for request in self.running:
            missing = [0]
            for row in request.rows:
                if self.kv.is_dropped(row.id):
                    found = int(self.kv.resume([row.id])[0])
                    self.num_recomputed += max(len(row.tokens) - 1 - found, 0)
                if not self.kv.ready([row.id]):
                    break
                missing = row.tokens[self.kv.length(row.id) :]
                if len(missing) > 1:
                    last = len(missing) if len(request.rows) == 1 else -1
                    filling.append((request, row, missing[:last]))
                    break
            else:
                decoding += [(request, row, row.tokens[-1:]) for row in request.rows]
        decoding.sort(key=lambda work: len(work[1].tokens))  # as attention takes them together
        room = self.max_tokens - len(decoding)
        for request, row, missing in filling:
            if room > 0:
                decoding.append((request, row, missing[:room]))
                room -= len(missing)
        return decoding

    def step(self) -> list[Output]:
        """One step of all running requests: compute what is missing, add a token to each row."""
        while work := self.plan():
            ids, counts = [row.id for _, row, _ in work], [len(tokens) for _, _, tokens in work]
            try:
                step = self.kv.step(ids, [t for _, _, tokens in work for t in tokens], counts)
                break
            except pk.OutOfBlocks:
                if len(self.running) + len(self.returning) == 1:
                    raise  # the device is too small for this one request
                self.preempt(self.running[-1])  # the newest has the least to lose
        else:
            self.wait()
            return []
        last = step.query_starts[1:] - 1
        lens = step.plan.seq_lens.tolist()
        whole = [i for i, (_, row, _) in enumerate(work) if lens[i] == len(row.tokens)]
        with step:
            logits = self.forward(step, last[whole])
        return self.advance([work[i][0] for i in whole], logits)

    @torch.inference_mode()
    def forward(self, step: pk.Step, last: torch.Tensor) -> torch.Tensor:
        """transformers' own modules on a step's tokens, all rows in a line.

        Logits [n, vocabulary] after the tokens at `last` [n], and of no others.
        """
        model = self.network.model
        x = model.embed_tokens(step.input_ids)
        cos, sin = model.rotary_emb(x, step.positions[None])
        for number, layer in enumerate(model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(normed).unflatten(-1, (-1, attention.head_dim))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k = apply_rotary_pos_emb(q, k, cos[0], sin[0], unsqueeze_dim=1)
            self.kv.write(number, k, v, step)
            x = x + attention.o_proj(self.kv.attention(number, q, step).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits: torch.Tensor = self.network.lm_head(model.norm(x[last]))
        return logits

    def advance(self, owners: list[Request], logits: torch.Tensor) -> list[Output]:
        """Add tokens to the rows of `owners`, one entry for each row of logits."""
        outputs: list[Output] = []
        greedy = logits.argmax(-1).tolist()
        for request in dict.fromkeys(owners):
            mine = [i for i, owner in enumerate(owners) if owner is request]
            if request.beams:
                outputs += self.search(request, logits[mine])
                continue
            if len(request.rows) < request.n and not any(request.outputs):
                self.fork(request)
                mine *= request.n
            tokens = [greedy[i] for i in mine]
            if request.temperature:
                chances = torch.softmax(logits[mine].float() / request.temperature, -1).cpu()
                tokens = torch.multinomial(chances, 1, generator=request.random)[:, 0].tolist()
            for row, token in zip(list(request.rows), tokens, strict=True):
                row.tokens.append(token)
                request.outputs[row.sample].append(token)
                outputs.append((request, row.sample, token))
                if token in request.stop or len(request.outputs[row.sample]) == request.num_new:
                    self.kv.release([row.id])
                    request.rows.remove(row)
            if not request.rows:
                self.running.remove(request)
        return outputs

    def fork(self, request: Request) -> None:
        """From the one row of a computed prompt make n, which share all of it."""
        (row,) = request.rows
        ids = self.kv.fork(row.id, request.n).tolist()
        request.rows = [Row(id, list(row.tokens), sample) for sample, id in enumerate(ids)]

    def search(self, request: Request, logits: torch.Tensor) -> list[Output]:
        """One step of beam search, by the rules of generate(): at its end the best one's tokens."""
        rows, n, vocabulary = request.rows, request.n, logits.shape[-1]
        so_far = logits.new_tensor([row.score for row in rows], dtype=torch.float32)
        scores = (torch.log_softmax(logits.float(), -1) + so_far[:, None]).flatten()
        best = scores.topk(min(n * max(2, 1 + len(request.stop)), len(scores)))
        length = len(rows[0].tokens) + 1 - len(request.prompt)
        going: list[tuple[float, int, int]] = []
        for rank, (score, at) in enumerate(zip(*(t.tolist() for t in best), strict=True)):
            parent, token = divmod(at, vocabulary)
            if token not in request.stop and length < request.num_new:
                going.append((score, parent, token))
            elif rank < n:
                new = [*rows[parent].tokens[len(request.prompt) :], token]
                request.ended_beams.append((score / length, new))
        going = going[:n]
        ended = request.ended_beams = sorted(request.ended_beams, key=lambda e: -e[0])[:n]
        if not going or (len(ended) == n and going[0][0] / length <= ended[-1][0]):
            request.outputs = [ended[0][1]]
            self.kv.release([row.id for row in rows])
            self.running.remove(request)
            return [(request, 0, token) for token in request.outputs[0]]
        if len(rows) < n:
            self.fork(request)
        else:
            self.kv.reorder([row.id for row in rows], [parent for _, parent, _ in going])
        request.rows = [
            Row(row.id, [*rows[parent].tokens, token], row.sample, score)
            for row, (score, parent, token) in zip(request.rows, going, strict=True)
        ]
        return []


SUBJECTS = ("cats", "bread", "ships", "storms", "the moon", "clocks", "rivers", "snow")
FORMS = (
    "Tell me one thing about {}.",
    "Write a short story about {} for a child of six years, with a happy end.",
    "Explain {} to somebody who has never heard of them, in simple words and with an example.",
    "Name five facts about {}.",
)


def prompts(model: DemoModel, num: int = len(SUBJECTS)) -> list[list[int]]:
    """One for each form and subject; of random tokens where the model has no tokenizer."""
    if model.tokenizer is None:
        random, vocabulary = torch.Generator().manual_seed(0), model.network.config.vocab_size
        found: list[list[int]] = torch.randint(vocabulary, (num, 40), generator=random).tolist()
        return found
    texts = [form.format(subject) for form in FORMS for subject in SUBJECTS][:num]
    return [encode(model.tokenizer, text) for text in texts]


def encode(tokenizer: Any, text: str) -> list[int]:
    """A user's message, as the model has learned to read it."""
    if tokenizer.chat_template is None:
        return list(tokenizer(text)["input_ids"])
    talk = [{"role": "user", "content": text}]
    made = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)
    return list(made["input_ids"])


def main() -> None:
    parser = argparse.ArgumentParser(description="A small inference engine over pagedkv.")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2, or a folder")
    parser.add_argument("--mode", default="auto", choices=["auto", "swap", "recompute"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--device-blocks", type=int, default=30)
    parser.add_argument("--host-blocks", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=48)
    args = parser.parse_args()
    model = load(args.model, Console())
    model.network.to(args.device)
    spec = pk.KVSpec.from_config(model.network.config, dtype=str(model.network.dtype))
    blocks = {"num_device_blocks": args.device_blocks, "num_host_blocks": args.host_blocks}
    requests = [Request(prompt, args.new_tokens) for prompt in prompts(model)]
    requests[1] = Request(requests[1].prompt, args.new_tokens, n=3, temperature=0.7)
    requests[2] = Request(requests[2].prompt, args.new_tokens, n=4, beams=True)
    with pk.KVCache(spec, device=args.device, **blocks) as kv:
        engine, begin = Engine(model.network, kv, args.mode), time.perf_counter()
        engine.add(requests)
        print("-", end=" ")
        for request, _, token in engine.stream():
            if request is requests[0]:  # as it comes
                print(model.decode([token]), end="" if model.tokenizer else " ", flush=True)
        seconds = time.perf_counter() - begin
    print()
    for new in [new for request in requests[1:] for new in request.outputs]:
        print("-", " ".join(model.decode(new).split()))
    counts = engine.num_preemptions, engine.num_recomputed, engine.num_hits
    print("{} preemptions, {} tokens computed again, {} prefix hits".format(*counts))
    num_tokens = sum(len(new) for request in requests for new in request.outputs)
    print(f"{num_tokens / seconds:.0f} tokens per second")


if __name__ == "__main__":
    main()
