"""What a cache that holds a text does with the next one: it goes on with it, or says that it cannot."""

import copy
import re

import pytest
import torch
import transformers
from packaging.version import Version
from reference import compression, follow_reference, prompts, random_chunks, tiny_model, word_tokenizer
from transformers import AttentionInterface, DynamicCache, LogitsProcessorList, pipeline

import reasonalloc as ra
from reasonalloc.cache.round import Round
from reasonalloc.cache.step import Chunk
from reasonalloc.engines.transformers.continuation import Continuation

GREEDY = {"do_sample": False, "max_new_tokens": 40}
NEWEST = Version(transformers.__version__) >= Version("5.24")
REMEDY = r"reset\(\) on (this one|the cache)|reset\(\) the cache"
OTHER = r"the cache holds 56 tokens of another text: sequence 0 differs from token {at} on, .*reset\(\) on this one"
NOTHING_NEW = (
    r"there are no new tokens: .* no longer than the 56 tokens that the cache has seen, .*reset\(\) on this one"
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


def new_cache(model, budget=24, **changes):
    return ra.Cache(model.config, compression("reasonalloc", budget=budget, **changes))


def roomy(model):
    """A cache that forgets nothing in these tests: it must be a DynamicCache's equal."""
    return new_cache(model, 400)


def used(model, lengths=(17,), cache=None, **options):
    """A cache after a prompt and 40 tokens: the text, its mask, the cache."""
    ids, mask = prompts(lengths)
    cache = new_cache(model) if cache is None else cache
    text = model.generate(ids, attention_mask=mask, past_key_values=cache, **{**GREEDY, **options})
    grown = torch.ones(len(text), text.shape[1] - mask.shape[1], dtype=torch.long)
    return text, torch.cat([mask.repeat_interleave(len(text) // len(mask), 0), grown], 1), cache


def longer(text, mask, tokens=9, seed=8):
    """A second turn: the whole text and new tokens."""
    new = torch.randint(2, 97, (len(text), tokens), generator=torch.Generator().manual_seed(seed))
    return torch.cat([text, new], 1), torch.cat([mask, torch.ones_like(new)], 1)


# ---- another text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [24, 400])
@pytest.mark.parametrize("length", [5, 17, 40, 55, 56, 57, 60, 120])
def test_another_prompt_is_refused_and_reset_is_the_remedy(model, length, budget):
    _, _, cache = used(model, cache=new_cache(model, budget))
    other, _ = prompts((length,), seed=7)
    with pytest.raises(ValueError, match=NOTHING_NEW if length < 29 else OTHER.format(at=0)):
        model.generate(other, past_key_values=cache, **GREEDY)
    cache.reset()
    want = model.generate(other, past_key_values=new_cache(model, budget), **GREEDY)
    assert torch.equal(model.generate(other, past_key_values=cache, **GREEDY), want)


def test_the_same_prompt_again_is_refused(model):
    text, _, cache = used(model)
    for end in (17, 40, 56):
        with pytest.raises(ValueError, match=NOTHING_NEW):
            model.generate(text[:, :end], past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("tokens", [1, 2, 30])
@pytest.mark.parametrize("at", [0, 16, 17, 40, 55])
def test_a_text_that_was_changed_anywhere_is_refused(model, at, tokens):
    """A chat template that leaves out the last turn's thinking keeps the prompt and changes the answer."""
    text, _, cache = used(model)
    changed = torch.cat([text[:, :56], text[:, :tokens]], 1)
    changed[0, at] += 1
    options = {"attention_mask": torch.ones_like(changed), "past_key_values": cache, **GREEDY}
    with pytest.raises(ValueError, match=OTHER.format(at=at)):
        model.generate(changed, **options)
    changed[0, at] -= 1
    model.generate(changed, **options)


def test_another_text_in_one_sequence_of_a_batch_is_refused(model):
    text, mask, cache = used(model, (9, 17))
    whole, whole_mask = longer(text, mask)
    whole[1, 20] += 1
    whole[0, :8] += 1  # padding: what stands there means nothing
    with pytest.raises(ValueError, match="sequence 1 differs from token 20 on"):
        model.generate(whole, attention_mask=whole_mask, past_key_values=cache, **GREEDY)


def test_a_pipeline_called_twice_with_one_cache(model):
    pipe = pipeline("text-generation", model, tokenizer=word_tokenizer())
    cache = new_cache(model)
    pipe("w5 w6 w7", past_key_values=cache, **GREEDY)
    for prompt in ("w5 w6 w7", "w9 " * 30, "w8 " * 120):
        with pytest.raises(ValueError, match=r"there are no new tokens|differs from token 0 on"):
            pipe(prompt, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("tokens", [1, 5, 28, 40, 56, 57, 80])
def test_new_tokens_alone_need_the_mask_of_the_whole_text(model, tokens):
    text, mask, cache = used(model)
    whole, whole_mask = longer(text, mask, tokens)
    with pytest.raises(ValueError, match=r"there are no new tokens|pass the attention mask of the whole text, "):
        model.generate(whole[:, 56:], past_key_values=cache, **GREEDY)
    with pytest.raises(
        ValueError, match=f"the attention mask has .* pass the mask of the whole text, {57 + tokens} col"
    ):
        model.generate(whole[:, 56:], attention_mask=whole_mask[:, 2:], past_key_values=cache, **GREEDY)
    got = model.generate(whole[:, 56:], attention_mask=whole_mask, past_key_values=cache, **GREEDY)
    again = used(model)[2]
    want = model.generate(whole, attention_mask=whole_mask, past_key_values=again, **GREEDY)
    assert torch.equal(got[:, -40:], want[:, -40:])


@pytest.mark.parametrize(("first", "then"), [((17,), (70, 70)), ((9, 17), (70,)), ((9, 17), (70, 70, 70))])
def test_another_batch_size_is_refused(model, first, then):
    _, _, cache = used(model, first)
    ids, mask = prompts(then)
    message = f"the cache holds {len(first)} sequences, and {len(then)} come: .*{REMEDY}"
    with pytest.raises(ValueError, match=message):
        model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    for columns in (1, 5):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(ids[:, :columns], past_key_values=cache)


def test_use_cache_false_with_a_cache_is_refused(model):
    ids, _ = prompts((17,))
    cache = new_cache(model)
    with pytest.raises(ValueError, match=r"use_cache=False and a cache were passed.*pass use_cache=True, or no cache"):
        model.generate(ids, past_key_values=cache, use_cache=False, **GREEDY)
    assert cache.get_seq_length() == 0
    model.generate(ids, past_key_values=cache, **GREEDY)


def test_a_text_read_without_generate_is_known_too(model):
    """A system prompt that is read once and copied for every question."""
    ids, _ = prompts((30,))
    cache = new_cache(model)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        model(ids[:, 20:21], past_key_values=cache)
    changed = ids.clone()
    changed[0, 20] += 1
    with pytest.raises(ValueError, match="holds 21 tokens of another text: sequence 0 differs from token 20 on"):
        model.generate(changed, past_key_values=copy.deepcopy(cache), **GREEDY)
    model.generate(ids, past_key_values=cache, **GREEDY)


def test_positions_that_do_not_go_on_are_refused(model):
    _, _, cache = used(model)
    ids, _ = prompts((5,))
    with torch.no_grad(), pytest.raises(ValueError, match=f"begin at position 0, but the cache holds 56 .*{REMEDY}"):
        model(ids, past_key_values=cache, position_ids=torch.arange(5)[None])


# ---- the continuation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_only", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 30])
@pytest.mark.parametrize("lengths", [(17,), (9, 17, 13)])
def test_turns_equal_those_of_a_dynamic_cache(model, lengths, tokens, new_only):
    ids, mask = prompts(lengths)
    texts = []
    for cache in (DynamicCache(config=model.config), roomy(model)):
        text, shown = ids, mask
        for turn in range(3):
            passed = text if not (turn and new_only) else text[:, cache.get_seq_length() :]
            model.set_attn_implementation("sdpa" if isinstance(cache, DynamicCache) else "reasonalloc")
            answer = model.generate(passed, attention_mask=shown, past_key_values=cache, **GREEDY)[:, -40:]
            text = torch.cat([text, answer], 1)
            text, shown = longer(text, torch.cat([shown, torch.ones_like(answer)], 1), tokens, seed=turn)
        texts.append(text)
    assert torch.equal(*texts)


def beams(model):
    """Running beams: after the last step they are none of the finished texts, so what they hold is gone on with."""
    _, mask, cache = used(model, num_beams=3, cache=roomy(model))
    held = cache._pass.continuation.ids[:, :56]
    assert len(held.unique(dim=0)) > 1
    return held, mask[:1, :56].expand(3, -1), cache


def dropped(model):
    ids, mask = prompts((9, 17))
    probe = model.generate(ids, attention_mask=mask, past_key_values=roomy(model), **GREEDY)
    stop = next(int(x) for x in probe[0, 20:] if x not in probe[1, 17:])
    text, shown, cache = used(
        model, (9, 17), roomy(model), custom_generate=ra.decoding_loop, eos_token_id=stop, pad_token_id=0
    )
    assert cache.stats().batch == 1
    return text[1:], shown[1:], cache


WAYS = {
    "samples": lambda model: used(model, num_return_sequences=3, do_sample=True, cache=roomy(model)),
    "beams": beams,
    "decoding_loop": dropped,
    "assisted": lambda model: used(model, cache=roomy(model), assistant_model=tiny_model(attention="sdpa")),
    "prompt_lookup": lambda model: used(model, cache=roomy(model), prompt_lookup_num_tokens=4),
    "chunked": lambda model: used(model, cache=roomy(model), prefill_chunk_size=5),
    "chunked_padded": lambda model: used(model, (9, 17), cache=roomy(model), prefill_chunk_size=5),
    "inference_mode": lambda model: torch.inference_mode()(used)(model, cache=roomy(model)),
    "inputs_embeds": lambda model: embedded(model),
}


def embedded(model):
    ids, mask = prompts((17,))
    cache = roomy(model)
    answer = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, past_key_values=cache, **GREEDY
    )
    return torch.cat([ids, answer], 1), torch.ones(1, 57, dtype=torch.long), cache


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("second", [{}, {"prefill_chunk_size": 4}])
def test_whatever_the_first_turn_was_a_second_one_goes_on(model, way, second):
    torch.manual_seed(4)
    text, mask, cache = WAYS[way](model)
    whole, whole_mask = longer(text, mask)
    options = {"attention_mask": whole_mask, **GREEDY}
    want = model.generate(whole, **options)
    if second and NEWEST:
        assert torch.equal(model.generate(whole, past_key_values=cache, **options, **second), want)
    elif second:  # before, transformers cut the whole text into chunks, whatever the cache held
        with pytest.raises(ValueError, match="hands over again some of the 56 tokens"):
            model.generate(whole, past_key_values=cache, **options, **second)
    else:
        assert torch.equal(model.generate(whole, past_key_values=cache, **options), want)


def test_beams_of_another_text_than_their_own_are_refused(model):
    """The second turn of three beams with the best one's text: two of the caches hold another."""
    text, mask, cache = used(model, num_beams=3)
    assert len(cache._pass.continuation.ids[:, :56].unique(dim=0)) > 1
    whole, whole_mask = longer(text, mask)
    with pytest.raises(ValueError, match=f"56 tokens of another text.*{REMEDY}"):
        model.generate(whole, attention_mask=whole_mask, past_key_values=cache, num_beams=3, **GREEDY)


def test_a_prompt_that_begins_with_the_cached_one_goes_on(model):
    ids, _ = prompts((60,))
    cache = roomy(model)
    model.generate(ids[:, :30], past_key_values=cache, do_sample=False, max_new_tokens=1)
    assert cache.get_seq_length() == 30
    got = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(got, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("way", ["assisted", "prompt_lookup"])
def test_assisted_decoding_in_both_turns(model, way):
    """transformers hands the whole text over again, to any cache; the new tokens alone are right."""
    text, mask, cache = WAYS[way](model)
    helper = (
        {"prompt_lookup_num_tokens": 4} if way == "prompt_lookup" else {"assistant_model": tiny_model(attention="sdpa")}
    )
    whole, whole_mask = longer(text, mask)
    options = {"attention_mask": whole_mask, "past_key_values": cache, **helper, **GREEDY}
    message = "hands over again some of the 56 tokens .*: pass the new tokens alone, .* 66 columns; .*reset"
    with pytest.raises(ValueError, match=message):
        model.generate(whole, **options)
    try:
        got = model.generate(whole[:, 56:], **options)
    except ValueError as refused:  # older versions of transformers cut the mask
        if NEWEST or not re.search(HIDES, str(refused)):
            raise
        return
    assert torch.equal(got[:, -40:], model.generate(whole, attention_mask=whole_mask, **GREEDY)[:, -40:])


def test_positions_that_go_on_are_no_false_alarm(model):
    """One row for all sequences, counted with the padding, with padding inside the chunk, or of three dimensions."""
    ids, mask = prompts((9, 17))
    more = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    shown = torch.cat([mask, (more > 0).long()], 1)
    for positions in (None, torch.arange(17, 21)[None], torch.arange(17, 21).expand(2, -1)):
        logits = []
        for cache in (DynamicCache(config=model.config), roomy(model)):
            model.set_attn_implementation("sdpa" if isinstance(cache, DynamicCache) else "reasonalloc")
            with torch.no_grad():
                model(ids, attention_mask=mask, past_key_values=cache)
                out = model(more, attention_mask=shown, past_key_values=cache, position_ids=positions).logits
            logits.append(out[:, -1])
        torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)
    chunk = Chunk.masked(torch.arange(2).numpy(), more > 0)
    Continuation().check_positions(torch.zeros(3, 2, 4, dtype=torch.long), chunk, mask.sum(1).numpy(), 17)


# ---- what was broken off --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["self_attn", "self_attn.o_proj", "mlp"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("step", [0, 5])
def test_a_pass_that_was_broken_off_is_noticed(model, layer, place, step, error):
    ids, _ = prompts((17,))
    want = model.generate(ids, past_key_values=new_cache(model), **GREEDY)
    cache, calls = new_cache(model), []

    def broken(*_):
        calls.append(0)
        if len(calls) == step + 1:
            raise error("in the middle of a layer")

    part = model.model.layers[layer].get_submodule(place)
    handle = part.register_forward_pre_hook(broken)
    try:
        with pytest.raises(error, match="in the middle of a layer"):
            model.generate(ids, past_key_values=cache, **GREEDY)
    finally:
        handle.remove()
    if layer or place != "self_attn":  # otherwise nothing of the pass was stored
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"was interrupted.*{REMEDY}"):
            model(want[:, 17 + step : 18 + step], past_key_values=cache)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), want)


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_a_round_that_was_broken_off_is_noticed(model, rounds, monkeypatch):
    """The prompt's rounds of the first and of the last layer, and one in a decoding step: all layers have run then."""
    ids, _ = prompts((61,))
    cache, done, run = new_cache(model), [], Round.run

    def broken(*arguments):
        done.append(0)
        if len(done) == rounds:
            raise KeyboardInterrupt
        run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Round, "run", broken)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, past_key_values=cache, **GREEDY)
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"was interrupted.*{REMEDY}"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    want = model.generate(ids, past_key_values=new_cache(model), **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), want)


def test_after_a_rollback_that_was_broken_off_nothing_goes_on(model, monkeypatch):
    ids, _ = prompts((61,))
    cache = new_cache(model)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(Round, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                cache.crop(-2)
        with pytest.raises(RuntimeError, match=f"was interrupted.*{REMEDY}"):
            model(ids[:, :1], past_key_values=cache)


def test_between_two_steps_an_interruption_does_no_harm(model):
    ids, _ = prompts((17,))
    cache = new_cache(model)
    want = model.generate(ids, past_key_values=new_cache(model), **GREEDY)

    def stop(text, logits):
        if text.shape[1] == 30:
            raise KeyboardInterrupt
        return logits

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, logits_processor=LogitsProcessorList([stop]), **GREEDY)
    with pytest.raises(ValueError, match=f"no new tokens.*{REMEDY}"):
        model.generate(ids, past_key_values=cache, **GREEDY)
    got = model.generate(want[:, :31], past_key_values=cache, do_sample=False, max_new_tokens=26)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (4, RuntimeError, "ended after 2 of 4 layers: .* the cache was made for another model; reset"),
        (1, ValueError, "the model has a layer 1, the cache was made for 1 layers: make it from this model's config"),
    ],
)
def test_a_cache_of_another_model_is_refused(layers, error, message):
    config = tiny_model(num_hidden_layers=layers).config
    model = tiny_model(num_hidden_layers=2)
    ids, _ = prompts((17,))
    with pytest.raises(error, match=message):
        model.generate(ids, past_key_values=ra.Cache(config, compression("reasonalloc")), **GREEDY)


# ---- masks over what is cached --------------------------------------------------------------------------------------

HIDES = "the attention mask hides tokens that are cached, or shows padding or later tokens.*pass the 2-D padding mask"


def pair(model, ids, mask, attention="sdpa"):
    """A DynamicCache and a ragged one that forgets nothing, both after the same prompt."""
    caches = DynamicCache(config=model.config), roomy(model)
    for cache, name in zip(caches, (attention, "reasonalloc"), strict=True):
        model.set_attn_implementation(name)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
    return caches


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("lengths", [(17,), (9, 17)])
def test_a_mask_that_hides_cached_tokens_is_refused(model, lengths, columns):
    ids, mask = prompts(lengths)
    _, cache = pair(model, ids, mask)
    new, shown = longer(ids, mask, columns)
    for row, hidden in ((-1, slice(3, 10)), (0, slice(16, 17))):
        wrong = shown.clone()
        wrong[row, hidden] = 0
        with torch.no_grad(), pytest.raises(ValueError, match=HIDES):
            model(new[:, 17:], attention_mask=wrong, past_key_values=cache)
    with torch.no_grad():
        model(new[:, 17:], attention_mask=shown, past_key_values=cache)  # the refusals left no trace
    assert cache.stats().kept[0] == [[length + columns] * 3 for length in lengths]


@pytest.mark.parametrize("columns", [1, 4])
def test_a_mask_of_the_new_tokens_alone_is_refused(model, columns):
    """transformers fills it up with False, so that the new tokens would be padding."""
    ids, mask = prompts((17,))
    _, cache = pair(model, ids, mask)
    with torch.no_grad(), pytest.raises(ValueError, match=HIDES):
        model(ids[:, :columns], attention_mask=mask[:, :columns], past_key_values=cache)


@pytest.mark.parametrize("columns", [1, 4])
def test_a_mask_that_shows_padding_is_refused(model, columns):
    ids, mask = prompts((9, 17))
    _, cache = pair(model, ids, mask)
    new, shown = longer(ids, mask, columns)
    wrong = shown.clone()
    wrong[0, 3:6] = 1
    for passed, message in (
        (wrong, HIDES),
        (torch.ones_like(shown), f"{HIDES}|has padding"),
        (None, f"{HIDES}|padding"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(new[:, 17:], attention_mask=passed, past_key_values=cache)


def test_a_dropped_mask_of_a_padded_batch_is_refused_while_decoding(model):
    ids, mask = prompts((9, 17))
    _, cache = pair(model, ids, mask)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="has padding, and no attention mask hides it"),
    ):
        model(ids[:, -1:], past_key_values=cache)


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("lengths", [(17,), (9, 17)])
def test_custom_masks_over_cached_tokens_are_right_or_refused(model, lengths, columns):
    ids, mask = prompts(lengths)
    full, cache = pair(model, ids, mask)
    new, shown = longer(ids, mask, columns)
    causal = torch.ones(columns, 17 + columns, dtype=torch.bool).tril(17)
    right = causal & shown[:, None, None, :].bool()
    for change in ("window", "later", "heads"):
        wrong = right.clone()
        if change == "window":
            wrong[..., 3:16] = False
        elif change == "later":
            wrong[..., -1] = True
            wrong[..., 0] ^= columns == 1
        else:
            wrong = wrong.repeat(1, 6, 1, 1)
            wrong[:, 1:, :, 12] = False
        message = "one attention mask for all heads, got shape" if change == "heads" else HIDES
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(new[:, 17:], attention_mask=wrong, past_key_values=cache)
    with pytest.raises(ValueError, match=r"boolean attention masks only, got torch\.float64; pass a 2-D padding mask"):
        model(new[:, 17:], attention_mask=torch.where(right, 0.0, -1e9).double(), past_key_values=cache)
    logits = []
    for used_cache, name in ((full, "sdpa"), (cache, "reasonalloc")):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits.append(model(new[:, 17:], attention_mask=right, past_key_values=used_cache).logits)
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["both ways", "two texts", "window"])
def test_a_custom_mask_of_the_prompt_is_right_or_refused(model, kind):
    """What the last token of a prompt does not see is padding from then on: a mask that shows it later is refused."""
    ids, _ = prompts((17,))
    mask = torch.ones(1, 1, 17, 17, dtype=torch.bool)
    if kind != "both ways":
        mask = mask.tril()
        mask[..., 8:, :8] = False
    if kind == "window":
        mask[..., 8, 7] = True
    full, cache = pair(model, ids, mask)
    new, _ = longer(ids, torch.ones_like(ids), 1)
    later = torch.cat([mask[..., -1:, :], torch.ones(1, 1, 1, 1, dtype=torch.bool)], -1)
    logits = []
    for used_cache, name in ((full, "sdpa"), (cache, "reasonalloc")):
        model.set_attn_implementation(name)
        with torch.no_grad():
            out = model(
                new[:, 17:], attention_mask=later, past_key_values=used_cache, position_ids=torch.tensor([[17]])
            )
        logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)
    if kind != "both ways":
        for passed in (None, torch.ones(1, 19, dtype=torch.long)):
            with torch.no_grad(), pytest.raises(ValueError, match=f"{HIDES}|has padding"):
                model(new[:, 17:], attention_mask=passed, past_key_values=cache)


def test_a_proper_mask_is_accepted_at_every_step_when_tokens_are_forgotten(model):
    """Decoding of a padded batch with its 2-D mask, long enough for several enlargements of what is remembered."""
    reference = tiny_model(dtype=torch.float64, attention="masked-reference")
    chunks = [*random_chunks((9, 17, 40), 100), longer(torch.zeros(3, 0).long(), torch.zeros(3, 0).long(), 30)]

    def check(got, want, step):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9, msg=lambda m: f"step {step}: {m}")

    cache = new_cache(model)
    follow_reference(model, reference, cache, chunks, check)
    assert cache.stats().evicted > 0


# ---- attention that is called twice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2])
def test_a_model_that_attends_twice_to_the_same_keys_is_refused(layer):
    once = AttentionInterface()["reasonalloc"]

    def twice(module, *arguments, **options):
        out = once(module, *arguments, **options)
        return once(module, *arguments, **options) if module.layer_idx == layer else out

    model = tiny_model()
    ids, _ = prompts((17,))
    try:
        AttentionInterface.register("reasonalloc", twice)
        with pytest.raises(ra.UnsupportedModelError, match=f"layer {layer} attends twice.*once for every update"):
            model.generate(ids, past_key_values=new_cache(model), **GREEDY)
    finally:
        AttentionInterface.register("reasonalloc", once)
