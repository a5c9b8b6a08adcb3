"""The small reasoner's text format, tokenizer and trainer (the shipped weights are tested elsewhere)."""

import json
import random

import pytest
import torch
from tiny_reasoner import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonalloc.reasoner import build_tokenizer, prompt_text, read, solution_text
from reasonalloc.reasoner.lookups import lookups
from reasonalloc.reasoner.muon import Muon
from reasonalloc.reasoner.train import Trainer, TrainingConfig
from reasonalloc.tasks import TASKS


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
    for trainer in (first, again):
        trainer.progress.rungs["lookups"] = 1
    name, _, ids, labels = first.batch()
    assert (again.batch()[2] == ids).all()
    assert ids.numel() >= 300
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
    """Fifteen steps, a checkpoint and fifteen more are thirty steps, to the last bit; the opening ends in between."""
    whole, half = (Trainer(TrainingConfig(**SMALL), tmp_path / name) for name in ("whole", "half"))
    for _ in range(30):
        whole.step(1.0)
    for _ in range(15):
        half.step(1.0)
    half.save([{"step": 15}])
    other = Trainer(TrainingConfig(**SMALL), tmp_path / "half")
    assert other.resume()
    for _ in range(15):
        other.step(1.0)
    assert min(whole.progress.spent.values()) > 0
    assert other.progress == whole.progress
    for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another configuration"):
        Trainer(TrainingConfig(**{**SMALL, "seed": 1}), tmp_path / "half").resume()
    longer = Trainer(TrainingConfig(**{**SMALL, "tokens": 90_000}), tmp_path / "half")
    assert longer.resume(), "the total may change while the rates are constant"
    longer.progress.tokens = 80_000
    longer.save([])
    with pytest.raises(ValueError, match="another configuration"):
        Trainer(TrainingConfig(**SMALL), tmp_path / "half").resume()


def test_training_learns_climbs_and_exports(tmp_path):
    easy = {"lookups": 9.0, "maps": 3.5, "programs": 3.5}
    trainer = Trainer(TrainingConfig(**{**SMALL, "rise_below": easy}), tmp_path)
    trainer.run(every=0.2)
    assert 60_000 <= trainer.progress.tokens < 61_000
    assert trainer.rate() == 0.02
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, trainer.progress.step + 1))
    early, late = (sum(line["loss"] for line in part) / len(part) for part in (lines[:5], lines[-5:]))
    assert late < 0.8 * early
    assert max(trainer.progress.rungs.values()) > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("<question> x1 x2 5 <think>", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
    exported, trained = model.state_dict(), trainer.model.state_dict()
    for name, weight in trained.items():
        assert torch.equal(exported[name], weight.to(torch.bfloat16).float()), name
    refined = Trainer(trainer.config, tmp_path / "refined")
    refined.refine(tmp_path / "model")
    assert torch.equal(refined.model.lm_head.weight, exported["lm_head.weight"])
    assert refined.batch()[0] in trainer.config.ladders
    assert refined.progress.rungs == {"lookups": 1, "maps": 2, "programs": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ladders": {"maps": [6, 4]}}, "must ascend"),
        ({"opening": [4, 3]}, "lookups must ascend"),
        ({"opening": []}, "lookups must ascend"),
        ({"opening": [300]}, "300 look-ups need"),
        ({"ladders": {"mops": [3]}}, "Did you mean 'maps'"),
        ({"ladders": {"maps": [300]}}, "there are 192"),
        ({"shares": {"maps": 1}}, "name maps, programs"),
        ({"rise_below": {"maps": 1, "programs": 1}}, "lookups"),
        ({"decay": 0}, "decay"),
        ({"finish": 2}, "finish"),
        ({"rise_below": {"lookups": 1, "maps": 1, "programs": 0}}, "positive"),
        ({"tokens": 0}, "positive"),
        ({"batch_tokens": [5, 4]}, "positive"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{**SMALL, **change})


def test_the_package_s_configuration_is_valid():
    config = TrainingConfig.load()
    assert set(config.ladders) == {"maps", "programs", "search"}


def test_the_top_prevails_while_climbing_and_at_the_end(tmp_path):
    ladders = {"maps": [4, 6, 12, 16]}
    config = {**SMALL, "ladders": ladders, "shares": {"maps": 1}, "rise_below": {"lookups": 1, "maps": 1}}
    trainer = Trainer(TrainingConfig(**config), tmp_path)
    trainer.progress.rungs["lookups"] = 1

    def difficulties(rung):
        trainer.progress.rungs["maps"] = rung
        found = []
        for trainer.progress.step in range(100):
            found.append(trainer.batch()[1])
        return found

    climbing, there = difficulties(2), difficulties(3)
    trainer.progress.tokens = int(0.95 * trainer.config.tokens)
    finishing = difficulties(3)
    assert climbing.count(12) > 40
    assert set(climbing) == set(range(4, 13))
    assert there.count(16) < 25
    assert set(there) == set(range(4, 17))
    assert finishing.count(16) > 40


def test_families_share_tokens_not_turns(tmp_path):
    trainer = Trainer(TrainingConfig(**{**SMALL, "shares": {"maps": 1, "programs": 2}}), tmp_path)
    assert {trainer.batch()[0] for _ in range(3)} == {"lookups"}
    trainer.progress.rungs["lookups"] = 1
    for _ in range(60):
        trainer.step(0.0)
    spent = trainer.progress.spent
    assert sum(spent.values()) == trainer.progress.tokens
    assert spent["programs"] / spent["maps"] == pytest.approx(2, rel=0.1)


def test_lookups_say_records_again_and_only_what_is_settled_is_learned(tmp_path):
    question, thought, settled = lookups(random.Random(3), 5)
    records = [tuple(record.split()) for record in " ".join(question).split(" ;") if record]
    again = [tuple(record.split()) for record in " ".join(thought).split(" ;") if record]
    assert len(records) == 5
    assert len(again) == 10
    assert set(again) <= set(records)
    assert len({record[0] for record in records}) == 5
    names = [word for word, known in zip(thought, settled, strict=True) if not known]
    assert names == [record[0] for record in again]
    trainer = Trainer(TrainingConfig(**SMALL), tmp_path)
    _, _, ids, labels = trainer.batch()
    learned = labels != -100
    assert torch.equal(ids[learned], labels[learned])
    assert 0.2 < learned.float().mean() < 0.6
    trainer.step(1.0)
    assert trainer.progress.rungs["lookups"] == 0, "ten batches at least"
    for _ in range(9):
        trainer.step(1.0)
    assert trainer.progress.rungs["lookups"] == 1
    assert trainer.batch()[0] != "lookups"


def test_muon_steps_along_the_orthogonal_factor():
    """After a first step from zero momentum, the update's singular values are near 1 and its factors the gradient's."""
    torch.manual_seed(0)
    for shape in ((24, 8), (8, 24), (12, 12)):
        weight = torch.zeros(shape, requires_grad=True)
        gradient = torch.linalg.qr(torch.randn(max(shape), min(shape)))[0] * torch.linspace(0.5, 1, min(shape))
        weight.grad = (gradient if shape[0] >= shape[1] else gradient.T).contiguous()
        Muon([weight], lr=1.0, weight_decay=0.0).step()
        u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
        update = -weight.detach() / max(1.0, shape[0] / shape[1]) ** 0.5
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert torch.linalg.norm(update - u @ v) < 0.35 * torch.linalg.norm(u @ v)
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.zeros(3, requires_grad=True)], lr=1.0)
