"""The cache on a GPU: the same outputs and the same kept tokens as on a CPU, steps in a graph, and nothing that waits.

The references run on the CPU: the masked full cache in float64, and the ragged cache itself, which other tests hold to
it. REASONALLOC_TEST_DEVICE=cpu runs here what needs no CUDA: so it is known how much of a difference is rounding.
"""

import copy
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import compression as of_narrow_heads
from reference import follow_reference, kept_columns, prompts, random_chunks, tiny_model, tiny_profile
from test_transformers import turns
from transformers import DynamicCache

import reasonalloc as ra
from reasonalloc.cache import round as rounds
from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.cache.step import Chunk
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

DEVICE = os.environ.get("REASONALLOC_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda" and torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
cuda_only = pytest.mark.skipif(not ON_CUDA, reason="needs CUDA")

METHODS = [name for name in ra.METHODS if name != "full"]
SOME = ["rkv", "reasonalloc-head", "h2o", "snapkv"]
GREEDY = {"do_sample": False, "max_new_tokens": 60}
WIDE = {"head_dim": 64}  # as real heads are; and kernels are compiled for few widths
EXACT = 2e-4  # of logits that reach 4, in float32
ROUNDING = 0.025  # of all kept tokens: so many may differ where a whole model's rounding decides between two


def model_here(kind="llama", dtype=torch.float32, **changes):
    """The tiny model where the GPU is."""
    return tiny_model(kind, dtype, **sizes(kind, changes)).to(DEVICE)


def sizes(kind, changes):
    """A model's, with heads of 64 channels unless it says otherwise."""
    return {**({"hidden_size": 384} if kind == "qwen2" else WIDE), **changes}


def compression(method, **changes):
    """A method at a tiny budget; a profile is made for heads of 64 channels."""
    if method in ("missalloc", "lossalloc", "sensitivity"):
        changes["profile"] = replace(tiny_profile(), shape=ra.ModelShape(3, 3, 6, 64))
    return of_narrow_heads(method, **changes)


class Here:
    """A model and its cache on the device under test, driven and looked at from the CPU, as ``follow_reference`` does.

    Masks stay away where nothing is padding, as in ``generate``.
    """

    def __init__(self, model, cache):
        self.model, self.cache, self.layers = model, cache, cache.layers
        self.ragged = SimpleNamespace(tokens=self.tokens)

    def __call__(self, ids, past_key_values, attention_mask, position_ids):
        assert past_key_values is self
        inputs = {"position_ids": position_ids.to(DEVICE)}
        if not attention_mask.all():
            inputs["attention_mask"] = attention_mask.to(DEVICE)
        return SimpleNamespace(logits=self.model(ids.to(DEVICE), **inputs, **{CACHE_ARGUMENT: self.cache}).logits.cpu())

    def get_seq_length(self):
        return self.cache.get_seq_length()

    def tokens(self, layer):
        found = self.cache.ragged.tokens(layer)
        return SimpleNamespace(lengths=found.lengths.cpu(), positions=found.positions.cpu())


def follow(cache, model, chunks, tolerance, kind="llama", read=lambda step, logits: logits, **changes):
    """Logits at every step against the masked full cache in float64 on the CPU."""
    dtype = model.dtype
    reference = tiny_model(kind, dtype, attention="masked-reference", **sizes(kind, changes)).double()

    def check(got, wanted, step):
        got, wanted = read(step, got.double()), read(step, wanted)
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance, msg=lambda m: f"step {step}: {m}")

    here = Here(model, cache)
    follow_reference(here, reference, here, chunks, check)
    assert cache.stats().evicted > 0


def feed(model, cache, chunks, device):
    """Given tokens, whatever the model would say; the last logits of every step."""
    seen, logits = torch.zeros(len(chunks[0][0]), 0, dtype=torch.long), []
    for ids, mask in chunks:
        seen = torch.cat([seen, mask], 1)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"position_ids": positions.to(device)}
        if not seen.all():
            inputs["attention_mask"] = seen.to(device)
        with torch.no_grad():
            logits.append(model(ids.to(device), **inputs, **{CACHE_ARGUMENT: cache}).logits[:, -1].cpu())
    return logits


def kept_by(cache, lengths, steps):
    """Which columns every head holds, ``[layers, rows, heads, columns]``."""
    longest = max(lengths)
    columns = [list(range(longest - length, longest + steps)) for length in lengths]
    here = Here(None, cache)
    return torch.stack([kept_columns(here, layer, columns) for layer in range(len(cache.layers))])


def assert_alike(got, want):
    """The same tokens, but for those between which a model's rounding decides."""
    differ = int((got != want).sum())
    assert differ <= ROUNDING * int(want.sum()), f"{differ} of {int(want.sum())} kept tokens differ"


def generated(model, ids, mask, cache, **options):
    """``generate``, on the device under test; on the CPU again."""
    options = {**GREEDY, **options}
    return model.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), **{CACHE_ARGUMENT: cache}, **options).cpu()


# ---- what is attended to and what is kept --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_eviction_equals_the_masked_reference(method):
    model = model_here()
    cache = ra.Cache(model.config, compression(method))
    follow(cache, model, random_chunks((9, 40, 61), 70), EXACT)
    if ON_CUDA:
        assert cache.stats().backend == "triton"


class Driven:
    """A cache that is given its states: alike keys, so that R-KV finds duplicates, and random queries and values."""

    LAYERS, ROWS, PROMPT = 3, 3, 40

    def __init__(self, method, device, dtype, seed):
        self.ragged = RaggedCache(compression(method), ra.ModelShape(3, 3, 6, 64))
        self.to, self.random = {"device": device, "dtype": dtype}, torch.Generator().manual_seed(seed)
        self.centres = self.drawn(self.LAYERS, self.ROWS, 3, 12, 1, 64)
        chunk = Chunk.of(np.arange(self.ROWS), self.PROMPT)
        self.ragged.begin((), (chunk,), self.PROMPT)
        for layer in range(self.LAYERS):
            self.ragged.take(layer, chunk, *self.states(layer, self.PROMPT), 0.125)
            self.ragged.end_layer(layer)

    def drawn(self, *shape):
        return torch.randn(*shape, generator=self.random)

    def states(self, layer, tokens):
        topics = torch.randint(12, (self.ROWS, 3, 1, tokens, 1), generator=self.random)
        near = self.centres[layer].squeeze(-2)[:, :, None].expand(-1, -1, tokens, -1, -1)
        near = near.gather(3, topics.transpose(2, 3).expand(-1, -1, -1, -1, 64)).squeeze(3)
        key = near + 0.7 * self.drawn(self.ROWS, 3, tokens, 64)
        query, value = self.drawn(self.ROWS, 6, tokens, 64), self.drawn(self.ROWS, 3, tokens, 64)
        return tuple(x.to(**self.to) for x in (query, key, value))

    def step(self):
        self.ragged.begin(np.arange(self.ROWS))
        out = []
        for layer in range(self.LAYERS):
            out.append(self.ragged.decode(layer, *self.states(layer, 1), 0.125).cpu().double())
            self.ragged.end_layer(layer)
        return torch.stack(out)

    def kept(self):
        found = [self.ragged.tokens(layer) for layer in range(self.LAYERS)]
        numbers = [(x.lengths.flatten().tolist(), x.positions.flatten(0, 1).tolist()) for x in found]
        return [[sorted(p[:n]) for n, p in zip(*of_layer, strict=True)] for of_layer in numbers]


def closest(method, seed, steps):
    """The least share of its score by which a head's worst kept token was ahead of its best dropped one, in float64.

    Over all rounds. Equal scores do not count: they are copies (pooling), and the earlier token wins anywhere.
    """
    least, select = [], rounds.select

    def watching(candidates, budgets, by_score):
        scores = candidates.scores.sort(-1, descending=True).values
        ahead = (scores[..., :-1] - scores[..., 1:]) / scores[..., 1:].abs()  # nan beside the window, or absent ones
        at = (budgets - 1).clamp(max=ahead.shape[-1] - 1)[..., None]
        found = ahead.gather(-1, at)
        least.append(float(found[found > 0].min()) if (found > 0).any() else torch.inf)
        return select(candidates, budgets, by_score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "select", watching)
        driven = Driven(method, "cpu", torch.float64, seed)
        for _ in range(steps):
            driven.step()
    return min(least)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_states_leave_the_same_tokens(method):
    """Exactly, after each of six rounds: float32 on the GPU, float64 on the CPU. Draws are the same integers.

    No decision is so close that rounding makes it: one float32 ulp apart, the sums of a GPU decide otherwise.
    """
    seed = next(seed for seed in range(11, 31) if closest(method, seed, 96) > 1e-5)
    here, there = Driven(method, DEVICE, torch.float32, seed), Driven(method, "cpu", torch.float64, seed)
    for number in range(1, 97):
        torch.testing.assert_close(here.step(), there.step(), atol=2e-5, rtol=2e-5)
        if number % 16 == 0:
            assert here.kept() == there.kept(), f"after {number} steps"
    assert (here.ragged.table.lengths == there.ragged.table.lengths).all()
    assert int(here.ragged.round.rounds.min()) >= 6


@pytest.mark.parametrize("method", METHODS)
def test_kept_tokens_equal_the_cpus(method):
    lengths, steps = (9, 40, 61), 100
    chunks, kept, counts = random_chunks(lengths, steps), [], []
    for model, device in ((model_here(), DEVICE), (tiny_model(dtype=torch.float64, **WIDE), "cpu")):
        cache = ra.Cache(model.config, compression(method))
        feed(model, cache, chunks, device)
        kept.append(kept_by(cache, lengths, steps))
        stats = cache.stats()
        counts.append((stats.compressions, stats.budgets if method != "reasonalloc-dynamic" else None, stats.seen))
        assert [list(map(sum, layer)) for layer in stats.kept] == kept[-1].sum((2, 3)).tolist()
    assert counts[0] == counts[1]
    assert counts[0][0] >= 6
    assert_alike(*kept)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.04), (torch.bfloat16, 0.25)], ids=str)
def test_half_precision(kind, dtype, tolerance):
    """Logits reach 4; nearly all of the difference is the model's own rounding."""
    model = model_here(kind, dtype)
    cache = ra.Cache(model.config, compression("reasonalloc-head"))
    follow(cache, model, random_chunks((9, 40), 40), tolerance, kind)


@pytest.mark.parametrize(("kind", "tolerance"), [("qwen2", 2e-3), ("qwen3", EXACT), ("mistral", EXACT)])
def test_other_architectures(kind, tolerance):
    model = model_here(kind)
    follow(ra.Cache(model.config, compression("reasonalloc")), model, random_chunks((9, 40), 70), tolerance, kind)


@pytest.mark.parametrize("heads", [1, 6])
def test_one_head_for_all_queries_and_one_for_each(heads):
    model = model_here(num_key_value_heads=heads)
    cache = ra.Cache(model.config, compression("rkv"))
    follow(cache, model, random_chunks((9, 40), 40), EXACT, num_key_value_heads=heads)


@pytest.mark.parametrize("method", SOME)
def test_a_padded_batch_equals_its_single_runs(method):
    model, lengths, steps = model_here(), (9, 40, 61), 80
    chunks = random_chunks(lengths, steps)
    cache = ra.Cache(model.config, compression(method))
    batch = feed(model, cache, chunks, DEVICE)
    kept = kept_by(cache, lengths, steps)
    for row, length in enumerate(lengths):
        one = [(ids[row : row + 1, -length:], mask[row : row + 1, -length:]) for ids, mask in chunks]
        alone = ra.Cache(model.config, compression(method))
        logits = feed(model, alone, one, DEVICE)
        for step, (got, want) in enumerate(zip(batch, logits, strict=True)):
            torch.testing.assert_close(got[row], want[0], atol=EXACT, rtol=EXACT, msg=lambda m, s=step: f"{s}: {m}")
        assert_alike(kept[:, row : row + 1, :, -length - steps :], kept_by(alone, (length,), steps))


@pytest.mark.parametrize("method", ["reasonalloc", "h2o"])
@pytest.mark.parametrize("prompt", ["compete", "protect"])
def test_turns_with_padding_in_between(method, prompt):
    steps, model = turns(), model_here()

    def rows(step, logits):
        return logits[steps[step][1][:, -1].bool()]  # the output of a padded query has no meaning

    cache = ra.Cache(model.config, compression(method, prompt=prompt))
    follow(cache, model, steps, EXACT, read=rows)


@pytest.mark.parametrize(("method", "length"), [("reasonalloc-head", 1500), ("h2o", 700), ("reasonalloc-dynamic", 700)])
def test_long_prompts(method, length):
    model = model_here()
    cache = ra.Cache(model.config, compression(method, budget=64))
    follow(cache, model, random_chunks((length, 300), 40), EXACT)


@pytest.mark.parametrize("method", ["reasonalloc-head", "reasonalloc-dynamic"])
def test_totals_are_exact_in_every_round(method):
    model, (ids, mask), recorder = model_here(), prompts((9, 40, 61)), ra.Recorder()
    cache = ra.Cache(model.config, compression(method), recorder=recorder)
    generated(model, ids, mask, cache, max_new_tokens=120)
    arrays = recorder.arrays()
    assert len(arrays["step"]) >= 6
    assert (arrays["budgets"].sum(-1) == arrays["total"]).all()
    assert (arrays["total"][-4:].sum(1) == 3 * 3 * 24).all()
    assert (arrays["kept"] <= arrays["budgets"]).all()


@pytest.mark.parametrize("method", ["reasonalloc-head", "reasonalloc-dynamic", "h2o"])
def test_a_record_of_tokens_is_what_the_cache_holds(method):
    model, (ids, mask), recorder = model_here(), prompts((9, 40, 61)), ra.Recorder(tokens=True)
    cache = ra.Cache(model.config, compression(method), recorder=recorder)
    generated(model, ids, mask, cache)
    let_go, seen = recorder.tokens.let_go, cache.ragged.table.seen.tolist()
    assert (let_go != -1).any(-1).all()
    for layer in range(3):
        tokens = cache.ragged.tokens(layer)
        for row, head in np.ndindex(3, 3):
            held = np.flatnonzero(let_go[layer, row, head, : seen[row]] == -1)
            late = range(let_go.shape[-1], seen[row])
            assert [*held, *late] == tokens.positions[row, head, : tokens.lengths[row, head]].tolist()


# ---- generate: the same texts as transformers' own caches, nothing evicted -----------------------------------------


def stock_and_ours(model):
    """Makers of caches that keep everything, each with its attention."""
    return (
        ("sdpa", lambda: DynamicCache(config=model.config)),
        ("reasonalloc", lambda: ra.Cache(model.config, ra.Compression.method("full"))),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "top_k": 20},
    ],
    ids=str,
)
def test_beams_and_sampling(options):
    model, (ids, mask), texts = model_here(), prompts((9, 17, 13)), []
    for attention, make in stock_and_ours(model):
        model.set_attn_implementation(attention)
        torch.manual_seed(3)
        texts.append(generated(model, ids, mask, make(), max_new_tokens=20, **options))
    assert torch.equal(*texts)
    cache = ra.Cache(model.config, compression("reasonalloc"))
    assert generated(model, ids, mask, cache, **options).shape[1] == 17 + 60
    assert cache.stats().compressions >= 3


def test_chunks_of_a_prompt_and_a_second_turn():
    model, (ids, mask), texts = model_here("qwen3"), prompts((31,)), []
    for attention, make in stock_and_ours(model):
        model.set_attn_implementation(attention)
        cache = make()
        more = {"prefill_chunk_size": 7} if attention == "reasonalloc" else {}
        first = generated(model, ids, mask, cache, **more)
        second = torch.cat([first, torch.tensor([[5, 6, 7, 8]])], 1)
        texts.append(generated(model, second, torch.ones_like(second), cache))
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_assisted_decoding(kind):
    """An acceptance count comes as a tensor on the device."""
    model, draft, (ids, mask) = model_here(), model_here(attention="sdpa"), prompts((17,))
    with torch.no_grad():
        for parameter in draft.model.layers[2].parameters():
            parameter.mul_(0.97)  # an imperfect draft: some of its tokens are rejected
    options = {"assistant_model": draft} if kind == "draft" else {"prompt_lookup_num_tokens": 3}
    whole = ra.Compression.method("full")
    want = generated(model, ids, mask, ra.Cache(model.config, whole))
    assert torch.equal(generated(model, ids, mask, ra.Cache(model.config, whole), **options), want)
    cache = ra.Cache(model.config, compression("reasonalloc"))
    generated(model, ids, mask, cache, max_new_tokens=150, **options)
    assert cache.stats().evicted > 0
    assert sum(sum(layer[0]) for layer in cache.stats().kept) <= 9 * (24 + 16 + 20)


@pytest.mark.parametrize("method", ["reasonalloc-head", "h2o"])
def test_a_copy_goes_on_as_the_original_would(method):
    """``copy.deepcopy`` between two rounds, after a first one."""
    model, chunks = model_here(), random_chunks((30, 21), 60)
    original = ra.Cache(model.config, compression(method))
    with torch.no_grad():
        feed(model, original, chunks[:1], DEVICE)
        for ids, _ in chunks[1:25]:
            model(ids.to(DEVICE), **padded(original, chunks))
        copied, outputs = copy.deepcopy(original), []
        for cache in (copied, original):
            outputs.append([model(ids.to(DEVICE), **padded(cache, chunks)).logits for ids, _ in chunks[25:]])
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)
    assert copied.stats().kept == original.stats().kept


def padded(cache, chunks):
    """Arguments of the next step of a batch whose prompts were padded."""
    seen = cache.get_seq_length() + 1
    mask = torch.cat([chunks[0][1], torch.ones(2, seen - chunks[0][1].shape[1], dtype=torch.long)], 1).to(DEVICE)
    return {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, CACHE_ARGUMENT: cache}


# ---- recorded steps --------------------------------------------------------------------------------------------------


def both_loops(model, ids, mask, make, **options):
    """Texts and caches of ``decoding_loop``, recorded and eager."""
    caches, texts = (make(), make()), []
    for cache, graph in zip(caches, (True, False), strict=True):
        torch.manual_seed(5)
        loop = {"custom_generate": ra.decoding_loop, "graph": graph}
        texts.append(generated(model, ids, mask, cache, **loop, **options))
    return texts, caches


@cuda_only
@pytest.mark.parametrize("method", METHODS)
def test_recorded_steps_equal_eager_ones(method):
    """Token for token, over rounds; graphs launch the same kernels."""
    model, (ids, mask) = model_here(), prompts((9, 40, 61))
    texts, (recorded, eager) = both_loops(model, ids, mask, lambda: ra.Cache(model.config, compression(method)))
    assert recorded.stats().graph == ""
    assert recorded.stats().graph_bytes > 0
    assert eager.stats().graph
    assert recorded.stats().compressions >= 3
    assert torch.equal(*texts)
    assert recorded.stats().kept == eager.stats().kept


@cuda_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompt", ["compete", "protect"])
def test_recorded_steps_in_half_precision(dtype, prompt):
    model, (ids, mask) = model_here(dtype=dtype), prompts((9, 40))
    make = lambda: ra.Cache(model.config, compression("reasonalloc-head", prompt=prompt))  # noqa: E731
    texts, caches = both_loops(model, ids, mask, make)
    assert caches[0].stats().graph == ""
    assert torch.equal(*texts)


@cuda_only
def test_recorded_steps_that_sample_and_sequences_that_finish():
    """Rows leave in one loop, and idle in the other until half are left: what each writes is the same."""
    model, (ids, mask) = model_here(), prompts((9, 40, 61, 17))
    make = lambda: ra.Cache(model.config, compression("reasonalloc"))  # noqa: E731
    texts, caches = both_loops(model, ids, mask, make, do_sample=True)
    assert torch.equal(*texts)
    answers = both_loops(model, ids, mask, make)[0][0][:, 61:].tolist()
    late = [max(set(row), key=row.index) for row in answers]
    texts, caches = both_loops(model, ids, mask, make, eos_token_id=late[0], pad_token_id=0)
    assert caches[0].stats().graph == ""
    assert torch.equal(*texts)


@cuda_only
def test_recorded_steps_without_a_budget():
    """A full cache grows: its step is recorded anew, and the text is that of transformers' own cache."""
    model, (ids, mask) = model_here(), prompts((9, 17))
    make = lambda: ra.Cache(model.config, ra.Compression.method("full", interval=16))  # noqa: E731
    texts, _ = both_loops(model, ids, mask, make, max_new_tokens=100)
    model.set_attn_implementation("sdpa")
    want = generated(model, ids, mask, DynamicCache(config=model.config), max_new_tokens=100)
    assert torch.equal(texts[0], want)
    assert torch.equal(texts[1], want)


class Steps:
    """Recorded steps of a batch without padding, one by one, with tokens that are given."""

    def __init__(self, model, method, rows=2, interval=16):
        from reasonalloc.engines.transformers.graph import StepGraph

        self.cache = ra.Cache(model.config, compression(method, interval=interval))
        self.model, self.rows = model, rows
        self.tokens = torch.randint(2, 97, (rows, 200), generator=torch.Generator().manual_seed(7)).to(DEVICE)
        with torch.no_grad():
            model(self.tokens[:, :40], **{CACHE_ARGUMENT: self.cache})
            self.graph = StepGraph(model, self.cache.ragged, self.inputs())
        torch.cuda.synchronize()

    def inputs(self):
        at = self.cache.get_seq_length()
        positions = torch.full((self.rows, 1), at, device=DEVICE)
        return {"input_ids": self.tokens[:, at : at + 1], "position_ids": positions, CACHE_ARGUMENT: self.cache}

    def replay(self):
        at = self.cache.get_seq_length()
        self.graph.ids.copy_(self.tokens[:, at : at + 1])
        self.graph._positions.fill_(at)  # it does not know of eager steps in between
        self.cache.replay(self.graph.replay, self.graph.memory, self.graph.ids)
        return self.graph.logits

    def eager(self):
        with torch.no_grad():
            return self.model(**self.inputs()).logits[:, -1]


@cuda_only
@pytest.mark.parametrize("method", METHODS)
def test_recorded_logits_equal_eager_ones(method):
    """Every logit, over three rounds, also of a cache that takes turns."""
    model = model_here()
    recorded, eager, mixed = (Steps(model, method) for _ in range(3))
    for step in range(60):
        want = eager.eager()
        torch.testing.assert_close(recorded.replay(), want, atol=1e-5, rtol=1e-5)
        got = mixed.replay() if step % 5 else mixed.eager()
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert eager.cache.stats().compressions >= 3
    assert recorded.cache.stats().kept == mixed.cache.stats().kept == eager.cache.stats().kept


@cuda_only
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device(method):
    """Replays, rounds, and eager steps between rounds: torch itself would say so."""
    steps = Steps(model_here(), method)
    for _ in range(34):
        steps.replay()  # two rounds: all is compiled
    steps.eager()
    given = steps.inputs()
    torch.cuda.synchronize()
    rounds = steps.cache.stats().compressions
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            steps.model(**given)
        for _ in range(20):
            steps.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps.cache.stats().compressions == rounds + 1


@cuda_only
@pytest.mark.parametrize("method", SOME)
def test_a_round_returns_before_the_device_is_done(method):
    """The device is kept busy for a second, and the host does not notice."""
    steps = Steps(model_here(), method)
    for _ in range(47):
        steps.replay()  # the next one makes all rows due; two rounds before, all is compiled
    rounds = steps.cache.stats().compressions
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # cycles
    steps.replay()
    done.record()
    assert not done.query(), "the host has waited for the device"
    torch.cuda.synchronize()
    assert steps.cache.stats().compressions == rounds + 1


@cuda_only
@pytest.mark.parametrize("method", ["reasonalloc-head", "reasonalloc-dynamic", "h2o"])
def test_memory_stays_where_it_is(method):
    """Over rounds, also where layers grow at the cost of others: one graph serves a whole generation."""
    steps = Steps(model_here(), method)
    memory = steps.cache.ragged.fixed_memory
    for _ in range(60):
        steps.replay()
    assert steps.cache.ragged.fixed_memory == memory
    assert not steps.graph.is_stale


@cuda_only
def test_a_copy_of_a_recorded_cache_has_memory_of_its_own():
    steps = Steps(model_here(), "reasonalloc-head")
    for _ in range(20):
        steps.replay()
    copied, kept = copy.deepcopy(steps.cache), steps.cache.stats().kept
    for _ in range(40):
        steps.replay()
    assert copied.stats().kept == kept
    assert copied.get_seq_length() == 60
    assert not set(copied.ragged.fixed_memory) & set(steps.cache.ragged.fixed_memory) - {0}
    recorded, original = steps.cache, []
    steps.cache = copied
    for _ in range(40):
        original.append(steps.eager())
    assert copied.stats().kept == recorded.stats().kept
    assert np.isfinite(torch.stack(original).float().cpu().numpy()).all()
