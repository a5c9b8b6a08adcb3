"""Models that leave their cache, or cannot read ours: each ends in one sentence."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from model_sweep import outcome
from reference import compression, prompts, tiny_model
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import reasonalloc as ra
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.engines.transformers.presence import check_presence

LEFT = r"{} goes on without the cache that it was given, after {} tokens: .*max_new_tokens"
LENGTH = 24


def phi3(**changes):
    """Its text may have ``LENGTH`` tokens: then it makes a new cache."""
    torch.manual_seed(0)
    config = tiny_config("phi3", **changes)
    config.original_max_position_embeddings = config.max_position_embeddings = LENGTH
    return AutoModelForCausalLM.from_config(config, attn_implementation="reasonalloc").eval()


def generate(model, cache, ids, loop, tokens, **options):
    if loop:
        options["custom_generate"] = ra.decoding_loop
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": tokens, **options}
    return model.generate(ids, past_key_values=cache, **options)


# ---- models that leave the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [False, True], ids=["stock", "decoding_loop"])
@pytest.mark.parametrize("length", [9, LENGTH + 3])
def test_a_model_that_throws_its_cache_away_is_stopped(loop, length):
    model = phi3()
    cache = ra.Cache(model.config, compression("rkv", window=4))
    ids, _ = prompts((length,))
    seen = 0 if length > LENGTH else LENGTH
    with pytest.raises(ra.UnsupportedModelError, match=LEFT.format("Phi3ForCausalLM", seen)):
        generate(model, cache, ids, loop, 40)
    cache.reset()
    if length < LENGTH:
        want = generate(model, None, ids, False, LENGTH - length)
        full = ra.Cache(model.config, ra.Compression.method("full"))
        assert torch.equal(generate(model, full, ids, loop, LENGTH - length), want)


@pytest.mark.parametrize("beams", [1, 3])
def test_other_ways_of_generating_are_stopped_too(beams):
    model = phi3()
    cache = ra.Cache(model.config, compression("rkv", window=4))
    ids, _ = prompts((9,))
    with pytest.raises(ra.UnsupportedModelError, match=LEFT.format("Phi3ForCausalLM", LENGTH)):
        generate(model, cache, ids, False, 40, num_beams=beams)


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_models_that_will_leave_their_cache_are_refused(kind):
    config = tiny_config(kind, sliding_window=None)
    config.original_max_position_embeddings = 64
    with pytest.raises(ra.UnsupportedModelError, match="throws its cache away when a text is longer than 64 tokens"):
        ra.Cache(config, compression("rkv"))


def test_every_model_that_drops_its_cache_before_a_step_is_known():
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for body in re.split(r"\n    def ", path.read_text()):
            drops = re.search(r"^ +(cache|past_key_values) = None$", body, re.MULTILINE)
            if body.startswith("prepare_inputs_for_generation") and drops:
                found.add(path.parent.name)
    assert found == {"phi3", "phimoe", "phi4_multimodal"}


@pytest.mark.parametrize("returns", [True, False], ids=["another", "none"])
def test_a_model_that_uses_another_cache_is_stopped(returns, monkeypatch):
    model = tiny_model(attention="sdpa")
    forward = model.forward

    def other(*arguments, **options):
        outputs = forward(*arguments, **{**options, CACHE_ARGUMENT: DynamicCache()})
        return outputs if returns else CausalLMOutputWithPast(logits=outputs.logits)

    ids, _ = prompts((9,))
    monkeypatch.setattr(model, "forward", other)
    model.config._attn_implementation_internal = None
    with pytest.raises(ra.UnsupportedModelError, match=LEFT.format("LlamaForCausalLM", 0)):
        generate(model, ra.Cache(model.config, compression("rkv")), ids, True, 5)


def test_guidance_has_a_cache_of_its_own():
    model = tiny_model()
    ids, _ = prompts((9,))
    texts = []
    for cache in (DynamicCache(config=model.config), ra.Cache(model.config, ra.Compression.method("full"))):
        texts.append(generate(model, cache, ids, False, 20, guidance_scale=1.5))
    assert torch.equal(*texts)


def test_assistants_have_caches_of_their_own():
    model, ids = tiny_model(), prompts((9,))[0]
    assistant = tiny_model(num_hidden_layers=2)
    cache = ra.Cache(model.config, ra.Compression.method("full"))
    assert torch.equal(
        generate(model, cache, ids, False, 20, assistant_model=assistant), generate(model, None, ids, False, 20)
    )


def test_passes_in_our_cache_do_not_ask(monkeypatch):
    asked = []
    monkeypatch.setattr("reasonalloc.engines.transformers.attention.check_presence", asked.append)
    model, ids = tiny_model(), prompts((9,))[0]
    generate(model, ra.Cache(model.config, compression("rkv")), ids, False, 5)
    assert not asked
    generate(model, None, ids, False, 5)
    assert asked
    assert list(inspect.signature(check_presence).parameters) == ["module"]


# ---- models that cannot read it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bloom", "falcon", "mpt", "gpt_neo"])
def test_models_without_the_attention_interface_are_told_so(kind):
    config = transformers.AutoConfig.for_model(kind)
    for attention in (None, "eager"):
        config._attn_implementation = attention
        with pytest.raises(ra.UnsupportedModelError, match="does not use transformers' attention interface") as error:
            ra.Cache(config, compression("rkv"))
        assert "set_attn_implementation" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("doge", "adds numbers of its own to the attention logits of each head"),
        ("jetmoe", "changes keys after they are cached"),
        ("diffllama", "each of its layers attends twice"),
        ("git", "does not use transformers' attention interface"),
        ("mllama", "it has cross-attention layers"),
        ("gemma4", "layers have attention of different shapes"),
        ("blt", "not one stack of layers with attention"),
        ("rwkv", "not one stack of layers with attention"),
    ],
)
def test_models_of_other_kinds_are_refused_when_the_cache_is_made(kind, reason):
    with pytest.raises(ra.UnsupportedModelError, match=reason):
        ra.Cache(transformers.AutoConfig.for_model(kind), compression("rkv"))


@pytest.mark.parametrize("kind", ["gpt2", "hrm_text", "phi", "gemma", "olmo2", "mixtral", "llava"])
def test_some_types_equal_stock(kind):
    assert outcome(kind).kind == "equal", outcome(kind).why


@pytest.mark.parametrize("kind", ["llava", "paligemma"])
def test_images_in_the_prompt_equal_stock(kind):
    """Their encoder attends without a cache while ``generate`` has ours."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    ids, _ = prompts((12,))
    ids += 20 * (ids < 20)
    ids[:, 2:6] = config.image_token_id if kind == "paligemma" else config.image_token_index
    options = {"pixel_values": torch.randn(1, 3, 28, 28)}
    want = generate(model, None, ids, False, 20, **options)
    model.set_attn_implementation("reasonalloc")
    for loop in (False, True):
        cache = ra.Cache(model.config, ra.Compression.method("full"))
        assert torch.equal(generate(model, cache, ids, loop, 20, **options), want)
