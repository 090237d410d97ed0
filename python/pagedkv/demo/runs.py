"""What the demo runs: the same generate() call with a dense cache and with pagedkv."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor

from pagedkv.demo.model import DemoModel, ModelUnavailable
from pagedkv.integrations.transformers import PagedCache

NEW_TOKENS = 40
MEMORY = "1GiB"  # of which only what is used is touched
SEED = 4

# The beginning that all requests share, and what each asks. Written for a model of 135M weights.
SYSTEM = (
    "You are a storyteller who writes short bedtime stories for children between four and eight "
    "years old. Your stories are set in a small harbour town by the sea, where a lighthouse "
    "keeper, a baker, a fisherman and a curious grey cat live as neighbours. You use simple words, "
    "short sentences and gentle humour. Nobody is hurt in your stories, everyone is kind in the "
    "end, and there is always something good to eat. You describe what can be seen, heard and "
    "smelled. You begin each story right away, with no title and no introduction."
)
QUESTIONS = (
    "Tell a story about the cat and the lighthouse.",
    "Tell a story about a storm and a loaf of bread.",
)


@dataclass(frozen=True)
class Scene:
    """One generate() call: a prompt [1, T] and options; `earlier` is a request that came before."""

    title: str
    prompt: torch.Tensor
    options: dict[str, Any]
    earlier: torch.Tensor | None = None


@dataclass(frozen=True)
class Run:
    """What one run gave: the new tokens of each returned row, and what it took."""

    tokens: list[list[int]]
    seconds: float
    peak_bytes: int
    num_copies: int = 0
    num_hit_tokens: int = 0


@dataclass
class Comparison:
    """The rounds of a scene, dense and paged in turn."""

    dense: list[Run] = field(default_factory=list)
    paged: list[Run] = field(default_factory=list)

    @property
    def seconds(self) -> tuple[float, float]:
        """The medians of dense and paged."""
        return median(r.seconds for r in self.dense), median(r.seconds for r in self.paged)


@dataclass(frozen=True)
class Divergence:
    """Where two runs part: the first differing step, and how near the model was to a tie there.

    `gap` is the distance of the two largest logits after the tokens that both runs share.
    """

    row: int
    step: int
    dense_token: int | None
    paged_token: int | None
    gap: float


def prompts(model: DemoModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts [1, T] that begin alike. Raises ModelUnavailable if the context is short."""
    limit = getattr(model.network.config, "max_position_embeddings", None) or 1 << 30
    if model.tokenizer is None:
        length = min(192, limit - NEW_TOKENS)
        ids = torch.randint(
            model.network.config.vocab_size,
            (2, max(length, 1)),
            generator=torch.Generator().manual_seed(SEED),
        )
        ids[1, : length * 7 // 8] = ids[0, : length * 7 // 8]
        first, second = ids[:1], ids[1:]
    else:
        first, second = (_encode(model.tokenizer, question) for question in QUESTIONS)
        length = max(first.shape[1], second.shape[1])
    if length < 1 or length + NEW_TOKENS > limit:
        raise ModelUnavailable(
            f"{model.name} has room for {limit} tokens, and the demo needs {length + NEW_TOKENS}"
        )
    return first, second


def _encode(tokenizer: Any, question: str) -> torch.Tensor:
    if tokenizer.chat_template is None:
        made = tokenizer(f"{SYSTEM}\n\n{question}\n\n", return_tensors="pt")
    else:
        talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        made = tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids: torch.Tensor = made["input_ids"]
    return ids


def scenes(first: torch.Tensor, second: torch.Tensor) -> list[Scene]:
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    return [
        beam_scene(first, 4),
        beam_scene(first, 8),
        Scene("parallel sampling, n = 4", first, {**sampling, "num_return_sequences": 4}),
        Scene("second request", second, {"do_sample": False}, earlier=first),
    ]


def beam_scene(prompt: torch.Tensor, num_beams: int, earlier: torch.Tensor | None = None) -> Scene:
    options = {"do_sample": False, "num_beams": num_beams}
    return Scene(f"beam search, {num_beams} beams", prompt, options, earlier)


def generate(model: DemoModel, prompt: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    """A seeded generate(): [rows, T + new], in host memory, so that it has ended."""
    prompt = prompt.to(model.network.device)
    torch.manual_seed(SEED)
    end = model.network.generation_config.eos_token_id
    padding = end[0] if isinstance(end, list) else end
    sequences: torch.Tensor = model.network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0 if padding is None else padding,
        **options,
    )
    return sequences.cpu()


def run_dense(model: DemoModel, scene: Scene) -> Run:
    """With a DynamicCache: a row of K and V for each beam or sample."""
    cache: Any = DynamicCache(config=model.network.config)
    begin = time.perf_counter()
    sequences = generate(model, scene.prompt, cache, **scene.options)
    seconds = time.perf_counter() - begin
    # It only grows, so what it holds at the end is its peak.
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return Run(_new_tokens(sequences, scene), seconds, held)


def run_paged(model: DemoModel, scene: Scene) -> Run:
    """With a PagedCache, in which the earlier request, if there is one, has run before."""
    with PagedCache.for_model(model.network, MEMORY) as cache:
        if scene.earlier is not None:
            _serve_before(model, cache, scene.earlier)
        copies_before = cache.stats().num_copies
        begin = time.perf_counter()
        if scene.earlier is not None:
            cache.start(scene.prompt)
        sequences = generate(model, scene.prompt, cache, **scene.options)
        seconds = time.perf_counter() - begin
        stats = cache.stats()
    return Run(
        _new_tokens(sequences, scene),
        seconds,
        stats.peak_bytes,
        stats.num_copies - copies_before,
        stats.num_hit_tokens,
    )


def _serve_before(model: DemoModel, cache: PagedCache, prompt: torch.Tensor, **more: Any) -> None:
    cache.start(prompt)
    cache.finish(generate(model, prompt, cache, do_sample=False, **more))


def _new_tokens(sequences: torch.Tensor, scene: Scene) -> list[list[int]]:
    new: list[list[int]] = sequences[:, scene.prompt.shape[1] :].tolist()
    return new


def find_divergence(
    model: DemoModel, prompt: torch.Tensor, dense: list[list[int]], paged: list[list[int]]
) -> Divergence | None:
    """The first differing row's first differing step; None where all tokens are equal."""
    for row, (one, other) in enumerate(zip(dense, paged, strict=True)):
        if one == other:
            continue
        pairs = zip(one, other, strict=False)
        shorter = min(len(one), len(other))
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        common = torch.cat([prompt, torch.tensor([one[:step]], dtype=prompt.dtype)], dim=1)
        with torch.no_grad():
            logits = model.network(common.to(model.network.device), use_cache=False).logits[0, -1]
        largest, second = logits.float().topk(2).values.tolist()
        return Divergence(
            row,
            step,
            one[step] if step < len(one) else None,
            other[step] if step < len(other) else None,
            largest - second,
        )
    return None


class BlockTokens(LogitsProcessor):
    """Listens to generate() and notes which tokens each block of `cache` holds."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self.tokens: dict[int, list[int]] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kv = self._cache.kv
        size = kv.spec.block_size
        for sequence, row in zip(self._cache._rows.ids, input_ids.tolist(), strict=True):
            for position, block in enumerate(kv.manager.block_table(int(sequence)).tolist()):
                self.tokens[block] = row[position * size : (position + 1) * size]
        return scores


def grow_tree(model: DemoModel, cache: PagedCache, scene: Scene) -> dict[int, list[int]]:
    """Run `scene` and leave its rows in `cache`; returns the tokens in each block."""
    notes = BlockTokens(cache)
    if scene.earlier is not None:
        _serve_before(model, cache, scene.earlier, logits_processor=[notes])
        cache.start(scene.prompt)
    generate(model, scene.prompt, cache, logits_processor=[notes], **scene.options)
    return notes.tokens
