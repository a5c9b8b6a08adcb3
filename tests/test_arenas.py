"""Requests in arenas, against a cache of their own for each."""

import random
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reasonalloc as ra
from reasonalloc.cache.arenas import ArenaLayers, ArenaLayout, ArenaPool
from reasonalloc.cache.arenas.table import ArenaTable
from reasonalloc.cache.layer_cache import LayerCache, NewTokens
from reasonalloc.cache.totals import LayerBudgets
from reasonalloc.policies.allocation import ModelShape

LAYERS, HEADS, GROUP, DIM, ARENAS, SCALING = 2, 3, 2, 8, 4, 8**-0.5
METHODS = ["rkv", "reasonalloc-head", "adakv-rkv", "h2o", "streaming", "vase", "random"]


def compression(method, **changes):
    unequal = {"name": "random-split", "split_seed": 1}
    return ra.Compression.method(method, 24, **{"interval": 8, "window": 4, "layers": unequal, **changes})


def make_layers(chosen, dtype=torch.float64):
    shape = ModelShape(layers=LAYERS, kv_heads=HEADS, query_heads=HEADS * GROUP, head_dim=DIM)
    budgets = LayerBudgets(chosen, shape)
    layouts = {i: ArenaLayout.of(chosen, shape, int(budgets.totals(i, 1)[0]), dtype) for i in range(LAYERS)}
    memory = {  # NaN, if anybody read it
        i: torch.full((ARENAS, layout.nbytes), 255, dtype=torch.uint8) for i, layout in layouts.items()
    }
    return ArenaLayers(chosen, budgets, memory, layouts, "rows"), shape


class Alone:
    """A request in a cache of its own."""

    def __init__(self, chosen, shape):
        budgets = LayerBudgets(chosen, shape)
        self.layers = [LayerCache(i, chosen, budgets, "rows") for i in range(LAYERS)]

    def feed(self, layer, query, key, value):
        cache = self.layers[layer]
        query, key, value = query[None], key[None], value[None]
        new = NewTokens.all_real(1, query.shape[2])
        if cache.slab is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALING, enable_gqa=True)
            cache.prefill(query, key, value, new, SCALING)
        else:
            out = cache.attend(query, key, value, new, SCALING)
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
    arenas, shape = make_layers(chosen)
    assert arenas.layers[0].pool.layout != arenas.layers[1].pool.layout
    generator, choose = torch.Generator().manual_seed(0), random.Random(0)
    alone, left = {}, {}
    for _ in range(120):
        for arena in range(ARENAS):
            if arena not in alone and choose.random() < 0.3:
                alone[arena], left[arena] = Alone(chosen, shape), choose.randrange(5, 60)
                cuts = choose.choice([[1], [20], [90], [70, 9, 1], [1, 1], [13, 2, 30], [40, 40], [33, *[1] * 19]])
                for layer in arenas.layers:
                    q, k, v = tokens(generator, sum(cuts))
                    got = [
                        layer.chunk(arena, *(x[:, end - count : end] for x in (q, k, v)), SCALING, first=end == count)
                        for count, end in zip(cuts, accumulate(cuts), strict=True)
                    ]
                    expected = alone[arena].feed(layer.layer, q, k, v)
                    torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-12, rtol=0)
        decoding = [arena for arena in alone if choose.random() < 0.8]
        if decoding:
            arenas.begin_step(set(alone), decoding)
            for layer in arenas.layers:
                drawn = [tokens(generator, 1) for _ in decoding]
                q, k, v = (torch.stack(x)[:, :, 0] for x in zip(*drawn, strict=True))
                got = layer.decode(decoding, q, k, v, SCALING)
                for i, arena in enumerate(decoding):
                    expected = alone[arena].feed(layer.layer, *drawn[i])[:, 0]
                    torch.testing.assert_close(got[i], expected, atol=1e-12, rtol=0)
                    check_equal(layer.requests[arena], alone[arena].layers[layer.layer])
            for arena in decoding:
                left[arena] -= 1
                if not left[arena]:
                    del alone[arena]


def check_equal(mine, theirs):
    assert mine.slab.is_home
    np.testing.assert_array_equal(mine.slab.lengths, theirs.slab.lengths)
    np.testing.assert_array_equal(mine.slab.seen, theirs.slab.seen)
    assert (mine.steps, mine.evicted, mine.seen_columns) == (theirs.steps, theirs.evicted, theirs.seen_columns)
    kept, expected = mine.slab.padded(), theirs.slab.padded()
    assert torch.equal(kept.positions[kept.valid], expected.positions[expected.valid])


def test_memory_of_a_prompt_whose_request_has_ended_comes_back():
    """Nobody says that a request has ended: one whose prompt lies outside its arena and that is absent has."""
    arenas, _ = make_layers(compression("rkv", layers="uniform"))
    layer = arenas.layers[1]
    generator = torch.Generator().manual_seed(0)
    arenas.begin_step({0, 1, 2}, [])
    for arena, count in ((0, 90), (1, 90), (2, 20)):
        layer.chunk(arena, *tokens(generator, count), SCALING, first=True)
    assert set(layer.staged) == {0, 1}, "what the arena has room for lies there"
    arenas.begin_step({1}, [])
    assert set(layer.staged) == {1}
    assert layer.requests[0].is_home
    layer.chunk(1, *tokens(generator, 5), SCALING, first=False)
    layer.end_prompts([1, 2])
    assert not layer.staged
    assert all(request.is_home for request in layer.requests.values())
    layer.chunk(0, *tokens(generator, 70), SCALING, first=True)
    layer.chunk(0, *tokens(generator, 3), SCALING, first=True)  # lent again while staged
    assert not layer.staged


def test_an_arena_is_exactly_as_large_as_its_budget_needs():
    chosen = compression("rkv", layers="uniform")
    arenas, _ = make_layers(chosen, torch.float32)
    layout = arenas.layers[0].pool.layout
    assert layout.slots == HEADS * (24 + 8)
    rows = 2 * layout.slots + chosen.observed_queries * HEADS * GROUP + -(-4 * layout.slots // (4 * DIM))
    assert layout.nbytes == 4 * DIM * (rows + rows % 2)
    with pytest.raises(ValueError, match=str(layout.nbytes)):
        ArenaPool(torch.zeros(2, layout.nbytes - 32, dtype=torch.uint8), layout, ArenaTable(1, 2, HEADS), 0)
