"""A fresh cache for every call: enabled models, fields of generation_config.json, custom_generate, pipelines."""

import copy
import inspect
import json
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
import yaml
from reference import prompts, tiny_model, tiny_profile, word_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, TextIteratorStreamer, pipeline
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc.cli.app import app
from reasonalloc.engines.transformers.asked import FILE, compression_asked
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.engines.vllm.settings import settings
from reasonalloc.policies.written import FIELDS, compression_of

HUB = Path(__file__).parent.parent / "hub"
ASKED = {"method": "rkv", "budget": 24, "interval": 8}
SMALL = ra.Compression.method(name="rkv", budget=24, interval=8)
GREEDY = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
TEXTS = [
    " ".join(f"w{word}" for word in range(first, first + length)) for first, length in ((5, 40), (9, 31), (50, 36))
]
CHAT = "{% for m in messages %}{{ 'w2 w3 ' + m['content'] + ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def plain():
    """A model that no test changes."""
    return tiny_model()


def with_cache(plain, ids, mask, compression=SMALL, **arguments):
    """What transformers writes with a new cache that is passed by hand."""
    cache = ra.Cache(plain.config, compression)
    return plain.generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **{**GREEDY, **arguments})


def full(plain, ids, mask):
    return plain.generate(ids, attention_mask=mask, **GREEDY)


@pytest.fixture
def folder(tmp_path):
    """A saved model whose generation_config asks for a compression, and its tokenizer."""
    model = tiny_model()
    model.generation_config.reasonalloc = ASKED
    model.generation_config._from_model_config = False  # else transformers drops the field when it loads the file
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def rewrite(folder, **changes):
    """Other fields in a saved model's generation_config."""
    path = folder / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def remote_code(tmp_path, monkeypatch):
    """Where transformers copies code that it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


# ---- enabled models ----


def test_a_saved_models_field_makes_a_cache_for_every_call(plain, folder):
    ids, mask = prompts((40, 33))
    model = ra.enable(load(folder))
    assert model.generation_config.reasonalloc == ASKED
    want = with_cache(plain, ids, mask)
    assert not torch.equal(want, full(plain, ids, mask)), "nothing was forgotten: this test could not fail"
    for _ in range(2):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), want)
    shorter = with_cache(plain, ids[:1, -20:], mask[:1, -20:])
    assert torch.equal(model.generate(ids[:1, -20:], attention_mask=mask[:1, -20:], **GREEDY), shorter)
    found = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    cache = found["cache" if "cache" in found else "past_key_values"]
    assert cache.compression == SMALL
    assert cache.stats().evicted > 0


def test_the_field_of_a_config_that_came_from_the_models_is_read_from_its_file(folder):
    """transformers drops unknown fields of a file that says ``"_from_model_config": true``, without a word."""
    rewrite(folder, _from_model_config=True)
    model = load(folder)
    assert not hasattr(model.generation_config, "reasonalloc")
    assert ra.enable(model).generate.compression == SMALL
    assert model.generation_config.reasonalloc == ASKED


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"custom_generate": ra.decoding_loop},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny_model(num_hidden_layers=1)},
        {"prefill_chunk_size": 16},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_whatever_generate_does_it_does_with_a_new_cache(plain, arguments):
    ids, mask = prompts((40,))
    model = ra.enable(tiny_model(), SMALL)
    torch.manual_seed(3)
    want = with_cache(plain, ids, mask, **arguments)
    for _ in range(2):
        torch.manual_seed(3)
        assert torch.equal(model.generate(ids, attention_mask=mask, **{**GREEDY, **arguments}), want)


def test_threads_have_a_cache_each(plain):
    model = ra.enable(tiny_model(), SMALL)
    asked = [prompts((40, 31), seed) for seed in range(3)]
    want = [with_cache(plain, *each) for each in asked]
    got = [None] * len(asked)

    def work(index):
        ids, mask = asked[index]
        got[index] = model.generate(ids, attention_mask=mask, **GREEDY)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_a_call_may_ask_for_something_else(plain, folder):
    ids, mask = prompts((40, 33))
    model = ra.enable(load(folder))
    other = ra.Compression.method("h2o", 30, interval=4)
    want = with_cache(plain, ids, mask, other)
    fields = {"method": "h2o", "budget": 30, "interval": 4}
    config = GenerationConfig(**GREEDY, reasonalloc=fields)
    for arguments in (
        {"compression": other, **GREEDY},
        {**fields, **GREEDY},
        {"reasonalloc": fields, **GREEDY},
        {"generation_config": config},
    ):
        assert torch.equal(model.generate(ids, attention_mask=mask, **arguments), want)
    assert torch.equal(model.generate(ids, config, attention_mask=mask), want)

    model.generation_config.reasonalloc = fields
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), want)
    own = copy.deepcopy(model.generation_config)
    own.update(**GREEDY)
    ra.enable(model, SMALL)  # what is passed here counts, also where a copy of the model's own config comes along
    want = with_cache(plain, ids, mask)
    for arguments in (GREEDY, {"generation_config": own}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **arguments), want)


def test_a_cache_that_is_passed_is_used(plain):
    ids, mask = prompts((40, 33))
    model = ra.enable(tiny_model(), SMALL)
    for name in (CACHE_ARGUMENT, "past_key_values"):
        mine = ra.Cache(model.config, SMALL)
        model.generate(ids, attention_mask=mask, **{name: mine}, **GREEDY)
        assert mine.get_seq_length() == 49
    everything = {CACHE_ARGUMENT: DynamicCache(config=model.config)}
    assert torch.equal(model.generate(ids, attention_mask=mask, **everything, **GREEDY), full(plain, ids, mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_cache": False}, "use_cache=False leaves no cache to compress"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache=False leaves no cache"),
        ({"cache_implementation": "static"}, "'static' asks for another cache"),
        ({"cache_implementation": "paged"}, "'paged' asks for another cache"),
        ({"budget": 64, "compression": SMALL}, "compression= and budget= all say what to keep"),
        ({"budget": 64, "past_key_values": DynamicCache()}, "past_key_values= and budget= all say"),
        ({"reasonalloc": ASKED, "interval": 3}, "interval= and reasonalloc= all say"),
        ({"method": "rkv"}, "this call of generate: method 'rkv' needs a budget"),
        ({"budget": 64, "scorer": "rvk"}, "Did you mean 'rkv'"),
        ({"budget": 64, "intervall": 8}, "intervall"),
        ({"compression": 64}, "expected a reasonalloc.Compression"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    ids, mask = prompts((10,))
    model = ra.enable(tiny_model(), SMALL)
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(ids, attention_mask=mask, **arguments)


def test_a_model_that_never_uses_a_cache_is_refused():
    model = ra.enable(tiny_model(), SMALL)
    model.generation_config.use_cache = False
    with pytest.raises(ValueError, match="set use_cache=True in the model's generation_config"):
        model.generate(prompts((10,))[0])
    assert model.generate(prompts((10,))[0], use_cache=True, max_new_tokens=2).shape == (1, 12)


def test_enabling_sets_the_attention_and_refuses_first():
    model = ra.enable(tiny_model(attention="eager"), SMALL)
    assert model.config._attn_implementation == "reasonalloc"
    unserved = tiny_model("mistral", attention="sdpa")
    unserved.config.sliding_window = 8
    with pytest.raises(ra.UnsupportedModelError):
        ra.enable(unserved, SMALL)
    assert unserved.config._attn_implementation == "sdpa"
    assert "generate" not in vars(unserved)
    with pytest.raises(ValueError, match="nothing says how much to keep"):
        ra.enable(tiny_model())
    with pytest.raises(TypeError, match="expected a reasonalloc"):
        ra.enable(tiny_model(), 64)
    for nothing in (tiny_model().model, "a/path"):
        with pytest.raises(TypeError, match="expected a model that generates"):
            ra.enable(nothing, SMALL)
        with pytest.raises(TypeError, match="expected a model that generates"):
            ra.generate(nothing, budget=24)


def test_the_generate_of_its_class_does_not_pass_over_what_a_model_was_enabled_with(plain):
    ids, mask = prompts((40,))
    model = ra.enable(tiny_model(), SMALL)
    with pytest.raises(ValueError, match=r"this model was enabled.*: call model\.generate, or pass a cache"):
        type(model).generate(model, ids, attention_mask=mask, **GREEDY)
    everything = {CACHE_ARGUMENT: DynamicCache(config=model.config)}
    assert torch.equal(type(model).generate(model, ids, attention_mask=mask, **everything, **GREEDY),
                       full(plain, ids, mask))  # fmt: skip
    model.generate(ids, attention_mask=mask, assistant_model=ra.enable(tiny_model(), SMALL), **GREEDY)


def test_a_copy_of_an_enabled_model_runs_itself(plain):
    ids, mask = prompts((40, 33))
    model = ra.enable(tiny_model(), SMALL)
    other = copy.deepcopy(model)
    assert other.generate.model is other
    upside_down = tiny_model()
    with torch.no_grad():
        for changed in (other, upside_down):
            changed.lm_head.weight.mul_(-1)
    assert torch.equal(other.generate(ids, attention_mask=mask, **GREEDY), with_cache(upside_down, ids, mask))
    loaded = pickle.loads(pickle.dumps(other))
    assert loaded.generate.model is loaded
    assert torch.equal(loaded.generate(ids, attention_mask=mask, **GREEDY), with_cache(upside_down, ids, mask))
    again = ra.enable(model, ra.Compression.method("full"))
    assert torch.equal(again.generate(ids, attention_mask=mask, **GREEDY), full(plain, ids, mask))


# ---- what the field says ----


def test_without_enable_the_field_is_not_passed_over(plain, folder):
    ids, mask = prompts((40,))
    model = load(folder, attn_implementation="reasonalloc")
    with pytest.raises(ValueError, match=r"call ra\.enable\(model\) once"):
        model.generate(ids, attention_mask=mask, **GREEDY)
    everything = {CACHE_ARGUMENT: DynamicCache(config=model.config)}
    assert torch.equal(model.generate(ids, attention_mask=mask, **everything, **GREEDY), full(plain, ids, mask))
    helper = tiny_model(num_hidden_layers=1)  # it is passed a copy of the other model's generation_config
    for assistant in (helper, ra.enable(tiny_model(), ra.Compression.method("full"))):
        cache = ra.Cache(model.config, SMALL)
        model.generate(ids, attention_mask=mask, assistant_model=assistant, **{CACHE_ARGUMENT: cache}, **GREEDY)
    model.generation_config.reasonalloc = None
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), full(plain, ids, mask))
    with pytest.raises(ValueError, match="nothing says how much to keep"):
        ra.enable(model)


def test_a_new_generation_config_without_the_field_changes_nothing(plain, folder, monkeypatch):
    """Wherever the model came from; and its file is not read again at every call."""
    ids, mask = prompts((40,))
    made = tiny_model()
    made.generation_config.reasonalloc = ASKED
    for model in (made, load(folder)):
        ra.enable(model)
        model.generation_config = GenerationConfig()
        with monkeypatch.context() as patched:
            patched.setattr("reasonalloc.engines.transformers.asked.saved_field", lambda *_: pytest.fail("read again"))
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), with_cache(plain, ids, mask))
        model.generation_config.reasonalloc = None
        with pytest.raises(ValueError, match="nothing says how much to keep"):
            model.generate(ids, attention_mask=mask, **GREEDY)


def test_a_profile_lies_beside_the_model(folder, tmp_path, monkeypatch):
    (folder / "wave.json").write_bytes(tiny_profile().to_json())
    rewrite(folder, reasonalloc={"method": "sensitivity", "budget": 24, "profile": "wave.json"})
    monkeypatch.chdir(tmp_path)
    want = ra.Compression.method("sensitivity", 24, profile=folder / "wave.json")
    for source in (folder, Path("model")):
        found = ra.enable(load(source)).generate.compression
        assert found.describe() == want.describe()
    rewrite(folder, reasonalloc={**ASKED, "profile": str(folder / "wave.json")})
    assert ra.enable(load(folder)).generate.compression.demand_profile is not None
    rewrite(folder, reasonalloc={**ASKED, "profile": "waves.json"})
    with pytest.raises(ValueError, match=rf"in {FILE} of {folder}: there is no profile 'waves.json' beside the model"):
        ra.enable(load(folder))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"budgets": 64}, "unknown field 'budgets'. Did you mean 'budget'"),
        ({"budget": "64"}, "budget must be a whole number of tokens"),
        ({"budget": 64, "method": "rvk"}, "unknown method 'rvk'"),
        ({"budget": 64, "asked": {}}, "unknown field 'asked'"),
        ({}, "method 'reasonalloc' needs a budget"),
        (64, "must be a JSON object"),
        ([], "must be a JSON object"),
        ("rkv", "must be a JSON object"),
    ],
)
def test_a_bad_field_is_named_with_its_file(folder, field, message):
    rewrite(folder, reasonalloc=field)
    with pytest.raises(ValueError, match=f"^field 'reasonalloc' in {FILE} of {folder}.*{message}"):
        ra.enable(load(folder))


@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_a_field_ends_in_anything_but_a_sentence(field):
    for value in (None, True, -1, 0.5, 10**30, "", "x", [], [1], {}, {"name": 1}, {"name": "rkv", "x": 1}):
        try:
            compression_of({"method": "rkv", "budget": 24, field: value}, "here")
        except ValueError as error:
            assert str(error).startswith("here")  # noqa: PT017


def test_no_field_is_called_as_an_argument_of_generate(plain):
    taken = {*vars(GenerationConfig()), *inspect.signature(plain.forward).parameters}
    taken |= {*inspect.signature(type(plain).generate).parameters, *inspect.signature(ra.decoding_loop).parameters}
    assert not taken & {*FIELDS, "reasonalloc", "compression", "loop"}


def test_the_same_fields_mean_the_same_to_vllm(plain, monkeypatch, folder):
    (folder / "wave.json").write_bytes(tiny_profile().to_json())
    asked = {"method": "sensitivity", "budget": 24, "window": 4, "profile": str(folder / "wave.json"),
             "scorer": {"name": "rkv", "kernel": 5}, "prompt": "pin"}  # fmt: skip
    monkeypatch.setenv("REASONALLOC", json.dumps(asked))
    assert settings().compression.describe() == compression_asked(asked, plain.config).describe()


# ---- a folder for custom_generate ----


def test_a_folder_for_custom_generate(plain, remote_code, folder):
    ids, mask = prompts((40, 33))
    model = tiny_model(attention="eager")
    run = {"custom_generate": str(HUB), "trust_remote_code": True, "attention_mask": mask, **GREEDY}
    want = with_cache(plain, ids, mask)
    for asked in (ASKED, {"compression": SMALL}, {**ASKED, "loop": "reasonalloc"}, {"reasonalloc": ASKED}):
        assert torch.equal(model.generate(ids, **run, **asked), want)
    assert torch.equal(load(folder).generate(ids, **run), want)  # by its field
    mine = ra.Cache(model.config, SMALL)
    assert torch.equal(model.generate(ids, **run, **{CACHE_ARGUMENT: mine}), want)
    assert torch.equal(model.generate(ids, **run, num_beams=2, **ASKED), with_cache(plain, ids, mask, num_beams=2))
    assert torch.equal(ra.enable(model, SMALL).generate(ids, **run), want)
    assert torch.equal(ra.generate(tiny_model(), ids, attention_mask=mask, **ASKED, **GREEDY), want)
    with pytest.raises(ValueError, match="loop must be one of transformers, reasonalloc, got 'ours'"):
        tiny_model().generate(ids, **run, **ASKED, loop="ours")
    with pytest.raises(ValueError, match="nothing says how much to keep: pass budget=256"):
        tiny_model().generate(ids, **run)


def test_the_folder_says_what_is_missing(remote_code, monkeypatch):
    from transformers import dynamic_module_utils

    class Empty:
        def import_module(self, name):
            raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(dynamic_module_utils, "importlib", Empty())
    with pytest.raises(ImportError, match="pip install reasonalloc"):
        tiny_model().generate(prompts((9,))[0], custom_generate=str(HUB), trust_remote_code=True, budget=64)


def test_the_folder_is_what_the_hub_asks_for():
    names = {str(path.relative_to(HUB)) for path in HUB.rglob("*") if path.is_file() and "__pycache__" not in str(path)}
    assert names == {"README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"}
    card = yaml.safe_load((HUB / "README.md").read_text().split("---")[1])
    assert "custom_generate" in card["tags"]
    assert (HUB / "custom_generate/requirements.txt").read_text().split() == [f"reasonalloc>={ra.__version__}"]


def test_a_models_folder_with_the_code_needs_no_call_of_ours(plain, remote_code, folder):
    ids, mask = prompts((40, 33))
    shutil.copytree(HUB / "custom_generate", folder / "custom_generate")
    model = load(folder, trust_remote_code=True)
    want = with_cache(plain, ids, mask)
    for _ in range(2):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), want)
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert written(pipe, TEXTS[0]) == fresh(plain, TEXTS[0])


# ---- pipelines ----


def pipe_of(model):
    tokenizer = word_tokenizer()
    tokenizer.padding_side, tokenizer.chat_template = "left", CHAT
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def written(pipe, text, **arguments):
    found = pipe(text, return_full_text=False, **{**GREEDY, **arguments})
    return [each[0]["generated_text"] for each in found] if isinstance(text, list) else found[0]["generated_text"]


def fresh(plain, text, compression=SMALL):
    """What a new cache writes after one text."""
    tokenizer = word_tokenizer()
    inputs = tokenizer(text, return_tensors="pt")
    out = with_cache(plain, inputs["input_ids"], inputs["attention_mask"], compression)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_pipelines_write_what_new_caches_write(plain):
    pipe = pipe_of(ra.enable(tiny_model(), SMALL))
    want = [fresh(plain, text) for text in TEXTS]
    assert want != [fresh(plain, text, ra.Compression.method("full")) for text in TEXTS]
    assert [written(pipe, text) for text in TEXTS] == want
    assert written(pipe, TEXTS) == want
    assert written(pipe, TEXTS, batch_size=2) == want  # with padding
    assert written(pipe, TEXTS[0], custom_generate=ra.decoding_loop) == want[0]
    assert written(pipe, TEXTS[0], budget=30) == fresh(plain, TEXTS[0], ra.Compression(budget=30))

    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    assert written(pipe, TEXTS[1], streamer=streamer) == want[1]
    assert "".join(streamer).split() == want[1].split()


def test_chats_and_their_next_turns(plain):
    pipe = pipe_of(ra.enable(tiny_model(), SMALL))
    chat = [{"role": "user", "content": TEXTS[0]}]
    for turn in range(2):
        text = pipe.tokenizer.apply_chat_template(chat, tokenize=False)
        chat = pipe(chat, **GREEDY)[0]["generated_text"]
        assert len(chat) == 2 * turn + 2
        assert chat[-1]["content"].split() == fresh(plain, text).split()
        chat.append({"role": "user", "content": TEXTS[1]})


def test_a_pipeline_without_enable_is_refused_where_it_would_answer_with_a_full_cache(folder):
    pipe = pipe_of(load(folder, attn_implementation="reasonalloc"))
    with pytest.raises(ValueError, match=r"call ra\.enable\(model\) once"):
        pipe(TEXTS[0], **GREEDY)
    cache = {CACHE_ARGUMENT: ra.Cache(pipe.model.config, SMALL)}
    written(pipe, TEXTS[0], **cache)
    with pytest.raises(ValueError, match="pass a new cache"):
        written(pipe, TEXTS[1], **cache)


# ---- the command line ----


def run(*arguments):
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return found, " ".join(found.stderr.split())


def test_the_command_line_takes_the_field_as_its_default(plain, folder, tmp_path):
    stats = tmp_path / "stats.json"
    ask = ("generate", "-m", folder, "-p", TEXTS[0], "--raw", "--max-new-tokens", 10, "--stats", stats)
    found, said = run(*ask)
    assert found.stdout.split() == fresh(plain, TEXTS[0]).split()
    assert f"'reasonalloc' in {FILE} of {folder}" in said
    assert '"budget": 24' in said
    found, said = run(*ask, "--budget", 30)  # says all of it
    assert found.stdout.split() == fresh(plain, TEXTS[0], ra.Compression(30)).split()
    assert FILE not in said
    rewrite(folder, reasonalloc={"budget": 24, "intervals": 8})
    found, said = run(*ask)
    assert found.exit_code == 2
    assert "unknown field 'intervals'. Did you mean 'interval'" in said
    rewrite(folder, reasonalloc=None)
    assert "method 'reasonalloc' needs a budget" in run(*ask)[1]


def test_eval_compares_what_the_field_asks_for_with_the_full_cache(folder, tmp_path):
    ask = ("eval", "-m", folder, "--task", "maps:6", "--count", 1, "--samples", 1, "--max-new-tokens", 8)
    found, said = run(*ask, "-o", tmp_path / "asked")
    assert found.exit_code == 0, said
    study = json.loads((tmp_path / "asked/study.json").read_text())
    assert [variant["method"] for variant in study["variants"]] == ["full", "rkv"]
    assert (study["budgets"], study["variants"][1]["changes"]) == ([24], {"interval": 8})
    found, said = run(*ask, "-o", tmp_path / "named", "--methods", "rkv", "--budgets", 30)
    assert json.loads((tmp_path / "named/study.json").read_text())["budgets"] == [30], said
