"""Answers of the built-in reasoner through the harness: those of our own ``eval``, and of the harness's own model."""

import json
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from reasonalloc.cli import app
from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.loading import BUILT_IN, built_in_folder
from reasonalloc.evaluation.store import Store
from reasonalloc.harness.model import CompressedLM
from reasonalloc.policies.compression import Compression
from reasonalloc.reasoner.text import SPECIAL

TASKS = Path(__file__).parent / "tasks"
PROFILE = str(built_in_folder() / "demand_profile.json")
BUDGET, INTERVAL, QUESTIONS = 96, 32, 20
ARGUMENTS = {
    "full": {"method": "full"},
    "rkv": {"method": "rkv", "budget": BUDGET, "interval": INTERVAL},
    "sensitivity": {"method": "sensitivity", "budget": BUDGET, "interval": INTERVAL, "profile": PROFILE},
}


def ours(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the harness is started: questions, and tasks that read them."""
    folder = tmp_path_factory.mktemp("harness")
    ours("problems", "maps:10", "-o", folder / "maps.jsonl", "--count", QUESTIONS, "--split", "test")
    shutil.copytree(TASKS, folder / "tasks")
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def by_eval(folder):
    """Of each method: our own answers in their order, and how many of them our own grader found right."""
    out = folder / "eval"
    ours(
        "eval", "-m", BUILT_IN, "--task", "maps:10", "--count", QUESTIONS, "--methods", ",".join(ARGUMENTS),
        "--budgets", BUDGET, "--interval", INTERVAL, "--profile", PROFILE, "--temperature", 0, "--samples", 1,
        "--max-new-tokens", 600, "--dtype", "float32", "--device", "cpu", "--batch", QUESTIONS, "-o", out,
    )  # fmt: skip
    store, found = Store(out), {}
    for unit in (unit for batch in store.plan() for unit in batch):
        answer = store.read(unit)
        found.setdefault(unit.cell.method, {})[int(unit.question.id)] = (answer, store.grade(unit, answer).correct)
    return {method: [answers[i] for i in range(QUESTIONS)] for method, answers in found.items()}


@lru_cache
def manager():
    """The harness's tasks, which it takes seconds to find."""
    return TaskManager(include_path="tasks")


def evaluate(tasks, batch_size=8, **arguments):
    chosen = {"pretrained": BUILT_IN, "dtype": "float32", "device": "cpu", "batch_size": batch_size, **arguments}
    options = {name: chosen.pop(name) for name in ("limit", "use_cache") if name in chosen}
    options.update(task_manager=manager(), apply_chat_template=True, bootstrap_iters=0)
    return simple_evaluate("reasonalloc", chosen, tasks, **options)


@pytest.mark.parametrize("method", ARGUMENTS)
def test_answers_and_accuracy_are_those_of_eval(method, by_eval):
    results = evaluate(["maps_answers"], **ARGUMENTS[method])
    samples = sorted(results["samples"]["maps_answers"], key=lambda sample: sample["doc_id"])
    answers, right = zip(*by_eval[method], strict=True)
    words = [" ".join(word for word in answer.text.split() if word not in SPECIAL) for answer in answers]
    assert [sample["resps"][0][0] for sample in samples] == words
    assert [bool(sample["exact_match"]) for sample in samples] == list(right)
    accuracy = results["results"]["maps_answers"]["exact_match,after-the-last-stop"]
    assert accuracy == pytest.approx(sum(right) / QUESTIONS)
    assert any(answer.evicted for answer in answers) == (method != "full")
    said = results["config"]["reasonalloc"]
    assert said["version"]
    if method != "full":
        assert (said["texts"], said["texts_evicted"]) == (QUESTIONS, sum(answer.evicted for answer in answers))
    assert {name: said[name] for name in ("budget", "interval", "scorer")} == {
        name: Compression.method(**{"name": method, **_but(ARGUMENTS[method], "method")}).describe()[name]
        for name in ("budget", "interval", "scorer")
    }
    assert results["config"]["model_args"]["method"] == method


def _but(arguments, name):
    return {key: value for key, value in arguments.items() if key != name}


def test_a_profile_is_found_or_made():
    own = CompressedLM(pretrained=BUILT_IN, method="reasonalloc", budget=64, profile="auto", device="cpu")
    assert own.compression.describe()["profile"] == own.compression.demand_profile.digest
    assert own.get_model_info()["reasonalloc"]["profile"] == own.compression.demand_profile.digest


def test_the_version_is_the_codes(monkeypatch):
    """Not that of an older install beside it, nor is one needed."""
    monkeypatch.setattr("reasonalloc.harness.model.__version__", "9.9")
    own = CompressedLM(pretrained=BUILT_IN, method="rkv", budget=64, device="cpu")
    monkeypatch.setattr(HFLM, "get_model_info", lambda self: {})
    assert own.get_model_info()["reasonalloc"]["version"] == "9.9"


def test_methods_differ(by_eval):
    texts = {method: [answer.text for answer, _ in found] for method, found in by_eval.items()}
    assert texts["full"] != texts["rkv"] != texts["sensitivity"]
    assert sum(right for _, right in by_eval["full"]) > QUESTIONS / 2


# ---- against the harness's own model ----


def request(prompt, **generation):
    return SimpleNamespace(args=(prompt, {"max_gen_toks": 60, **generation}), task_name="made up")


def prompts():
    lines = Path("maps.jsonl").read_text().splitlines()[:5]
    asked = [json.loads(line)["prompt"] for line in lines]
    return [f"<question> {question} <think>" for question in [*asked, "x1 x2 3 ; x2 end . a x1"]]


def both(batch_size):
    stock = HFLM(pretrained=str(built_in_folder()), dtype="float32", device="cpu", batch_size=1)
    own = CompressedLM(pretrained=BUILT_IN, method="full", dtype="float32", device="cpu", batch_size=batch_size)
    return own, stock


@pytest.mark.parametrize("until", [[], [";"], [". b"], ["never", "-> a"], "<answer>"])
def test_texts_end_where_the_harness_ends_them(until):
    own, stock = both(4)
    found, expected = (
        one.generate_until([request(p, until=until) for p in prompts()], disable_tqdm=True) for one in (own, stock)
    )
    assert found == expected
    assert len(set(map(len, found))) > 1


def test_sampling_draws_as_the_harness_does():
    found = []
    for one in both(1):
        torch.manual_seed(0)
        requests = [request(p, until=["."], do_sample=True, temperature=3.0, top_p=0.9) for p in prompts()]
        found.append(one.generate_until(requests, disable_tqdm=True))
    assert found[0] == found[1]
    greedy = both(1)[0].generate_until([request(p, until=["."]) for p in prompts()], disable_tqdm=True)
    assert found[0] != greedy


def test_rows_leave_as_they_end(monkeypatch):
    """A text that ends early costs nothing afterwards: the cache holds the others alone."""
    left = []
    kept = Cache.batch_select_indices
    monkeypatch.setattr(Cache, "batch_select_indices", lambda self, rows: (left.append(len(rows)), kept(self, rows)))
    own = CompressedLM(pretrained=BUILT_IN, method="rkv", budget=64, dtype="float32", device="cpu", batch_size=6)
    own.generate_until([request(p, until=["-> b"], max_gen_toks=90) for p in prompts()], disable_tqdm=True)
    assert left
    assert left == sorted(left, reverse=True)


def test_the_longest_answer_is_the_users():
    own = CompressedLM(
        pretrained=BUILT_IN, method="rkv", budget=64, dtype="float32", device="cpu", max_gen_toks=7, batch_size=1
    )
    request = SimpleNamespace(args=(prompts()[0], {"until": []}), task_name="made up")
    assert len(own.generate_until([request], disable_tqdm=True)[0].split()) == 7


def test_a_model_that_was_saved_without_use_of_a_cache_is_served(tmp_path):
    folder = shutil.copytree(built_in_folder(), tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_cache": False}))
    found = []
    for place in (BUILT_IN, str(folder)):
        own = CompressedLM(pretrained=place, method="rkv", budget=64, dtype="float32", device="cpu", batch_size=1)
        found.append(own.generate_until([request(prompts()[0], until=["."])], disable_tqdm=True))
    assert found[0] == found[1]


# ---- around it ----


def test_kept_answers_are_of_one_cache(folder):
    kept = str(folder / "kept")
    first, again = (evaluate(["maps_thoughts"], limit=3, use_cache=kept, **ARGUMENTS["rkv"]) for _ in range(2))
    assert first["results"]["maps_thoughts"]["perplexity,none"] == again["results"]["maps_thoughts"]["perplexity,none"]
    for change in ({"budget": 50}, {"max_gen_toks": 9}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="holds answers of other model arguments: name another file"):
            evaluate(["maps_thoughts"], limit=3, use_cache=kept, **{**ARGUMENTS["rkv"], **change})


def command(*arguments):
    whole = [sys.executable, "-m", "reasonalloc", "lm-eval", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, check=False)


def test_the_command(folder):
    """As the page writes it, on two questions."""
    model_args = f"pretrained={BUILT_IN},method=sensitivity,budget=64,profile={PROFILE}"
    done = command(
        "--model", "reasonalloc", "--model_args", model_args, "--tasks", "maps_answers,maps_thoughts", "--include_path",
        "tasks", "--apply_chat_template", "--limit", "2", "--batch_size", "2", "--output_path", "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "maps_thoughts" in done.stdout
    (path,) = (folder / "results").rglob("results_*.json")
    config = json.loads(path.read_text())["config"]
    assert (config["reasonalloc"]["budget"], config["reasonalloc"]["scorer"]["name"]) == (64, "rkv")
    assert config["model_args"]["method"] == "sensitivity"


def test_the_command_says_what_is_wrong_in_one_sentence():
    done = command("--model", "reasonalloc", "--model_args", "pretrained=x,budgt=5", "--tasks", "maps_answers",
                   "--include_path", "tasks")  # fmt: skip
    assert done.returncode == 2
    assert "error: unknown argument of the model type reasonalloc: 'budgt'. Did you mean 'budget'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_harness_keeps_its_own_help_and_models():
    done = command("run", "--help")
    assert done.returncode == 0
    assert "--include_path" in done.stdout
    assert get_model("hf") is HFLM


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"pretrained": "./nowhere"}, "no model folder at nowhere"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"profile": "./nowhere.json", "method": "sensitivity"}, "nowhere.json"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(arguments, sentence, monkeypatch):
    monkeypatch.setattr(HFLM, "__init__", lambda self, **kwargs: pytest.fail("loaded"))
    with pytest.raises((ValueError, OSError), match=sentence):
        CompressedLM(**{"pretrained": BUILT_IN, "budget": 64, "device": "cpu", **arguments})


def test_a_profile_of_another_model_is_refused_before_the_weights_are_read(folder):
    small = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    small.save_pretrained(folder / "small")
    with pytest.raises(ValueError, match="the demand profile belongs to another model"):
        CompressedLM(pretrained=str(folder / "small"), method="sensitivity", budget=64, profile=PROFILE, device="cpu")


def test_missing_weights_are_an_error(folder):
    shutil.copytree(built_in_folder(), folder / "torn", dirs_exist_ok=True)
    weights = load_file(folder / "torn" / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "torn" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 of its weights are not there"):
        CompressedLM(pretrained=str(folder / "torn"), method="rkv", budget=64, device="cpu")
