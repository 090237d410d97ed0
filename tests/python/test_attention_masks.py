"""Masks of the caller's in kv.attention, and those that say no more than where rows begin."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import pagedkv as pk  # noqa: E402
from attention_world import AttentionWorld, dense  # noqa: E402
from pagedkv import InvalidSpec  # noqa: E402
from pagedkv.attention import _choose as choose  # noqa: E402
from pagedkv.attention import _look_at as look_at  # noqa: E402
from pagedkv.attention import blockwise, gather  # noqa: E402
from pagedkv.attention.call import Call  # noqa: E402


@pytest.fixture(autouse=True)
def _small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few tokens are many runs of blocks."""
    monkeypatch.setattr(blockwise, "RUN_BYTES", 1)
    monkeypatch.setattr(blockwise, "SHARED_BYTES", 1)


def world(heads: tuple[int, int] = (4, 2), dtype: str = "float32") -> AttentionWorld:
    spec = pk.KVSpec(1, heads[1], 16, dtype, 4)
    return AttentionWorld(
        pk.KVCache(spec, num_device_blocks=60, layout="layer_major"),
        heads[0],
        getattr(torch, dtype),
    )


@pytest.mark.parametrize("backend", ["gather", "blockwise", "auto"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("dtype", "heads"), [("float32", (4, 2)), ("float16", (2, 2))])
def test_a_mask_that_hides_the_beginnings_of_rows(
    backend: str, dtype: str, heads: tuple[int, int], softcap: float | None
) -> None:
    """As padding on the left does: of rows of any lengths, of beams, of beams that differ."""
    w = world(heads, dtype)
    with w.kv:
        ids = w.new([30, 9, 21])
        rows = [*w.kv.fork(ids[0], 3), ids[1], *w.kv.fork(ids[2], 3)]
        for firsts in ([5, 5, 5, 0, 7, 7, 7], [29, 29, 29, 9, 0, 0, 0], [2, 6, 2, 8, 20, 21, 22]):
            counts, lens = [1] * len(rows), [w.kv.length(i) + 1 for i in rows]
            mask = torch.arange(max(lens)) >= torch.tensor(firsts)[:, None]
            q, found = w.step(
                rows,
                counts,
                lambda q, step, mask=mask[:, None, None]: w.kv.attention(
                    0, q, step, softcap=softcap, window=3, attn_mask=mask, backend=backend
                ),
            )
            expected = [
                dense(q[b : b + 1], *w.stored(i), softcap=softcap, first=firsts[b])
                for b, i in enumerate(rows)
            ]
            near = 1e-4 if dtype == "float32" else 2e-2
            torch.testing.assert_close(found.double(), torch.cat(expected), atol=near, rtol=near)


def test_auto_takes_the_kernel_for_padding_on_the_left() -> None:
    seen = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    w = world()
    with w.kv, w.kv.step(w.new([6, 6])) as step:
        for mask, backend in ((seen, blockwise), (seen.flip(1), gather)):
            firsts = look_at(mask[:, None, None], 4, step)
            given = w.randn(2, 4, 16), 1.0, None, None, mask[:, None, None], firsts
            call = Call(w.kv, step, 0, w.kv.spec.layers[0], *given)
            assert choose(call, "auto") is backend


def test_a_mask_that_is_written_over_is_looked_at_again() -> None:
    w = world()
    for inference in (False, True):
        with torch.inference_mode(inference), w.kv.step(w.new([6, 6])) as step:
            k, q = w.randn(2, 2, 16), w.randn(2, 4, 16)
            w.kv.write(0, k, k, step)
            mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
            for first in (0, 2, 5):
                mask[..., :first] = False
                found = w.kv.attention(0, q, step, attn_mask=mask, backend="blockwise")
                expected = w.kv.attention(0, q, step, attn_mask=mask, backend="gather")
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("q_type", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask_type", ["float64", "float32", "bfloat16", "float16"])
def test_a_mask_of_floats_is_of_any_type(
    q_type: str, mask_type: str, softcap: float | None
) -> None:
    w = world()
    with w.kv, w.kv.step(w.new([9, 4]), counts=[2, 2]) as step:
        w.kv.write(0, w.randn(4, 2, 16), w.randn(4, 2, 16), step)
        q, hidden = w.randn(4, 4, 16), torch.rand(2, 4, 2, 11) < 0.3
        mask = torch.zeros(2, 4, 2, 11, dtype=getattr(torch, mask_type))
        mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        expected = w.kv.attention(0, q, step, softcap=softcap, attn_mask=~hidden)
        found = w.kv.attention(
            0, q.to(getattr(torch, q_type)), step, softcap=softcap, attn_mask=mask
        )
        near = 2e-2 if q_type in ("bfloat16", "float16") else 1e-5
        torch.testing.assert_close(found.float(), expected, atol=near, rtol=near)
        with pytest.raises(InvalidSpec, match="attn_mask is torch"):
            w.kv.attention(0, q, step, attn_mask=mask.to(torch.float8_e5m2))


def test_which_masks_hide_beginnings_alone() -> None:
    w = world()
    with w.kv:
        rows = w.new([6, 3])

        def taken(mask: torch.Tensor, counts: list[int]) -> bool:
            with w.kv.step(rows, counts=counts) as step:
                q, refused = w.randn(sum(counts), 4, 16), ""
                try:
                    w.kv.attention(0, q, step, attn_mask=mask, backend="blockwise")
                except InvalidSpec as error:
                    refused = str(error)
                w.kv.attention(0, q, step, attn_mask=mask)
                step.rollback()
            assert not refused or "hides beginnings" in refused
            return not refused

        seen = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 0]], dtype=torch.bool)
        assert taken(seen[:, None, None], [1, 1])  # what is behind a row's end is not looked at
        assert taken(torch.ones(1, dtype=torch.bool), [1, 1])
        hole, none = seen.clone(), seen.clone()
        hole[1, 2], none[1, :4] = False, False
        hole[1, 1] = True
        for other in (hole[:, None, None], none[:, None, None], seen[:, None, None].float()):
            assert not taken(other, [1, 1])
        assert not taken(seen[:, None, None].expand(2, 4, 1, 7), [1, 1])
        assert not taken(torch.ones(2, 1, 1, 8, dtype=torch.bool), [2, 2])


@pytest.mark.parametrize("floating", [False, True])
def test_a_mask_for_all_rows_shows_none_what_is_behind_its_end(floating: bool) -> None:
    """Rows of near lengths are read together, which must not be seen in any of them."""
    torch.manual_seed(0)
    kv = pk.KVCache(pk.KVSpec(1, 2, 8, "float32", 4), num_device_blocks=20)
    ids = [kv.create(), kv.create()]
    with kv.step(ids, counts=[5, 9]) as step:
        k = torch.randn(14, 2, 8)
        kv.write(0, k, -k, step)
    bias = torch.randn(1, 1, 1, 10)
    mask = bias if floating else bias > -1
    with kv.step(ids) as step:
        k, q = torch.randn(2, 2, 8), torch.randn(2, 2, 8)
        kv.write(0, k, -k, step)
        together = kv.attention(0, q, step, attn_mask=mask)
        flat = kv.attention(0, q, step, attn_mask=mask[0, 0])  # [1, 10], broadcast like any
        step.rollback()
    for row, length in ((0, 6), (1, 10)):
        with kv.step(ids[row : row + 1]) as step:
            kv.write(0, k[row : row + 1], -k[row : row + 1], step)
            alone = kv.attention(0, q[row : row + 1], step, attn_mask=mask[..., :length])
            step.rollback()
        torch.testing.assert_close(together[row], alone[0])
        torch.testing.assert_close(flat[row], alone[0])
