"""The transformers adapter against stock transformers and against the masked full-cache reference."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from reference import (
    ARCHITECTURES,
    compression,
    follow_reference,
    kept_columns,
    prompts,
    random_chunks,
    tiny_model,
)
from transformers import DynamicCache

import reasonalloc as ra
from reasonalloc.cache.pool import Pool
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

METHODS = [name for name in ra.METHODS if name != "full"]
DRAWN = {"random", "random-pin", "vase", "vase-queryfree"}  # a draw depends on the row of the batch, by design
GREEDY = {"do_sample": False, "max_new_tokens": 40}


def full_cache(model):
    return ra.Cache(model.config, ra.Compression.method("full"))


# ---- nothing evicted: stock transformers is the reference --------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [(17,), (9, 17, 13, 5)])
def test_without_eviction_equals_dynamic_cache(kind, dtype, lengths):
    ids, mask = prompts(lengths)
    options = {**GREEDY, "attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    model = tiny_model(kind, dtype, attention="sdpa")
    want = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    model.set_attn_implementation("reasonalloc")
    roomy = ra.Cache(model.config, ra.Compression(budget=200))
    for cache in (None, full_cache(model), roomy):
        got = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(got.sequences, want.sequences)
        tolerance = 2e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=tolerance, rtol=tolerance)
    assert roomy.get_seq_length() == max(lengths) + 39
    assert roomy.stats().kept[0] == [[n + 39] * 3 for n in lengths], "padding was stored, or a token lost"


def test_multi_head_attention_and_one_token_prompt():
    ids, mask = prompts((1,))
    model = tiny_model(num_key_value_heads=6, attention="sdpa")
    want = model.generate(ids, attention_mask=mask, **GREEDY)
    model.set_attn_implementation("reasonalloc")
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=full_cache(model), **GREEDY), want)


def two_more(ids, mask):
    """The same prompts and two tokens more."""
    return torch.cat([ids, ids[:, :2]], 1), torch.cat([mask, torch.ones_like(mask[:, :2])], 1)


@pytest.mark.parametrize("budget", [24, 64])
@pytest.mark.parametrize("backend", ["rows", "compiled"])
def test_a_copied_cache_goes_on_as_the_original_would(backend, budget):
    """A prefilled prompt, used several times: ``copy.deepcopy(cache)``, as with transformers' own caches."""
    model = tiny_model()
    ids, mask = prompts((30, 21))
    longer, longer_mask = two_more(ids, mask)

    def prefilled():
        cache = ra.Cache(model.config, compression("random", budget=budget), attention=backend)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        return cache

    def answer(cache):
        options = {"attention_mask": longer_mask, "past_key_values": cache, "do_sample": False, "max_new_tokens": 60}
        return model.generate(longer, **options), cache.stats().kept

    original = prefilled()
    copied = copy.deepcopy(original)
    want, kept = answer(prefilled())
    for cache in (copied, original):
        got, got_kept = answer(cache)
        assert torch.equal(got, want)
        assert got_kept == kept


@pytest.mark.parametrize("make", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("method", ["reasonalloc", "h2o"])
def test_a_cache_copied_while_it_decodes_has_numbers_of_its_own(method, make):
    model = tiny_model(dtype=torch.float64)
    chunks = random_chunks((30,), 60)
    original = ra.Cache(model.config, compression(method))
    outputs = {"copied": [], "original": []}
    with torch.no_grad():
        for ids, _ in chunks[:21]:
            model(ids, past_key_values=original)
        copied = make(original)
        for name, cache in (("copied", copied), ("original", original)):
            for ids, _ in chunks[21:]:
                outputs[name].append(model(ids, past_key_values=cache).logits)
    for one, other in zip(*outputs.values(), strict=True):
        assert torch.equal(one, other)
    assert copied.stats().kept == original.stats().kept


def test_a_prompt_read_in_inference_mode_can_be_gone_on_with():
    model = tiny_model()
    ids, mask = prompts((30, 21))
    outputs = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = ra.Cache(model.config, compression("reasonalloc"))
        with mode():
            model(ids, attention_mask=mask, past_key_values=cache)
        longer, longer_mask = two_more(ids, mask)
        outputs.append(model.generate(longer, attention_mask=longer_mask, past_key_values=cache, **GREEDY))
    assert torch.equal(*outputs)


def booleans():
    """All boolean tensors of this process."""
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.dtype == torch.bool]


def test_no_mask_outlives_the_prompt():
    """A chunk's mask has as many entries as the chunk times all before it."""
    model = tiny_model()
    cache = ra.Cache(model.config, compression("rkv"))
    ids, mask = prompts((9, 61))
    options = {"past_key_values": cache, "do_sample": False, "prefill_chunk_size": 25}
    others = booleans()
    model.generate(ids, attention_mask=mask, max_new_tokens=1, **options)
    known = {id(x) for x in others}
    alive = [x for x in booleans() if id(x) not in known]
    assert max(x.untyped_storage().nbytes() for x in alive) <= 2 * mask.numel()  # there is room for what comes


@pytest.mark.parametrize("backend", ["rows", "compiled"])
@pytest.mark.parametrize("lengths", [(17,), (9, 17, 13)])
def test_beams_sampling_and_several_samples(lengths, backend):
    ids, mask = prompts(lengths)
    model = tiny_model(attention="sdpa")
    calls = [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True},
    ]

    def run(options, cache):
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, max_new_tokens=20, past_key_values=cache, **options)

    want = [run(options, None) for options in calls]
    model.set_attn_implementation("reasonalloc")
    for options, expected in zip(calls, want, strict=True):
        cache = ra.Cache(model.config, ra.Compression.method("full"), attention=backend)
        assert torch.equal(run(options, cache), expected)


def test_chunked_prefill_and_a_second_turn():
    ids, _ = prompts((31,))
    model = tiny_model("qwen3", attention="sdpa")
    first = model.generate(ids, **GREEDY)
    second_prompt = torch.cat([first, torch.tensor([[5, 6, 7, 8]])], 1)
    second = model.generate(second_prompt, **GREEDY)
    model.set_attn_implementation("reasonalloc")
    cache = full_cache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, prefill_chunk_size=7, **GREEDY), first)
    assert torch.equal(model.generate(second_prompt, past_key_values=cache, **GREEDY), second)


def test_assisted_and_prompt_lookup_decoding():
    ids, _ = prompts((17,))
    model, draft = tiny_model(), tiny_model(attention="sdpa")
    with torch.no_grad():
        for parameter in draft.model.layers[2].parameters():
            parameter.mul_(0.97)  # an imperfect draft: some of its tokens are rejected
    want = model.generate(ids, **GREEDY)
    for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, past_key_values=full_cache(model), **GREEDY, **options), want)


def test_plain_forward_is_stock_sdpa():
    ids, mask = prompts((9, 17))
    model = tiny_model(attention="sdpa")
    want = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("reasonalloc")
    assert torch.equal(model(ids, attention_mask=mask).logits, want)


# ---- with eviction: the masked full cache is the reference ---------------------------------------------------------


def check_close(tolerance):
    def check(ragged, wanted, step):
        torch.testing.assert_close(ragged, wanted, atol=tolerance, rtol=tolerance, msg=lambda m: f"step {step}: {m}")

    return check


@pytest.mark.parametrize("method", METHODS)
def test_eviction_equals_masked_reference(method):
    model, reference = (
        tiny_model(dtype=torch.float64),
        tiny_model(dtype=torch.float64, attention="masked-reference"),
    )
    cache = ra.Cache(model.config, compression(method))
    follow_reference(model, reference, cache, random_chunks((9, 40, 61), 300), check_close(1e-9))
    stats = cache.stats()
    assert stats.evicted > 0
    assert max(k for layer in stats.kept for row in layer for k in row) <= 2 * 2 * 24 + 16


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eviction_equals_masked_reference_in_low_precision(kind, dtype):
    model, reference = tiny_model(kind, dtype), tiny_model(kind, dtype, attention="masked-reference")
    cache = ra.Cache(model.config, compression("reasonalloc"))
    follow_reference(
        model,
        reference,
        cache,
        random_chunks((9, 40), 300 if dtype == torch.float32 else 40),
        check_close(1e-3 if dtype == torch.float32 else 0.2),
    )
    assert cache.stats().backend == "compiled"


@pytest.mark.slow
def test_long_generation_at_the_default_interval_equals_masked_reference():
    model, reference = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64, attention="masked-reference")
    cache = ra.Cache(model.config, ra.Compression(budget=64))
    follow_reference(model, reference, cache, random_chunks((9, 150), 700), check_close(1e-9))
    assert cache.stats().compressions >= 5


def turns():
    """A prompt, an answer, a second turn padded on both sides of the real tokens, and a second answer."""
    first = random_chunks((9, 40, 61), 30)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 97, (3, 20), generator=generator)
    mask = torch.zeros(3, 20, dtype=torch.long)
    mask[0, 3:], mask[1, :20], mask[2, 12:] = 1, 1, 1
    finished = torch.tensor([[1], [0], [1]])  # a step in which the second sequence only pads
    one = [(torch.randint(2, 97, (3, 1), generator=generator), finished)]
    second = [(ids, torch.ones(3, 1, dtype=torch.long)) for ids, _ in random_chunks((1, 1, 1), 40, seed=6)[1:]]
    return [*first, (ids, mask), *one, *second]


@pytest.mark.parametrize("method", ["reasonalloc", "h2o", "rkv", "tova"])
@pytest.mark.parametrize("prompt", ["compete", "protect"])
def test_turns_with_padding_in_between(method, prompt):
    model, reference = (
        tiny_model(dtype=torch.float64),
        tiny_model(dtype=torch.float64, attention="masked-reference"),
    )
    cache = ra.Cache(model.config, compression(method, prompt=prompt))
    steps = turns()
    real = torch.cat([mask for _, mask in steps], 1)[:, :-40]

    def check(ragged, wanted, step):
        rows = steps[step][1][:, -1].bool()  # the output of a padded query has no meaning
        torch.testing.assert_close(ragged[rows], wanted[rows], atol=1e-9, rtol=1e-9, msg=lambda m: f"step {step}: {m}")

    follow_reference(model, reference, cache, steps, check)
    assert cache.stats().evicted > 0
    assert cache.ragged.table.seen.tolist() == (real.sum(1) + 40).tolist()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in DRAWN])
def test_padded_batch_equals_single_runs(method):
    model = tiny_model(dtype=torch.float64)
    lengths = (9, 40, 61)
    ids, mask = prompts(lengths)
    options = {"do_sample": False, "max_new_tokens": 80}
    cache = ra.Cache(model.config, compression(method))
    batch = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert cache.stats().compressions > 2
    for row, length in enumerate(lengths):
        alone = ra.Cache(model.config, compression(method))
        single = model.generate(ids[row : row + 1, -length:], past_key_values=alone, **options)
        assert torch.equal(batch[row, -80:], single[0, -80:])
        assert [layer[0] for layer in alone.stats().kept] == [layer[row] for layer in cache.stats().kept]


@pytest.mark.parametrize("method", ["rkv", "reasonalloc", "reasonalloc-head", "h2o"])
def test_selected_sequences_go_on_as_if_alone(method):
    """Beams and dropped rows: after select, each row continues exactly as its source would have."""
    model = tiny_model(dtype=torch.float64)
    chunks = random_chunks((9, 40, 61), 60)
    caches = [ra.Cache(model.config, compression(method)) for _ in range(2)]

    def feed(cache, ids, mask):
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            return model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits[:, -1]

    rows = torch.tensor([2, 0, 0])
    seen = torch.zeros(3, 0, dtype=torch.long)
    for step, (ids, mask) in enumerate(chunks):
        seen = torch.cat([seen, mask], 1)
        plain = feed(caches[0], ids, seen)
        selected = feed(caches[1], ids if step <= 25 else ids[rows], seen if step <= 25 else seen[rows])
        if step == 25:
            caches[1].reorder_cache(rows)
        elif step > 25:
            torch.testing.assert_close(selected, plain[rows], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("method", ["rkv", "h2o", "reasonalloc", "vase-queryfree"])
def test_rejected_tokens_leave_no_trace(method):
    """Speculation of five tokens of which two are rejected equals decoding the three accepted ones."""
    model = tiny_model(dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(2, 97, (1, 120), generator=generator)
    junk = torch.randint(2, 97, (1, 120), generator=generator)
    plain, speculative = (ra.Cache(model.config, compression(method, interval=6)) for _ in range(2))
    with torch.no_grad():
        for cache in (plain, speculative):
            model(text[:, :40], past_key_values=cache)
        speculative.activate_past_recording()
        for at in range(40, 118, 3):
            want = torch.cat([model(text[:, i : i + 1], past_key_values=plain).logits for i in range(at, at + 3)], 1)
            guess = torch.cat([text[:, at : at + 3], junk[:, at : at + 2]], 1)
            got = model(guess, past_key_values=speculative).logits[:, :3]
            speculative.crop(-2)
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    assert speculative.get_seq_length() == plain.get_seq_length()
    assert speculative.stats().kept == plain.stats().kept
    assert plain.stats().evicted > 0


@pytest.mark.parametrize("method", ["rkv", "h2o"])
def test_of_a_long_speculative_pass_only_the_last_queries_are_held(method, monkeypatch):
    """A prompt is such a pass in assisted decoding. What can be rolled back is as right as ever."""
    monkeypatch.setattr("reasonalloc.cache.speculation.SPECULATED", 16)
    model = tiny_model(dtype=torch.float64)
    text = torch.randint(2, 97, (1, 120), generator=torch.Generator().manual_seed(4))
    outputs = []
    for junk in (0, 16):
        cache = ra.Cache(model.config, compression(method, interval=6))
        cache.activate_past_recording()
        with torch.no_grad():
            model(torch.cat([text[:, :80], text[:, :junk]], 1), past_key_values=cache)
            held = cache.ragged._speculation.queries
            assert all((len(queries) < 80) == (method == "rkv") for queries in held)
            cache.crop(-junk)
            outputs.append(model(text[:, 80:], past_key_values=cache).logits)
    torch.testing.assert_close(*outputs, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="only the last 16"):
        cache.crop(-17)


def test_assisted_decoding_with_eviction_stays_bounded():
    ids, _ = prompts((17,))
    model, draft = tiny_model(), tiny_model(attention="sdpa")
    cache = ra.Cache(model.config, compression("reasonalloc"))
    text = model.generate(ids, past_key_values=cache, assistant_model=draft, do_sample=False, max_new_tokens=150)
    assert cache.stats().evicted > 0
    assert sum(sum(layer[0]) for layer in cache.stats().kept) <= 9 * (24 + 16 + 20)
    with pytest.raises(ValueError, match="cannot roll back 9 tokens"):
        cache.crop(-9)
    # An ordinary turn afterwards evicts again.
    model.generate(torch.cat([text, *[ids] * 2], 1), past_key_values=cache, do_sample=False, max_new_tokens=60)
    assert sum(sum(layer[0]) for layer in cache.stats().kept) <= 9 * (24 + 16)


# ---- budgets and storage in real runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_totals_are_exact_at_every_routing(method):
    model = tiny_model()
    recorder = ra.Recorder()
    cache = ra.Cache(model.config, compression(method), recorder=recorder)
    ids, mask = prompts((9, 40, 61))
    model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=150)
    arrays = recorder.arrays()
    assert len(arrays["step"]) >= 8
    assert (arrays["budgets"].sum(-1) == arrays["total"]).all()
    last = arrays["total"][-4:]  # early rounds of fully dynamic layers mix layers of two rounds in `kept`
    assert (last.sum(1) == 3 * 3 * 24).all()
    assert (arrays["kept"] <= arrays["budgets"]).all()
    over = arrays["held"].sum(-1) > arrays["total"]
    assert (arrays["kept"].sum(-1)[over] == arrays["total"][over]).all()


def test_wave_layers_follow_the_profile():
    model = tiny_model()
    shape = ra.ModelShape(3, 3, 6, 16)
    profile = ra.DemandProfile.of_layers((400.0, 25.0, 100.0), shape, "llama")
    cache = ra.Cache(model.config, ra.Compression(budget=40, profile=profile, interval=16))
    ids, _ = prompts((61,))
    model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=100)
    totals = [row[0] for row in cache.stats().budgets]
    assert sum(totals) == 3 * 3 * 40
    assert totals == ra.robustify(torch.from_numpy(profile.layer_demand()), 360).tolist()
    assert cache.stats().method["layers"] == "wave"


def test_memory_is_what_the_budget_says_and_reused_in_place():
    model = tiny_model()
    cache = ra.Cache(model.config, compression("reasonalloc-head"))
    ids, mask = prompts((9, 40, 61))
    options = {"attention_mask": mask, "past_key_values": cache, "do_sample": False}
    model.generate(ids, max_new_tokens=20, **options)
    storage = [(pool.keys.data_ptr(), pool.values.data_ptr()) for pool in cache.ragged.pools]
    text = model.generate(ids, max_new_tokens=200, attention_mask=mask, do_sample=False)
    grown = torch.cat([mask, torch.ones(3, 200, dtype=torch.long)], 1)
    for i in range(20, 199):
        with torch.no_grad():
            model(text[:, 61 + i : 62 + i], past_key_values=cache, attention_mask=grown[:, : 62 + i])
    assert storage == [(pool.keys.data_ptr(), pool.values.data_ptr()) for pool in cache.ragged.pools]
    slots = 3 * 3 * 3 * (24 + 16)  # layers x sequences x heads x (budget + interval)
    assert cache.stats().kv_bytes == slots * 2 * 16 * 4
    assert cache.stats().index_bytes == slots * 4


@pytest.mark.parametrize("method", ["rkv", "reasonalloc"])
def test_protected_prompt_stays_whole(method):
    model = tiny_model()
    cache = ra.Cache(model.config, compression(method, prompt="protect"))
    ids, mask = prompts((9, 61))
    model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=120,
        prefill_chunk_size=25,
    )
    for layer in range(3):
        kept = kept_columns(cache, layer, [list(range(52, 180)), list(range(180))])
        assert kept[0, :, 52:61].all()
        assert kept[1, :, :61].all()
        assert (cache.ragged.table.lengths[layer].sum(1) <= [3 * (9 + 24 + 16) * 2, 3 * (61 + 24 + 16) * 2]).all()
    totals = [sum(map(sum, layer)) for layer in cache.stats().kept]
    assert sum(totals) <= 3 * 3 * (9 + 61 + 2 * (24 + 16))


def test_a_protected_prompt_may_be_one_token():
    model = tiny_model()
    cache = ra.Cache(model.config, compression("rkv", prompt="protect"))
    ids, mask = prompts((1,))
    model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=120)
    assert cache.ragged.table.protected == [1]
    for layer in range(3):
        assert kept_columns(cache, layer, [list(range(120))])[0, :, 0].all()


@pytest.mark.parametrize("lengths", [(9,), (30,), (9, 61)])
@pytest.mark.parametrize("method", ["rkv", "reasonalloc"])
def test_decoding_never_moves_the_cache_to_make_room(method, lengths, monkeypatch):
    """Prompts that fit the budget, or not: room for all that decoding adds is taken with the prompt."""
    model = tiny_model()
    cache = ra.Cache(model.config, compression(method, prompt="protect"))
    ids, mask = prompts(lengths)
    options = {"past_key_values": cache, "do_sample": False}
    model.generate(ids, attention_mask=mask, max_new_tokens=1, **options)
    monkeypatch.setattr(Pool, "grow", lambda *_: pytest.fail("the cache moved"))
    mask = torch.cat([mask, torch.ones(len(lengths), 1, dtype=torch.long)], 1)
    first = torch.full((len(lengths), 1), 5)
    model.generate(torch.cat([ids, first], 1), attention_mask=mask, max_new_tokens=120, **options)


def test_storage_order_by_score_keeps_recents_last():
    model = tiny_model()
    cache = ra.Cache(model.config, compression("rkv", storage_order="score"))
    ids, _ = prompts((61,))
    model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=1)
    tokens = cache.ragged.tokens(1)
    positions = tokens.positions[0, 0, : tokens.lengths[0, 0]].tolist()
    assert positions[-8:] == list(range(53, 61))
    assert positions[:-8] != sorted(positions[:-8])
    model.generate(ids, past_key_values=ra.Cache(model.config, compression("rkv", storage_order="score")), **GREEDY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_halves_the_bytes(dtype):
    ids, mask = prompts((9, 40))
    sizes = []
    for kind in (torch.float32, dtype):
        model = tiny_model(dtype=kind)
        cache = ra.Cache(model.config, compression("reasonalloc"))
        model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        sizes.append(cache.stats().kv_bytes)
    assert sizes[0] == 2 * sizes[1]


def test_reset_cache_serves_another_batch():
    model = tiny_model()
    cache = ra.Cache(model.config, compression("reasonalloc"))
    runs = []
    for lengths in ((9, 40), (61,), (9, 40)):
        ids, mask = prompts(lengths)
        runs.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY))
        cache.reset()
    assert torch.equal(runs[0], runs[2])
    assert str(cache.stats()) == "empty cache"


# ---- the loop that drops finished rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "reasonalloc", "h2o"])
def test_decoding_loop_equals_the_stock_loop(method):
    ids, mask = prompts((9, 40, 61))
    model = tiny_model(dtype=torch.float64)
    probe = model.generate(
        ids, attention_mask=mask, past_key_values=ra.Cache(model.config, compression(method)), **GREEDY
    )
    stop = probe[1, 61 + 20].item()  # a token that some sequence emits halfway
    options = {**GREEDY, "attention_mask": mask, "eos_token_id": stop, "pad_token_id": 0}
    stock, dropped = (ra.Cache(model.config, compression(method)) for _ in range(2))
    want = model.generate(ids, past_key_values=stock, **options)
    got = model.generate(ids, past_key_values=dropped, custom_generate=ra.decoding_loop, **options)
    assert torch.equal(got, want)
    assert dropped.stats().batch < 3
    assert dropped.stats().kv_bytes < stock.stats().kv_bytes


def test_the_cache_is_passed_under_its_present_name():
    """transformers 5.24 calls it ``cache`` and warns of the name that it had; this package does not warn its users."""
    model, (ids, _) = tiny_model(), prompts((9,))
    argument = {CACHE_ARGUMENT: ra.Cache(model.config, compression("rkv"))}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        out = model.generate(ids, **argument, custom_generate=ra.decoding_loop, **GREEDY)
    assert argument[CACHE_ARGUMENT].get_seq_length() == out.shape[1] - 1


def test_decoding_loop_samples_and_refuses_what_it_cannot_do():
    ids, mask = prompts((9, 40))
    model = tiny_model()
    cache = ra.Cache(model.config, compression("reasonalloc"))
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        do_sample=True,
        max_new_tokens=30,
        custom_generate=ra.decoding_loop,
    )
    assert out.shape == (2, 70)
    with pytest.raises(ValueError, match=rf"{CACHE_ARGUMENT}=reasonalloc\.Cache"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, custom_generate=ra.decoding_loop)
    with pytest.raises(ValueError, match="output_logits"):
        model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=2,
            custom_generate=ra.decoding_loop,
            return_dict_in_generate=True,
            output_logits=True,
        )
