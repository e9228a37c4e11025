"""`paged_attention` of a flat batch against plain attention in fp64, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama_multimodal import ops
from llama_multimodal.ops import PagedCache, PagedReads, PagedRun, paged_attention

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 8, 3


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q [T, H, D]; k, v [S, Hkv, D] → [T, H, D], in fp64 and with every score written out."""
    q, k, v = q.double(), *(x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / DIM**0.5
    if causal:
        before = len(k) - len(q)
        seen = torch.arange(len(k)) <= before + torch.arange(len(q))[:, None]
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked_at_once", [1, 40, 1 << 23])
def test_rows_of_one_token_and_of_many(
    dtype: torch.dtype, masked_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(paged_attention.__globals__, "_MASKED_AT_ONCE", masked_at_once)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(40, SLOTS, KV_HEADS, DIM, generator=generator).to(dtype) for _ in range(2))
    order = torch.randperm(40, generator=generator).tolist()
    # Rows of one token: keys of each, 0 too. Then runs: tokens, keys, causal; and two tokens that read nothing.
    singles, runs = [7, 0, 1, 12], [(5, 5, True), (4, 11, True), (2, 9, False)]
    count = len(singles) + sum(tokens for tokens, _, _ in runs) + 2
    q = torch.randn(1, HEADS, count, DIM, generator=generator).to(dtype)
    table = torch.zeros(len(singles), 4, dtype=torch.int32)
    for row, length in enumerate(singles):
        blocks = [order.pop() for _ in range(-(-length // SLOTS))]
        table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    placed, first = [], len(singles)
    for tokens, length, causal in runs:
        blocks = torch.tensor([order.pop() for _ in range(-(-length // SLOTS))])
        placed.append(PagedRun(first, first + tokens, blocks, length, causal))
        first += tokens
    out = paged_attention(q, keys, values, PagedReads(table, torch.tensor(singles, dtype=torch.int32), tuple(placed)))

    expected = torch.zeros(count, HEADS, DIM, dtype=torch.float64)
    flat = q[0].transpose(0, 1)
    for row, length in enumerate(singles):
        if length:
            k, v = (cache[table[row].long()].flatten(0, 1)[:length] for cache in (keys, values))
            expected[row] = plain(flat[row : row + 1], k, v, False)
    for run in placed:
        k, v = (cache[run.blocks].flatten(0, 1)[: run.length] for cache in (keys, values))
        expected[run.first : run.end] = plain(flat[run.first : run.end], k, v, run.causal)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out[0].transpose(0, 1).double(), expected, atol=tolerance, rtol=0)


def test_what_is_written_lies_in_its_slots() -> None:
    keys, values = ([torch.zeros(4, SLOTS, KV_HEADS, DIM) for _ in range(2)] for _ in range(2))
    slots = torch.tensor([10, 0, 4])
    reads = PagedReads(torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), ())
    k, v = torch.randn(1, KV_HEADS, 3, DIM), torch.randn(1, KV_HEADS, 3, DIM)
    PagedCache(keys, values, reads, slots).write(1, k, v)
    for cache, new in ((keys[1], k), (values[1], v)):
        assert torch.equal(cache.flatten(0, 1)[slots], new[0].transpose(0, 1))
        assert cache.count_nonzero() == new.count_nonzero()
    assert not keys[0].any()


def test_forced_backends_read_blocks_of_any_size() -> None:
    """A tile's tokens are one block: 1601 of them, or any other number."""
    for backend in ("torch", "cpu"):
        try:
            with ops.use_backend(backend):
                q = torch.randn(1, HEADS, 1, DIM)
                k, v = torch.randn(2, 2, 1601, KV_HEADS, DIM)
                reads = PagedReads(torch.tensor([[1, 0]]).int(), torch.tensor([3202]).int(), ())
                out = paged_attention(q, k, v, reads)
        except ops._dispatch.DeviceError:
            continue
        expected = plain(q[0].transpose(0, 1), k[[1, 0]].flatten(0, 1), v[[1, 0]].flatten(0, 1), False)
        torch.testing.assert_close(out[0].transpose(0, 1).double(), expected, atol=1e-5, rtol=0)
