"""What a tired user gets wrong: each ends in one clear error, before any work is lost."""

import dataclasses
import json
import re
import warnings

import pytest
import torch
from reference import compression, prompts, tiny_model, tiny_profile
from transformers import DeepseekV2Config, Gemma2Config, GptOssConfig, MistralConfig, Qwen2Config, T5Config

import reasonalloc as ra
from reasonalloc.cache.attention import choose_backend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 8}, "budget 8 leaves nothing beside the window of 8 newest tokens: ask for at least 9"),
        ({"budget": -5}, "budget must be a whole number of tokens, at least 1, got -5"),
        ({"budget": 128.0}, "budget must be a whole number of tokens, at least 1, got 128.0"),
        ({"budget": 64, "interval": 0}, "interval must be a whole number of tokens, at least 1, got 0"),
        ({"budget": 64, "window": -1}, "window must be a whole number of tokens, at least 0, got -1"),
        ({"budget": 64, "scorer": "rvk"}, "unknown token scorer 'rvk'. Did you mean 'rkv'?"),
        ({"budget": 64, "layers": "waves"}, "unknown layer allocator 'waves'. Did you mean 'wave'?"),
        (
            {"budget": 64, "heads": "tresholds"},
            "unknown head allocator 'tresholds'. Did you mean 'threshold'?",
        ),
        ({"budget": 64, "prompt": "keep"}, "prompt must be one of compete, protect, pin, got 'keep'"),
        ({"budget": 64, "storage_order": "x"}, "storage_order must be one of position, score, got 'x'"),
        ({"budget": 64, "layers": "wave"}, "layers='wave' needs the model's demand profile: run"),
        ({"budget": 64, "scorer": "vase"}, "budget 64 leaves nothing beside the window of 64"),
    ],
)
def test_compression_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ra.Compression(**arguments)


def test_unknown_method_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown method 'reasonaloc'\. Did you mean 'reasonalloc'"):
        ra.Compression.method("reasonaloc", 128)
    with pytest.raises(ValueError, match="method 'rkv' needs a budget"):
        ra.Compression.method("rkv")


@pytest.mark.parametrize(
    ("method", "kind", "option"),
    [
        ("lossalloc", "loss curves", "--loss rkv"),
        ("missalloc", "miss curves", "--miss rkv"),
        ("sensitivity", "loss sensitivity", "--sensitivity"),
    ],
)
def test_a_method_without_its_profile_says_how_to_measure_one(method, kind, option):
    with pytest.raises(ValueError, match="needs") as raised:
        ra.Compression.method(method, 64)
    assert str(raised.value) == (
        f"method {method!r} needs the model's demand profile with {kind}: run `reasonalloc calibrate --model MODEL "
        f"{option} -o profile.json` and pass profile='profile.json' (--profile profile.json)"
    )
    with pytest.raises(ValueError, match="layers='loss-curve' needs the model's demand profile with loss curves"):
        ra.Compression.method("rkv", 64, layers="loss-curve", heads="loss-curve")


@pytest.mark.parametrize("method", ["lossalloc", "missalloc"])
@pytest.mark.parametrize("protected", [False, True])
def test_curves_of_another_prompt_setting_are_warned_of(method, protected):
    config, found = tiny_model().config, tiny_profile()
    profile = dataclasses.replace(
        found, grids={"rkv": dataclasses.replace(found.grids["rkv"], protect_prompt=protected)}
    )
    same, others = ("protect", ["compete", "pin"]) if protected else ("compete", ["protect"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ra.Cache(config, ra.Compression.method(method, 64, profile=profile, prompt=same, interval=48))
        ra.Cache(config, ra.Compression.method("rkv", 64, profile=profile, prompt=others[0]))
    for prompt in others:
        with pytest.warns(UserWarning, match=f"but this cache has prompt='{prompt}'.*--protect-prompt") as told:
            ra.Cache(config, ra.Compression.method(method, 64, profile=profile, prompt=prompt))
        assert len(told) == 1


def test_missing_and_foreign_profile(tmp_path):
    with pytest.raises(FileNotFoundError, match="no demand profile at"):
        ra.Compression(budget=64, profile=tmp_path / "none.json")
    path = tmp_path / "wave.json"
    path.write_text(json.dumps(ra.DemandProfile.of_layers((1.0, 2.0), ra.ModelShape(2, 3, 6, 16), "qwen2").to_dict()))
    with pytest.raises(
        ValueError, match=r"another model \(layers: profile 2, model 3; model_type: profile 'qwen2', model 'llama'\)"
    ):
        ra.Cache(tiny_model().config, ra.Compression(budget=64, profile=path))


def test_wrong_attention_implementation():
    model = tiny_model(attention="sdpa")
    with pytest.raises(
        ValueError, match=r"uses attention implementation 'sdpa'.*set_attn_implementation\('reasonalloc'\)"
    ):
        ra.Cache(model.config, compression("reasonalloc"))
    ids, _ = prompts((9,))
    model.set_attn_implementation("reasonalloc")
    cache = ra.Cache(model.config, compression("reasonalloc"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="does not read the ragged cache"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(sliding_window=4096), "slides over a window of 4096"),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=512, max_window_layers=2),
            "layers of sliding_attention",
        ),
        (Gemma2Config(), "sliding_attention"),
        (Gemma2Config(layer_types=["full_attention"] * 26), "soft-capped"),
        (GptOssConfig(), "sinks"),
        (DeepseekV2Config(), "latent"),
        (T5Config(), "encoder-decoder"),
    ],
)
def test_unsupported_models_are_refused_at_construction(config, reason):
    with pytest.raises(ra.UnsupportedModelError, match=reason):
        ra.Cache(config, compression("reasonalloc"))


def test_qwen2_without_sliding_window_is_fine():
    ra.Cache(Qwen2Config(), compression("reasonalloc"))


def test_quantised_caches_are_refused():
    config = tiny_model().config
    config.quantization_config = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    with pytest.raises(ra.UnsupportedModelError, match="cache is quantised"):
        ra.Cache(config, compression("reasonalloc"))
    cache = ra.Cache(tiny_model().config, compression("reasonalloc"))
    states = torch.zeros(1, 3, 4, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ra.UnsupportedModelError, match="float8_e4m3fn"):
        cache.update(states, states, 0)


def test_wrong_arguments_to_cache():
    model = tiny_model()
    with pytest.raises(TypeError, match=r"pass model\.config, not the model"):
        ra.Cache(model, compression("reasonalloc"))
    with pytest.raises(TypeError, match=r"expected a reasonalloc\.Compression, got int"):
        ra.Cache(model.config, 256)
    ids, _ = prompts((9,))
    with pytest.raises(ValueError, match="unknown attention backend 'sdpa'"):
        ra.Cache(model.config, compression("reasonalloc"), attention="sdpa")
    cache = ra.Cache(model.config, compression("reasonalloc"), attention="triton")
    with pytest.raises(ValueError, match="it runs on CUDA"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


def test_a_backend_takes_no_heads_that_it_would_fail_at():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="2048 and 2048 channels are too wide"):
        choose_backend("triton", torch.device("cuda"), {torch.float16}, 2048)


def test_custom_float_masks_are_refused():
    model = tiny_model()
    ids, _ = prompts((9,))
    cache = ra.Cache(model.config, compression("reasonalloc"))
    with pytest.raises(ValueError, match="boolean attention masks only"):
        model(ids, past_key_values=cache, attention_mask=torch.zeros(1, 1, 9, 9))


def test_scorer_of_wrong_shape_is_named():
    class Flat(ra.Scorer):
        def score(self, seen):
            return seen.tokens.keys.sum((-1, -2))

    model = tiny_model()
    cache = ra.Cache(model.config, ra.Compression(budget=24, scorer=Flat(), interval=16))
    ids, _ = prompts((61,))
    with pytest.raises(
        ValueError, match=r"scorer Flat returned shape \(1, 3\), expected one score per token: \(1, 3, 61\)"
    ):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
