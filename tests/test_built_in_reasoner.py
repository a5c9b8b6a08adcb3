"""The shipped reasoner: its weights, its profile, and what it can do. Problems are of the test split."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reasonalloc as ra
from reasonalloc.engines.transformers.loading import BUILT_IN, built_in_folder, load, model_name
from reasonalloc.evaluation.answering import Sampling, answer
from reasonalloc.evaluation.grading import grader
from reasonalloc.evaluation.questions import load_questions

REFERENCE = {"maps:48": 1, "programs:56": 2, "search:56": 0}  # task at its reference difficulty: wrong answers of 32


@pytest.fixture(scope="module")
def reasoner():
    return load(BUILT_IN, "float32", "cpu")


def test_it_is_small():
    weights = built_in_folder() / "model.safetensors"
    assert weights.stat().st_size <= 16e6
    model = AutoModelForCausalLM.from_pretrained(built_in_folder())
    assert model.num_parameters() <= 8_000_000


def test_plain_transformers_loads_it(reasoner):
    """Logits of stock sdpa attention equal ours."""
    plain = AutoModelForCausalLM.from_pretrained(built_in_folder(), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(built_in_folder())
    question = load_questions("maps:8", count=1).questions[0].prompt
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        expected = plain(ids).logits
        got = reasoner[0](ids, past_key_values=ra.Cache(reasoner[0].config, ra.Compression.method("full"))).logits
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "wrong"),
    [pytest.param(*item, marks=[pytest.mark.slow] * (not item[0].startswith("maps"))) for item in REFERENCE.items()],
)
def test_it_reasons(reasoner, task, wrong):
    """Greedy, full cache, a fixed set of 32 problems: exactly what was measured when it was shipped."""
    questions = load_questions(task, count=32)
    prompts = [question.prompt for question in questions.questions]
    found = answer(*reasoner, prompts, ra.Compression.method("full"), Sampling(0.0, 1.0, 2000))
    grade = grader(questions.grader)
    correct = [grade(q.reference, a.text).correct for q, a in zip(questions.questions, found, strict=True)]
    assert 32 - sum(correct) <= wrong
    assert sum(a.tokens for a in found) / 32 >= 600


def test_it_brings_its_wave(reasoner):
    compression = ra.Compression.method("reasonalloc", 64, profile="auto")
    cache = ra.Cache(reasoner[0].config, compression)
    assert cache.compression.demand_profile is not None
    assert cache.compression.demand_profile.source["model"] == BUILT_IN == model_name(reasoner[0].config)
    totals = [cache.ragged.totals.fixed(layer) for layer in range(cache.shape.layers)]
    assert len(set(totals)) > 1
    assert sum(totals) == cache.shape.layers * cache.shape.kv_heads * 64
