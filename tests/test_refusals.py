"""What is refused, or right, beyond the text itself: gradients, speculation, wrong objects, autocast."""

import pytest
import torch
from reference import compression, prompts, tiny_model

import reasonalloc as ra
from reasonalloc.cache.round import Round

GREEDY = {"do_sample": False, "max_new_tokens": 40}
METHODS = [name for name in ra.METHODS if name != "full"]


def new_cache(model, method="reasonalloc", **changes):
    return ra.Cache(model.config, compression(method, **changes))


# ---- gradients ------------------------------------------------------------------------------------------------------

NO_GRADIENTS = r"a ragged cache has no gradients, .*cache=None.*torch\.no_grad\(\)"


@pytest.mark.parametrize("trained", ["", "embed_tokens", "q_proj", "k_proj", "v_proj", "layers.0.mlp"])
def test_gradients_through_a_cache_are_refused(trained):
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    ids, _ = prompts((17,))
    loss = model(ids, labels=ids, past_key_values=new_cache(model)).loss
    with pytest.raises(RuntimeError, match=NO_GRADIENTS):
        loss.backward()


def test_gradients_are_refused_in_decoding_and_later_chunks():
    model = tiny_model()
    ids, _ = prompts((17,))
    for columns in (1, 5):
        cache = new_cache(model)
        model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match=NO_GRADIENTS):
            model(ids[:, :columns], labels=ids[:, :columns], past_key_values=cache).logits.sum().backward()


def test_without_backward_gradients_may_be_enabled():
    model = tiny_model()
    ids, _ = prompts((61,))
    outputs = []
    for enabled in (False, True):
        cache = new_cache(model)
        with torch.set_grad_enabled(enabled):
            steps = [model(ids[:, :40], past_key_values=cache).logits[:, -1]]
            steps += [model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(40, 61)]
        outputs.append(torch.stack(steps))
    assert outputs[1].requires_grad
    assert torch.equal(*outputs)


def test_gradients_that_do_not_pass_the_attention_are_right():
    model = tiny_model()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    ids, _ = prompts((17,))
    gradients = []
    for cache in (None, new_cache(model, budget=64)):
        model.lm_head.weight.grad = None
        model(ids, labels=ids, past_key_values=cache).loss.backward()
        gradients.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*gradients)


# ---- speculation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [17, 2])
@pytest.mark.parametrize("helper", ["assistant", "itself", "lookup"])
def test_assisted_decoding_protects_the_prompt_alone(helper, length):
    model = tiny_model()
    ids, _ = prompts((length,))
    ids = torch.cat([ids] * 3, 1)  # prompt lookup finds candidates at once
    options = {
        "assistant": {"assistant_model": tiny_model(attention="sdpa", num_hidden_layers=2)},
        "itself": {"assistant_model": tiny_model(attention="sdpa")},  # all candidates are accepted
        "lookup": {"prompt_lookup_num_tokens": 5},
    }[helper]
    cache = new_cache(model, "rkv", prompt="protect", budget=64)
    model.generate(ids, past_key_values=cache, **options, **GREEDY)
    assert cache.ragged.table.protected.tolist() == [3 * length]


def test_padding_before_an_assisted_prompt_is_not_protected():
    """All candidates are accepted, so nothing is rolled back from the padded chunk."""
    model = tiny_model()
    ids, mask = prompts((17, 20))
    cache = new_cache(model, "rkv", prompt="protect", budget=64)
    options = {"attention_mask": mask[:1], "assistant_model": tiny_model(attention="sdpa")}
    text = model.generate(ids[:1], past_key_values=cache, **options, **GREEDY)
    assert torch.equal(text, model.generate(ids[:1], attention_mask=mask[:1], **GREEDY))
    assert cache.ragged.table.protected.tolist() == [17]


def test_accepted_tokens_may_be_counted_by_a_tensor():
    model = tiny_model()
    ids, _ = prompts((40,))
    kept = []
    for count in (-2, torch.tensor(-2)):
        cache = new_cache(model)
        cache.activate_past_recording()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        cache.crop(count)
        assert cache.get_seq_length() == 38
        kept.append(cache.stats().kept)
    assert kept[0] == kept[1]
    for count in (2, torch.tensor(2)):
        with pytest.raises(ValueError, match="crop takes 0 or the negative number of tokens to remove, got 2"):
            cache.crop(count)


# ---- wrong objects --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorder", [True, "budgets.npz", ra.Recorder])
def test_what_is_no_recorder_is_refused(recorder):
    with pytest.raises(TypeError, match=r"recorder must be None or .* made with reasonalloc\.Recorder\(\), got "):
        ra.Cache(tiny_model().config, compression("rkv"), recorder=recorder)


class Wrong(ra.Scorer):
    """Scores that are none."""

    def __init__(self, change):
        self.change = change

    def score(self, seen):
        return self.change(seen.tokens.keys.square().sum(-1))


def one_nan(scores):
    scores[0, 0, 0] = float("nan")
    return scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_nan, "scorer Wrong returned NaN for a cached token: every score is a number"),
        (lambda x: x[..., None], r"scorer Wrong returned shape \(1, 3, 61, 1\), expected one .*: \(1, 3, 61\)"),
        (lambda x: x[..., :-1], r"scorer Wrong returned shape \(1, 3, 60\), expected one .*: \(1, 3, 61\)"),
        (lambda x: x.mean(1), r"scorer Wrong returned shape \(1, 61\), expected one .*: \(1, 3, 61\)"),
        (lambda x: None, "scorer Wrong returned NoneType, expected a tensor"),
        (lambda x: x.tolist(), "scorer Wrong returned list, expected a tensor"),
    ],
)
def test_scores_that_are_none_are_refused(change, message):
    model = tiny_model()
    cache = ra.Cache(model.config, ra.Compression(24, scorer=Wrong(change), interval=16))
    ids, _ = prompts((61,))
    with pytest.raises((TypeError, ValueError), match=message):
        model.generate(ids, past_key_values=cache, **GREEDY)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"interrupted.*reset\(\) the cache"):
        model(ids[:, :1], past_key_values=cache)


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["compete", "protect"])
@pytest.mark.parametrize("backend", ["rows", "compiled"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_under_autocast(method, backend, prompt):
    model = tiny_model()
    ids, mask = prompts((9, 61))
    cache = ra.Cache(model.config, compression(method, prompt=prompt), attention=backend)
    options = {"attention_mask": mask, "past_key_values": cache, **GREEDY}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(ids, prefill_chunk_size=25, **options)
    assert cache.stats().evicted > 0


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_without_autocast(method, monkeypatch):
    """Of the very same states: autocast changes what the model computes, and nothing that a scorer does."""
    model = tiny_model()
    ids, _ = prompts((61,))
    found = []
    score = Round._score

    def scored(self, *arguments):
        result = score(self, *arguments)
        found.append(torch.cat([part.scores.flatten() for part in result[0]]))
        return result

    monkeypatch.setattr(Round, "_score", scored)
    for autocast in (False, True):
        cache = new_cache(model, method)
        with torch.no_grad():
            cache.activate_past_recording()
            model(ids, past_key_values=cache)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                cache.crop(0)
    half = len(found) // 2
    assert half >= 3
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))


@pytest.mark.parametrize("first", [False, True])
def test_autocast_that_changes_under_a_cache_is_refused(first):
    model = tiny_model()
    ids, _ = prompts((17,))
    cache = new_cache(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
        model(ids, past_key_values=cache)
    message = r"the cache holds keys and values of .*same torch\.autocast throughout"
    for columns in (1, 5):
        changed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first)
        with torch.no_grad(), changed, pytest.raises(ValueError, match=message):
            model(ids[:, :columns], past_key_values=cache)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
        model(ids, past_key_values=cache)
