"""What the harness's model type is given: right, or refused in one sentence. The harness itself is not needed."""

import json
import sys

import pytest
from reference import tiny_model
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc.cli import app
from reasonalloc.harness.arguments import Arguments
from reasonalloc.policies.written import FIELDS

OWN = ["pretrained", "dtype", "device", "batch_size", "max_batch_size", "backend", "peft", "tp_plan", "softmax_dtype"]


def arguments(**given):
    return Arguments.of({"pretrained": "x", "budget": 64, **given}, OWN)


def test_every_field_of_a_compression_is_an_argument():
    given = {
        "method": "rkv", "budget": 80, "scorer": {"name": "snapkv", "kernel": 5}, "layers": "pyramid", "heads": "adakv",
        "profile": None, "interval": 32, "window": 4, "prompt": "pin", "pin_share": 0.5, "storage_order": "score",
        "seed": 3,
    }  # fmt: skip
    assert set(given) == set(FIELDS)
    found = arguments(**given, dtype="float32", max_gen_toks=1000)
    assert found.compression == ra.Compression.method(**{"name": given.pop("method"), **given})
    assert (found.max_gen_toks, found.own) == (1000, {"pretrained": "x", "dtype": "float32"})


def test_defaults():
    found = arguments()
    assert found.compression == ra.Compression.method("reasonalloc", 64)
    assert found.max_gen_toks == 256
    assert Arguments.of({"pretrained": "x", "method": "full"}, OWN).compression.budget is None
    assert arguments(peft=None, tp_plan=None).own == {"pretrained": "x"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"budgt": 5}, "unknown argument of the model type reasonalloc: 'budgt'. Did you mean 'budget'?"),
        ({"budget": None}, "--model_args: method 'reasonalloc' needs a budget"),
        ({"budget": "many"}, "budget must be a whole number of tokens, at least 1, got 'many'"),
        ({"method": "rvk"}, "unknown method 'rvk'. Did you mean 'rkv'?"),
        ({"method": "full"}, "takes no budget, got 64"),
        ({"method": "sensitivity"}, "profile"),
        ({"scorer": "rkw"}, "unknown token scorer 'rkw'"),
        ({"prompt": "keep"}, "prompt must be one of compete, protect, pin, got 'keep'"),
        ({"window": 64}, "budget 64 leaves nothing beside the window"),
        ({"pretrained": None}, "name a model: --model_args pretrained=MODEL"),
        ({"batch_size": "auto:4"}, "batch_size must be a whole number, at least 1, got 'auto:4'"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
        ({"backend": "seq2seq"}, "backend must be causal, got 'seq2seq'"),
        ({"peft": "lora"}, "peft='lora' cannot be used with the model type reasonalloc: merge the adapter"),
        ({"tp_plan": "auto"}, "tp_plan='auto' cannot be used with the model type reasonalloc: ranks cannot share"),
        (
            {"softmax_dtype": "float64"},
            "softmax_dtype='float64' cannot be used with the model type reasonalloc: probabilities",
        ),
        (
            {"attn_implementation": "sdpa"},
            "attn_implementation='sdpa' cannot be used with the model type reasonalloc: the ragged cache has",
        ),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number of tokens, at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        arguments(**given)
    assert sentence in str(caught.value)


def test_the_command_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    found = CliRunner().invoke(app, ["lm-eval", "run", "--help"])
    assert found.exit_code == 2
    assert "pip install 'reasonalloc[lm-eval]'" in found.output


def test_without_a_field_the_model_says_what_to_keep(tmp_path):
    model = tiny_model()
    model.generation_config.reasonalloc = {"method": "rkv", "budget": 24, "interval": 8}
    model.generation_config._from_model_config = False
    model.save_pretrained(tmp_path)
    for source in (str(tmp_path), model):
        found = Arguments.of({"pretrained": source, "dtype": "float32"}, OWN)
        assert found.compression == ra.Compression.method("rkv", 24, interval=8)
        assert Arguments.of({"pretrained": source, "budget": 64}, OWN).compression == arguments().compression
    model.generation_config.reasonalloc = None
    with pytest.raises(ValueError, match="needs a budget"):
        Arguments.of({"pretrained": model}, OWN)


def test_settings_of_policies_come_as_json():
    given = json.loads('{"pretrained": "x", "budget": 64, "heads": {"name": "adakv", "safeguard": 0.5}}')
    assert Arguments.of(given, OWN).compression.head_allocator.safeguard == 0.5
