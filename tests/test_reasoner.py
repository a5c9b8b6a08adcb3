"""The small reasoner's text format, tokenizer and trainer (the shipped weights are tested elsewhere)."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonalloc.reasoner import build_tokenizer, prompt_text, read, solution_text
from reasonalloc.reasoner.train import Trainer, TrainingConfig
from reasonalloc.tasks import TASKS

SMALL = {
    "families": {"maps": {"ladder": [2, 3, 4], "goal": 4}, "programs": {"ladder": [3, 4], "goal": 4}},
    "model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "matrix_learning_rate": 0.01,
    "learning_rate": 0.003,
    "tokens_per_step": 400,
    "rise_below": 0.05,
    "seed": 0,
}


@pytest.mark.parametrize("name", ["maps", "programs", "search"])
def test_texts_survive_the_tokenizer(name):
    task, tokenizer = TASKS.create(name), build_tokenizer()
    problem = task.problem(3, 12)
    for text in (prompt_text(problem), solution_text(problem)):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split())
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids) == text
    turns = [{"role": "user", "content": problem.question}]
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == prompt_text(problem)
    found = read(solution_text(problem))
    assert (found.thought, found.answer, found.finished) == (problem.thought, problem.answer, True)
    assert read("v1 = 2").answer is None
    assert not read("v1 <answer> 3").finished
    assert read("v1 <answer> 3").answer == "3"


def test_batches_are_seeded_and_hide_the_question(tmp_path):
    first, again = (Trainer(TrainingConfig(**SMALL), tmp_path) for _ in range(2))
    name, _, ids, labels = first.batch()
    assert (again.batch()[2] == ids).all()
    assert ids.numel() >= 400
    learned = labels != -100
    assert (ids[learned] == labels[learned]).all()
    tokenizer, task = first.tokenizer, TASKS.create(name)
    for row, mask in zip(ids, learned, strict=True):
        start = int(mask.nonzero()[0])
        question = tokenizer.decode(row[1 : start - 1])
        written = read(tokenizer.decode(row[mask]))
        assert task.check(question, written.answer)
        assert written.finished
    first.progress.step = 1
    assert first.batch()[2].shape != ids.shape or (first.batch()[2] != ids).any()


def test_interrupted_training_goes_on_alike(tmp_path):
    """Five steps, a checkpoint and five more are ten steps, to the last bit."""
    whole, half = (Trainer(TrainingConfig(**SMALL), tmp_path / name) for name in ("whole", "half"))
    for _ in range(10):
        whole.step(1.0)
    for _ in range(5):
        half.step(1.0)
    half.save([{"step": 5}])
    other = Trainer(TrainingConfig(**SMALL), tmp_path / "half")
    assert other.resume()
    for _ in range(5):
        other.step(1.0)
    assert other.progress == whole.progress
    for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another configuration"):
        Trainer(TrainingConfig(**{**SMALL, "seed": 1}), tmp_path / "half").resume()


def test_training_learns_climbs_and_exports(tmp_path):
    trainer = Trainer(TrainingConfig(**{**SMALL, "rise_below": 3.5}), tmp_path)
    trainer.save([trainer.step(1.0) for _ in range(120)])
    trainer.run(minutes=0.005, every=0.1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, trainer.progress.step + 1))
    early, late = (sum(line["loss"] for line in part) / len(part) for part in (lines[:5], lines[-5:]))
    assert late < 0.8 * early
    assert max(trainer.progress.rungs.values()) > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("<question> p1 > p2 <think>", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
    exported, trained = model.state_dict(), trainer.model.state_dict()
    for name, weight in trained.items():
        assert torch.equal(exported[name], weight.to(torch.bfloat16).float()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": {"maps": {"ladder": [4, 3], "goal": 3}}}, "must ascend"),
        ({"families": {"maps": {"ladder": [3, 4], "goal": 5}}}, "goal"),
        ({"families": {"mops": {"ladder": [3], "goal": 3}}}, "Did you mean 'maps'"),
        ({"families": {"maps": {"ladder": [300], "goal": 300}}}, "there are 128"),
        ({"tokens_per_step": 0}, "positive"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{**SMALL, **change})


def test_the_package_s_configuration_is_valid():
    config = TrainingConfig.load()
    assert set(config.families) == {"maps", "programs", "search"}
