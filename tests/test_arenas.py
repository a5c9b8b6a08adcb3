"""Requests in arenas, against a cache of their own for each."""

import random
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reasonalloc as ra
from reasonalloc.allocation import ModelShape
from reasonalloc.arenas import ArenaLayer, ArenaLayout, ArenaPool
from reasonalloc.budgets import LayerBudgets
from reasonalloc.layer_cache import LayerCache, NewTokens

HEADS, GROUP, DIM, ARENAS, SCALING = 3, 2, 8, 4, 8**-0.5
METHODS = ["rkv", "reasonalloc-head", "adakv-rkv", "h2o", "streaming", "vase", "random"]


def compression(method, **changes):
    return ra.Compression.method(method, 24, **{"interval": 8, "window": 4, **changes})


def make_layer(chosen, dtype=torch.float64):
    shape = ModelShape(layers=1, kv_heads=HEADS, query_heads=HEADS * GROUP, head_dim=DIM)
    budgets = LayerBudgets(chosen, shape)
    layout = ArenaLayout.of(chosen, shape, int(budgets.totals(0, 1)[0]), dtype)
    memory = torch.full((ARENAS, layout.nbytes), 255, dtype=torch.uint8)  # NaN, if anybody read it
    return ArenaLayer(0, chosen, budgets, ArenaPool(memory, layout), "rows"), shape


class Alone:
    """A request in a cache of its own."""

    def __init__(self, chosen, shape):
        self.cache = LayerCache(0, chosen, LayerBudgets(chosen, shape), "rows")

    def feed(self, query, key, value):
        query, key, value = query[None], key[None], value[None]
        new = NewTokens.all_real(1, query.shape[2])
        if self.cache.slab is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALING, enable_gqa=True)
            self.cache.prefill(query, key, value, new, SCALING)
        else:
            out = self.cache.attend(query, key, value, new, SCALING)
        return out[0]


def tokens(generator, count):
    def draw(heads):
        return torch.randn(heads, count, DIM, generator=generator, dtype=torch.float64)

    return draw(HEADS * GROUP), draw(HEADS), draw(HEADS)


@pytest.mark.parametrize("method", METHODS)
def test_requests_that_come_and_go_equal_single_caches(method):
    """Prompts in chunks of any length, decoding together, arenas used again: outputs and what is kept, in float64.

    However a prompt is cut, the outcome is that of the prompt in one piece.
    """
    chosen = compression(method)
    layer, shape = make_layer(chosen)
    generator, choose = torch.Generator().manual_seed(0), random.Random(0)
    alone, left = {}, {}
    for _ in range(120):
        for arena in range(ARENAS):
            if arena not in alone and choose.random() < 0.3:
                alone[arena], left[arena] = Alone(chosen, shape), choose.randrange(5, 60)
                cuts = choose.choice([[1], [20], [90], [70, 9, 1], [1, 1], [13, 2, 30], [40, 40], [33, *[1] * 19]])
                q, k, v = tokens(generator, sum(cuts))
                got = [
                    layer.chunk(arena, *(x[:, end - count : end] for x in (q, k, v)), SCALING, first=end == count)
                    for count, end in zip(cuts, accumulate(cuts), strict=True)
                ]
                torch.testing.assert_close(torch.cat(got, 1), alone[arena].feed(q, k, v), atol=1e-12, rtol=0)
        arenas = [arena for arena in alone if choose.random() < 0.8]
        if arenas:
            drawn = [tokens(generator, 1) for _ in arenas]
            q, k, v = (torch.stack(x)[:, :, 0] for x in zip(*drawn, strict=True))
            got = layer.decode(arenas, q, k, v, SCALING)
            for i, arena in enumerate(arenas):
                torch.testing.assert_close(got[i], alone[arena].feed(*drawn[i])[:, 0], atol=1e-12, rtol=0)
                mine, theirs = layer.requests[arena], alone[arena].cache
                assert mine.slab.is_home
                np.testing.assert_array_equal(mine.slab.lengths, theirs.slab.lengths)
                np.testing.assert_array_equal(mine.slab.seen, theirs.slab.seen)
                assert mine.evicted == theirs.evicted
                kept, expected = mine.slab.padded(), theirs.slab.padded()
                assert torch.equal(kept.positions[kept.valid], expected.positions[expected.valid])
                left[arena] -= 1
                if not left[arena]:
                    del alone[arena]


def test_memory_of_a_prompt_whose_request_has_ended_comes_back():
    """Nobody says that a request has ended: one whose prompt lies outside its arena and that is absent has."""
    layer, _ = make_layer(compression("rkv"))
    generator = torch.Generator().manual_seed(0)
    layer.begin_step({0, 1, 2})
    for arena, count in ((0, 90), (1, 90), (2, 20)):
        layer.chunk(arena, *tokens(generator, count), SCALING, first=True)
    assert set(layer.staged) == {0, 1}, "what the arena has room for lies there"
    layer.begin_step({1})
    assert set(layer.staged) == {1}
    assert layer.requests[0].is_home
    layer.chunk(1, *tokens(generator, 5), SCALING, first=False)
    layer.begin_step({1, 2})
    query, key, value = (torch.cat(x, 1).transpose(0, 1) for x in zip(*(tokens(generator, 1),) * 2, strict=True))
    layer.decode([1, 2], query, key, value, SCALING)
    assert not layer.staged
    assert all(request.is_home for request in layer.requests.values())
    layer.chunk(0, *tokens(generator, 70), SCALING, first=True)
    layer.chunk(0, *tokens(generator, 3), SCALING, first=True)  # lent again while staged
    assert not layer.staged


def test_an_arena_is_exactly_as_large_as_its_budget_needs():
    chosen = compression("rkv")
    layer, _ = make_layer(chosen, torch.float32)
    layout = layer.pool.layout
    assert layout.slots == HEADS * (24 + 8)
    rows = 2 * layout.slots + chosen.observed_queries * HEADS * GROUP + -(-4 * layout.slots // (4 * DIM))
    assert layout.nbytes == 4 * DIM * (rows + rows % 2)
    with pytest.raises(ValueError, match=str(layout.nbytes)):
        ArenaPool(torch.zeros(2, layout.nbytes - 32, dtype=torch.uint8), layout)
