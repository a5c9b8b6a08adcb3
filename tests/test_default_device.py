"""Nothing depends on torch's default device: an engine that builds a model on a GPU sets it.

Here it is "meta", where a tensor made without a device has no numbers: the caches live in memory on the CPU.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import tiny_profile

import reasonalloc as ra
from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.cache.step import Chunk
from reasonalloc.cache.totals import LayerTotals
from reasonalloc.policies.compression import Compression
from reasonalloc.policies.methods import METHODS

PROFILE = tiny_profile()
SHAPE = PROFILE.shape
BUDGET = 24
ARENA_METHODS = [name for name in METHODS if name not in ("full", "reasonalloc-dynamic")]


def compression(method, **changes):
    fields = {"interval": 8, "window": 4, **changes}
    return Compression.method(method, BUDGET, **fields, profile=PROFILE)


def states(generator, tokens):
    """Queries, keys and values ``[1, heads, tokens, dim]``."""
    heads = (SHAPE.query_heads, SHAPE.kv_heads, SHAPE.kv_heads)
    return [torch.randn(1, n, tokens, SHAPE.head_dim, generator=generator, device="cpu") for n in heads]


def feed(ragged, generator, chunks=(), decoding=()):
    ragged.begin(decoding, chunks)
    for layer in range(SHAPE.layers):
        for chunk in chunks:
            query, key, value = states(generator, chunk.columns)
            if ragged.is_new(chunk):
                F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
                ragged.take(layer, chunk, query, key, value, 0.25)
            else:
                ragged.attend(layer, chunk, query, key, value, 0.25)
        if len(decoding):
            each = [states(generator, 1) for _ in decoding]
            ragged.decode(layer, *(torch.cat(x) for x in zip(*each, strict=True)), 0.25)
        ragged.end_layer(layer)


def arenas(chosen, memory):
    """Two requests, one in an arena of another before; prompts in parts, steps of some rows, several rounds."""
    ragged, generator = RaggedCache(chosen, SHAPE), torch.Generator(device="cpu").manual_seed(0)
    layouts = {i: ArenaLayout.of(chosen, SHAPE, ragged.totals.fixed(i), torch.float32) for i in range(SHAPE.layers)}
    ragged.lend({i: memory[i][: 3 * x.nbytes].view(3, -1) for i, x in layouts.items()}, layouts)
    feed(ragged, generator, [Chunk.of(np.array([1]), 40, ends_prompt=False)])
    feed(ragged, generator, [Chunk.of(np.array([1]), 5), Chunk.of(np.array([2]), 30)])
    for i in range(20):
        feed(ragged, generator, decoding=[1, 2] if i % 3 else [1])
    ragged.free([1])
    feed(ragged, generator, [Chunk.of(np.array([1]), 3, ends_prompt=False)], [2])
    for _ in range(20):
        feed(ragged, generator, decoding=[2, 1])
    return ragged


def batch(chosen, _):
    """A cache of its own: a padded prompt, steps, a new turn, rows that leave."""
    ragged, generator = RaggedCache(chosen, SHAPE), torch.Generator(device="cpu").manual_seed(0)

    def chunk(tokens, real=None):
        rows = np.arange(2)
        of = Chunk.of(rows, tokens) if real is None else Chunk.masked(rows, real)
        ragged.begin((), [of], tokens)
        for layer in range(SHAPE.layers):
            call = ragged.take if ragged.is_new(of) else ragged.attend
            call(layer, of, *(torch.cat([x, x]) for x in states(generator, tokens)), 0.25)
            ragged.end_layer(layer)

    real = torch.ones(2, 40, dtype=torch.bool, device="cpu")
    real[0, :9] = False
    chunk(40, real)
    for _ in range(20):
        feed(ragged, generator, decoding=[0, 1])
    chunk(6)
    ragged.select([1, 0, 1])
    for _ in range(20):
        feed(ragged, generator, decoding=[0, 1, 2])
    return ragged


def kept(ragged):
    layers = [ragged.tokens(layer) for layer in range(SHAPE.layers)]
    return [
        [row[head, : int(n)].tolist() for row, counts in zip(x.positions, x.lengths, strict=True)
         for head, n in enumerate(counts)]
        for x in layers
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("life", "method"),
    [*((arenas, name) for name in ARENA_METHODS), (batch, "reasonalloc-dynamic"), (batch, "h2o"), (batch, "full")],
)
def test_the_default_device_is_not_asked(life, method):
    memory = torch.zeros(SHAPE.layers, 1 << 20, dtype=torch.uint8)
    chosen = compression(method) if method != "full" else Compression(None)
    expected = life(chosen, memory.clone())
    with torch.device("meta"):
        chosen = compression(method) if method != "full" else Compression(None)
        ragged = life(chosen, memory)
        found = kept(ragged)
    assert found == kept(expected)
    if method != "full":
        assert ragged.round.evicted.min() > 0
        assert sum(LayerTotals(chosen, SHAPE).of(np.arange(SHAPE.layers), np.zeros(1, np.int64))[:, 0]) == (
            SHAPE.layers * SHAPE.kv_heads * BUDGET
        )


def test_profiles_load_whatever_the_default_device_is(tmp_path):
    (tmp_path / "profile.json").write_bytes(PROFILE.to_json())
    with torch.device("meta"):
        loaded = ra.DemandProfile.load(tmp_path / "profile.json")
        for layers in ("wave", "sensitivity", "miss-curve", "pyramid", "uniform"):
            chosen = Compression(BUDGET, layers=layers, profile=loaded)
            assert LayerTotals(chosen, SHAPE).of(np.arange(SHAPE.layers), np.zeros(1, np.int64)).sum() == 9 * BUDGET
