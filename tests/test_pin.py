"""prompt="pin": the prompt stays, inside the budget."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import compression, follow_reference, prompts, random_chunks, tiny_model

import reasonalloc as ra
from reasonalloc.cache.arena import ArenaLayout
from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.cache.step import Chunk
from reasonalloc.policies.allocation import ModelShape

METHODS = ["random-pin", "rkv", "snapkv", "reasonalloc-head", "reasonalloc-dynamic", "adakv-rkv", "streaming", "tova"]
LAYERS, HEADS, GROUP, DIM = 3, 2, 2, 8
SHAPE = ModelShape(LAYERS, HEADS, HEADS * GROUP, DIM)


def pinned(method, budget=24, share=0.5, **changes):
    return compression(method, budget, interval=8, prompt="pin", pin_share=share, window=4, **changes)


class Fed:
    """One request in a cache of its own, fed with random states."""

    def __init__(self, chosen, cuts, seed=0):
        self.ragged, self.generator = RaggedCache(chosen, SHAPE), torch.Generator().manual_seed(seed)
        for tokens in cuts:
            self.chunk(tokens)

    def states(self, tokens):
        return [torch.randn(1, heads, tokens, DIM, generator=self.generator) for heads in (HEADS * GROUP, HEADS, HEADS)]

    def chunk(self, tokens):
        chunk = Chunk.of(np.array([0]), tokens)
        self.ragged.begin((), (chunk,), tokens)
        for layer in range(LAYERS):
            call = self.ragged.take if self.ragged.is_new(chunk) else self.ragged.attend
            call(layer, chunk, *self.states(tokens), 1.0)
            self.ragged.end_layer(layer)

    def step(self):
        self.ragged.begin([0])
        for layer in range(LAYERS):
            self.ragged.decode(layer, *self.states(1), 1.0)
            self.ragged.end_layer(layer)

    def positions(self):
        """As they are stored: ``[layers][heads]``."""
        layers = [self.ragged.tokens(layer) for layer in range(LAYERS)]
        return [
            [tokens.positions[0, head, : int(tokens.lengths[0, head])].tolist() for head in range(HEADS)]
            for tokens in layers
        ]


def assert_exact(ragged):
    """Right after a round: budgets that sum to the total, in every layer, and over them."""
    budget, interval = ragged.totals.budget, ragged.compression.interval
    capacities = ragged.table.capacities
    totals = capacities.sum(-1) - HEADS * interval
    assert (totals.sum(0) == LAYERS * HEADS * budget).all()
    assert (ragged.table.lengths <= capacities).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cuts", [(7,), (12,), (40,), (15, 25), (5, 3)], ids=str)
def test_what_is_pinned_stays(method, cuts):
    """A short prompt whole, of a longer one as many tokens as the share allows, the same for good."""
    request = Fed(pinned(method), cuts)
    tokens = min(sum(cuts), 12)
    request.step()
    first = [[head[:tokens] for head in layer] for layer in request.positions()]
    assert all(len(set(head)) == tokens and max(head) < sum(cuts) for layer in first for head in layer)
    if sum(cuts) <= 12:
        assert all(head == list(range(tokens)) for layer in first for head in layer)
    for _ in range(40):
        request.step()
        kept = request.positions()
        assert [[head[:tokens] for head in layer] for layer in kept] == first
        newest = [*range(int(request.ragged.table.seen[0]) - 4, int(request.ragged.table.seen[0]))]
        assert all(head[-4:] == newest for layer in kept for head in layer)
        if not request.ragged.table.steps[0]:
            assert_exact(request.ragged)
            assert (request.ragged.table.lengths >= tokens + 4).all(), "no split starves it"
    assert request.ragged.round.rounds.min() >= 3


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_prompt_and_budget(data):
    window, budget = data.draw(st.integers(0, 4)), data.draw(st.integers(8, 40))
    share = data.draw(st.floats(0.05, 0.6).filter(lambda x: int(x * budget) + window < budget))
    method = data.draw(st.sampled_from(["rkv", "reasonalloc-head", "random-pin", "adakv-rkv"]))
    length = data.draw(st.integers(1, 70))
    chosen = compression(method, budget, interval=3, prompt="pin", pin_share=share, window=window)
    request = Fed(chosen, (length,), seed=length)
    tokens = min(length, int(share * budget))
    assert chosen.most_pinned == int(share * budget)
    request.step()
    first = [[head[:tokens] for head in layer] for layer in request.positions()]
    for _ in range(7):
        request.step()
    assert [[head[:tokens] for head in layer] for layer in request.positions()] == first
    if not request.ragged.table.steps[0]:
        assert_exact(request.ragged)


class Seen(ra.RKV):
    """R-KV that remembers the scores of prompts."""

    found: ClassVar[list] = []

    def score(self, seen):
        scores = super().score(seen)
        self.found.append((scores.clone(), seen.tokens.lengths.clone()))
        return scores


def test_of_a_longer_prompt_the_best_scored_are_pinned():
    Seen.found.clear()
    chosen = ra.Compression(24, Seen(), "uniform", interval=8, prompt="pin", pin_share=0.5, window=4)
    request = Fed(chosen, (40,))
    for layer, (scores, _) in enumerate(Seen.found[:LAYERS]):
        for head in range(HEADS):
            best = scores[0, head, :36].argsort(descending=True)[:12].sort().values
            assert request.positions()[layer][head][:12] == best.tolist()


@pytest.mark.parametrize("method", ["random-pin", "rkv", "reasonalloc-head", "h2o"])
@pytest.mark.parametrize("lengths", [(40,), (40, 9, 17)], ids=str)
def test_outputs_are_those_of_a_masked_full_cache(method, lengths):
    model, reference = tiny_model(), tiny_model(attention="masked-reference")
    cache = ra.Cache(model.config, pinned(method))

    def check(ragged, wanted, step):
        torch.testing.assert_close(ragged, wanted, atol=2e-4, rtol=2e-4)

    follow_reference(model, reference, cache, random_chunks(lengths, 30), check)
    assert cache.stats().compressions >= 3


def test_a_padded_batch_pins_what_its_rows_pin_alone():
    model = tiny_model()
    ids, mask = prompts((40, 9, 17))
    options = {"max_new_tokens": 30, "do_sample": False}
    together = ra.Cache(model.config, pinned("reasonalloc-head"))
    text = model.generate(ids, attention_mask=mask, past_key_values=together, **options)
    for row in range(3):
        alone, own = ra.Cache(model.config, pinned("reasonalloc-head")), mask[row].bool()
        out = model.generate(ids[row : row + 1, own], past_key_values=alone, **options)
        assert out[0, -30:].equal(text[row, -30:])
        assert [layer[row] for layer in together.stats().kept] == [layer[0] for layer in alone.stats().kept]


@pytest.mark.parametrize("method", ["random-pin", "reasonalloc"])
def test_arenas(method):
    """It has a bound, so servers take it; a prompt in chunks pins what it pins in one piece."""
    profile = {"profile": ra.DemandProfile.of_layers((9.0, 1.0, 4.0), SHAPE)} if method == "reasonalloc" else {}
    chosen = pinned(method, **profile)
    assert not chosen.unbounded
    found = []
    for cuts in ((40,), (13, 27)):
        ragged = RaggedCache(chosen, SHAPE)
        layouts = {i: ArenaLayout.of(chosen, SHAPE, ragged.totals.fixed(i), torch.float32) for i in range(LAYERS)}
        memory = {i: torch.zeros(3, layout.nbytes, dtype=torch.uint8) for i, layout in layouts.items()}
        ragged.lend(memory, layouts)
        generator = torch.Generator().manual_seed(0)
        whole = [
            [torch.randn(1, heads, 70, DIM, generator=generator) for heads in (HEADS * GROUP, HEADS, HEADS)]
            for _ in range(LAYERS)
        ]
        at = 0
        for tokens in (*cuts, *[1] * 30):
            chunk = Chunk.of(np.array([1]), tokens, ends_prompt=False)
            decodes = at >= 40
            ragged.begin([1] if decodes else (), () if decodes else (chunk,))
            for layer in range(LAYERS):
                part = [x[:, :, at : at + tokens] for x in whole[layer]]
                if decodes:
                    ragged.decode(layer, *part, 1.0)
                else:
                    call = ragged.take if ragged.is_new(chunk) else ragged.attend
                    call(layer, chunk, *part, 1.0)
                ragged.end_layer(layer)
            at += tokens
        tokens = [ragged.tokens(layer) for layer in range(LAYERS)]
        found.append([x.positions[1, h, : int(x.lengths[1, h])].tolist() for x in tokens for h in range(HEADS)])
    assert found[0] == found[1]
    assert all(max(head[:12]) < 40 for head in found[0])


def test_what_cannot_be_pinned():
    with pytest.raises(
        ValueError, match=r"budget 32 has no room for 24 pinned tokens \(pin_share 0.75\), the window of 8"
    ):
        ra.Compression(32, layers="uniform", prompt="pin")
    with pytest.raises(ValueError, match=r"pin_share is a share of the budget, above 0 and at most 1, got 1\.5"):
        ra.Compression(64, layers="uniform", prompt="pin", pin_share=1.5)
    chosen = ra.Compression.method("random-pin", 64)
    assert (chosen.prompt, chosen.most_pinned, chosen.least) == ("pin", 48, 56)
    assert ra.Compression(64).most_pinned == 0
    halves = ra.Compression.method("h2o", 64, prompt="pin")
    assert (halves.most_pinned, halves.window) == (48, 8), "half of what the prompt leaves"
    assert halves.replace(prompt="compete").window == 32
