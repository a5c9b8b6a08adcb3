"""Requests in arenas, against a cache of their own for each."""

import random
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reasonalloc as ra
from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.cache.pool import Pool
from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.cache.step import Chunk
from reasonalloc.cache.table import DeviceTable, Phase, Table
from reasonalloc.policies.allocation import ModelShape

LAYERS, HEADS, GROUP, DIM, ARENAS, SCALING = 3, 3, 2, 8, 4, 8**-0.5
SHAPE = ModelShape(layers=LAYERS, kv_heads=HEADS, query_heads=HEADS * GROUP, head_dim=DIM)
METHODS = ["rkv", "reasonalloc-head", "adakv-rkv", "h2o", "streaming", "vase", "random"]
UNEQUAL = {"name": "random-split", "split_seed": 1}


def compression(method, **changes):
    return ra.Compression.method(method, 24, **{"interval": 8, "window": 4, "layers": UNEQUAL, **changes})


class Requests:
    """What an engine does with arenas: all parts of a step go through all layers."""

    def __init__(self, chosen, dtype=torch.float64, layers_at_once=1, arenas=ARENAS):
        self.ragged = RaggedCache(chosen, SHAPE, attention="rows", layers_at_once=layers_at_once)
        self.layouts = {i: ArenaLayout.of(chosen, SHAPE, self.ragged.totals.fixed(i), dtype) for i in range(LAYERS)}
        sizes = [arenas * layout.nbytes for layout in self.layouts.values()]
        whole = torch.full((sum(sizes),), 255, dtype=torch.uint8)  # NaN, if anybody read it
        parts = zip(whole.split(sizes), range(LAYERS), strict=True)  # all layers' memory is one tensor
        self.ragged.lend({i: part.view(arenas, -1) for part, i in parts}, self.layouts)

    def step(self, chunks=(), decoding=()):
        """One forward pass.

        Args:
            chunks: (arena, states, ends): part of a prompt, and whether the engine says that the prompt ends with it.
            decoding: (arena, states). States: for every layer query, key and value ``[heads, tokens, dim]``.

        Returns:
            For every layer the outputs of the chunks and of the decoded tokens, ``[query_heads, tokens, dim]`` each.
        """
        ragged = self.ragged
        made = [
            (states, Chunk.of(np.array([arena]), states[0][0].shape[1], ends_prompt=ends))
            for arena, states, ends in chunks
        ]
        ragged.begin([arena for arena, _ in decoding], [chunk for _, chunk in made])
        outputs = []
        for layer in range(LAYERS):
            of_chunks = [feed(ragged, layer, chunk, states[layer]) for states, chunk in made]
            of_decoded = []
            if decoding:
                q, k, v = (torch.stack(x) for x in zip(*(states[layer] for _, states in decoding), strict=True))
                of_decoded = list(ragged.decode(layer, q, k, v, SCALING))
            ragged.end_layer(layer)
            outputs.append((of_chunks, of_decoded))
        return outputs


def feed(ragged, layer, chunk, states):
    """A layer's part of a chunk: the engine attends itself where nothing is cached of the rows."""
    query, key, value = (x[None] for x in states)
    if not ragged.is_new(chunk):
        return ragged.attend(layer, chunk, query, key, value, SCALING)[0]
    ragged.take(layer, chunk, query, key, value, SCALING)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALING, enable_gqa=True)[0]


class Alone:
    """A request in a cache of its own."""

    def __init__(self, chosen):
        self.ragged = RaggedCache(chosen, SHAPE, attention="rows")

    def feed(self, states):
        """A whole prompt first, then one token at a time: for every layer the outputs."""
        count, first = states[0][0].shape[1], not self.ragged.table.rows
        chunk = Chunk.of(np.arange(1), count)
        self.ragged.begin(() if first else (0,), (chunk,) if first else (), count)
        outputs = []
        for layer in range(LAYERS):
            if first:
                outputs.append(feed(self.ragged, layer, chunk, states[layer]))
            else:
                outputs.append(self.ragged.decode(layer, *(x[None] for x in states[layer]), SCALING)[0])
            self.ragged.end_layer(layer)
        return outputs


def states(generator, count):
    """Queries, keys and values of all layers."""

    def draw(heads):
        return torch.randn(heads, count, DIM, generator=generator, dtype=torch.float64)

    return [(draw(HEADS * GROUP), draw(HEADS), draw(HEADS)) for _ in range(LAYERS)]


def cut(whole, count, end):
    """The ``count`` tokens before ``end``."""
    return [tuple(x[:, end - count : end] for x in layer) for layer in whole]


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def kept(ragged, row):
    """Positions that each head of each layer holds, in the order of storage."""
    layers = [ragged.tokens(layer) for layer in range(LAYERS)]
    return [
        [tokens.positions[row, head, :count].tolist() for head, count in enumerate(tokens.lengths[row].tolist())]
        for tokens in layers
    ]


def check_equal(mine, row, theirs):
    np.testing.assert_array_equal(mine.table.lengths[:, row], theirs.table.lengths[:, 0])
    for name in ("seen", "steps", "pushed", "protected", "phases"):
        assert getattr(mine.table, name)[row] == getattr(theirs.table, name)[0], name
    assert kept(mine, row) == kept(theirs, 0)


@pytest.mark.parametrize(
    ("layers", "layers_at_once"),
    [
        pytest.param(UNEQUAL, 1, id="unequal-1"),
        pytest.param(UNEQUAL, LAYERS, id="unequal-all", marks=pytest.mark.slow),
        pytest.param("uniform", LAYERS, id="equal-all"),
        pytest.param("uniform", 1, id="equal-1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_requests_that_come_and_go_equal_single_caches(method, layers, layers_at_once):
    """Prompts in chunks of any length, decoding together, arenas used again: outputs and what is kept, in float64.

    However a prompt is cut, the outcome is that of the prompt in one piece.
    """
    chosen = compression(method, layers=layers)
    requests = Requests(chosen, layers_at_once=layers_at_once)
    ragged = requests.ragged
    equal = layers == "uniform"
    assert (len({*requests.layouts.values()}) == 1) is equal
    assert len(ragged.pools) == (1 if equal and layers_at_once > 1 else LAYERS), "one tensor: equal layers share a pool"
    generator, choose = torch.Generator().manual_seed(0), random.Random(0)
    alone, left, evicted = {}, {}, np.zeros(LAYERS, dtype=np.int64)
    for _ in range(120):
        for arena in range(ARENAS):
            if arena not in alone and choose.random() < 0.3:
                alone[arena], left[arena] = Alone(chosen), choose.randrange(5, 60)
                cuts = choose.choice([[1], [20], [90], [70, 9, 1], [1, 1], [13, 2, 30], [40, 40], [33, *[1] * 19]])
                whole = states(generator, sum(cuts))
                told = choose.random() < 0.5  # whether the engine says so in time, or a decoded token does
                got = [
                    requests.step([(arena, cut(whole, count, end), told and end == sum(cuts))])
                    for count, end in zip(cuts, accumulate(cuts), strict=True)
                ]
                expected = alone[arena].feed(whole)
                for layer in range(LAYERS):
                    assert_same(torch.cat([step[layer][0][0] for step in got], 1), expected[layer])
                if told:
                    check_equal(ragged, arena, alone[arena].ragged)
        decoding = [arena for arena in alone if choose.random() < 0.8]
        if decoding:
            drawn = [states(generator, 1) for _ in decoding]
            got = requests.step(decoding=list(zip(decoding, drawn, strict=True)))
            for i, arena in enumerate(decoding):
                expected = alone[arena].feed(drawn[i])
                for layer in range(LAYERS):
                    assert_same(got[layer][1][i], expected[layer])
                check_equal(ragged, arena, alone[arena].ragged)
                left[arena] -= 1
                if not left[arena]:
                    evicted += alone.pop(arena).ragged.round.evicted
                    ragged.free([arena])
    for request in alone.values():
        evicted += request.ragged.round.evicted
    ragged.end_prompts([*ragged.prompts])  # of those whose first token was not decoded yet
    np.testing.assert_array_equal(ragged.round.evicted, evicted)
    assert evicted.min() > 0


def test_prompts_and_decoded_tokens_share_a_step():
    """Two prompts, one of them in two parts, come in while a third request decodes."""
    chosen = compression("rkv")
    requests, generator = Requests(chosen), torch.Generator().manual_seed(3)
    alone = [Alone(chosen) for _ in range(3)]
    prompts = [states(generator, count) for count in (90, 40, 70)]
    expected = [one.feed(prompt) for one, prompt in zip(alone, prompts, strict=True)]
    requests.step([(0, prompts[0], True)])
    for part in (cut(prompts[2], 50, 50), cut(prompts[2], 20, 70)):
        token = states(generator, 1)
        last = part[0][0].shape[1] == 20
        chunks = [(2, part, last)] if last else [(1, prompts[1], True), (2, part, last)]
        got, wanted = requests.step(chunks, [(0, token)]), alone[0].feed(token)
        for layer in range(LAYERS):
            assert_same(got[layer][1][0], wanted[layer])
            if not last:
                assert_same(got[layer][0][0], expected[1][layer])
            assert_same(got[layer][0][-1], expected[2][layer][:, -20:] if last else expected[2][layer][:, :50])
    for row, one in enumerate(alone):
        check_equal(requests.ragged, row, one.ragged)


@pytest.mark.parametrize("method", ["rkv", "h2o", "reasonalloc-head"])
def test_a_prompt_that_pauses_is_not_compressed_half_way(method):
    """Others decode, through several rounds of theirs, while a request waits for the rest of its prompt."""
    chosen = compression(method)
    requests, generator = Requests(chosen), torch.Generator().manual_seed(1)
    waits, decodes = Alone(chosen), Alone(chosen)
    prompt, other = states(generator, 90), states(generator, 20)
    expected = waits.feed(prompt)
    decodes.feed(other)
    requests.step([(1, other, True)])
    first = requests.step([(0, cut(prompt, 70, 70), False)])
    for _ in range(3 * chosen.interval):
        token = states(generator, 1)
        requests.step(decoding=[(1, token)])
        decodes.feed(token)
    assert requests.ragged.table.phases.tolist()[:2] == [Phase.PROMPT, Phase.DECODING]
    assert requests.ragged.prompts[0].counts.tolist() == [70], "all of it is still there"
    assert requests.ragged.round.evicted.min() > 0
    np.testing.assert_array_equal(requests.ragged.round.evicted, decodes.ragged.round.evicted)
    last = requests.step([(0, cut(prompt, 20, 90), True)])
    for layer in range(LAYERS):
        assert_same(torch.cat([first[layer][0][0], last[layer][0][0]], 1), expected[layer])
    check_equal(requests.ragged, 0, waits.ragged)
    check_equal(requests.ragged, 1, decodes.ragged)


def test_memory_of_a_prompt_whose_request_has_ended_comes_back():
    """A prompt lies outside its arena until it ends; the engine says when its request ends before that."""
    requests = Requests(compression("rkv", layers="uniform"))
    ragged, generator = requests.ragged, torch.Generator().manual_seed(0)
    requests.step([(arena, states(generator, count), False) for arena, count in ((0, 90), (1, 90), (2, 20))])
    assert set(ragged.prompts) == {0, 1, 2}
    one = 2 * LAYERS * HEADS * 90 * DIM * 8
    for arena in (0, 1):
        of_pools = [ragged.prompts[arena].of(pool) for pool in ragged.pools]
        tensors = [x for memory in of_pools for x in (memory.keys, memory.values)]
        assert sum(x.untyped_storage().nbytes() for x in tensors) == one, "nothing else of the batch is held"
    ragged.free([0, 3])  # the other was never used
    assert set(ragged.prompts) == {1, 2}
    assert ragged.table.phases.tolist() == [Phase.EMPTY, Phase.PROMPT, Phase.PROMPT, Phase.EMPTY]
    assert (ragged.table.seen[0], ragged.table.pushed[0]) == (0, 0)
    requests.step([(1, states(generator, 5), False)])
    assert ragged.prompts[1].counts.tolist() == [95]
    ragged.end_prompts([1, 2])
    assert not ragged.prompts
    assert ragged.table.lengths[:, 1].sum(-1).tolist() == [HEADS * 24] * LAYERS
    requests.step([(0, states(generator, 70), False)])
    ragged.free([0])
    requests.step([(0, states(generator, 3), True)])  # lent again while a prompt lay beside it
    assert not ragged.prompts
    assert ragged.table.lengths[:, 0].tolist() == [[3] * HEADS] * LAYERS
    requests.step(decoding=[(arena, states(generator, 1)) for arena in (0, 1, 2)])


def test_an_arena_is_exactly_as_large_as_its_budget_needs():
    chosen = compression("rkv", layers="uniform")
    layout = Requests(chosen, torch.float32).layouts[0]
    assert layout.slots == HEADS * (24 + 8)
    rows = 2 * layout.slots + chosen.observed_queries * HEADS * GROUP + -(-4 * layout.slots // (4 * DIM))
    assert layout.nbytes == 4 * DIM * (rows + rows % 2)
    table, memory = Table(1, 2, HEADS), torch.zeros(2, layout.nbytes - 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=str(layout.nbytes)):
        Pool.lent(table, DeviceTable(table, memory.device), [0], memory, layout)


def test_layers_share_a_pool_where_their_memory_is_one():
    """As slices of one tensor, one behind the other, equally laid out, and no more than may share one."""
    chosen = compression("rkv", layers="uniform")

    def pools(memory, at_once):
        ragged = RaggedCache(chosen, SHAPE, attention="rows", layers_at_once=at_once)
        layout = ArenaLayout.of(chosen, SHAPE, ragged.totals.fixed(0), torch.float32)
        ragged.lend(memory(layout.nbytes), dict.fromkeys(range(LAYERS), layout))
        assert [layer for pool in ragged.pools for layer in pool.layers] == [0, 1, 2]
        return [len(pool.layers) for pool in ragged.pools]

    def one(nbytes, order=(0, 1, 2)):
        whole = torch.zeros(LAYERS, 2, nbytes, dtype=torch.uint8)
        return {layer: whole[place] for layer, place in enumerate(order)}

    assert pools(one, 3) == [3]
    assert pools(one, 2) == [2, 1]
    assert pools(one, 1) == [1, 1, 1]
    assert pools(lambda nbytes: one(nbytes, (0, 2, 1)), 3) == [1, 1, 1], "the second lies behind the third"
    assert pools(lambda n: {i: torch.zeros(2, n, dtype=torch.uint8) for i in range(LAYERS)}, 3) == [1, 1, 1]


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (ra.Compression(None), "budget"),
        (ra.Compression(24, layers="dynamic"), "dynamic|measured"),
        (ra.Compression(24, layers="uniform", prompt="protect"), "protect"),
    ],
)
def test_what_has_no_bound_is_refused_where_arenas_are_made(chosen, reason):
    ragged = RaggedCache(chosen, ra.ModelShape(1, HEADS, HEADS * GROUP, DIM))
    with pytest.raises(ValueError, match=f"arenas have a fixed size: .*({reason})"):
        ragged.lend({0: torch.zeros(2, 64)}, {})
