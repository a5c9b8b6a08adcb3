"""Evaluation: questions, grading, the store and its executors, statistics, the report."""

import csv
import json
import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_reasoner import SMALL
from typer.main import get_command
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc.cli import eval as eval_command
from reasonalloc.cli.app import app
from reasonalloc.evaluation import statistics
from reasonalloc.evaluation.answering import Answer, Sampling, answer
from reasonalloc.evaluation.executors import Worker, fingerprint, run_local, shard
from reasonalloc.evaluation.fidelity import Reading
from reasonalloc.evaluation.findings import ACCURACY, KL, MARGIN, NLL, collect
from reasonalloc.evaluation.grading import Grade, after_thought, grade_recall, grader
from reasonalloc.evaluation.questions import load_questions, load_texts
from reasonalloc.evaluation.recall import recall_question
from reasonalloc.evaluation.report import (
    _bytes,
    comparisons_csv,
    curves,
    markdown,
    rows,
    sentences,
    to_csv,
    to_html,
    write_report,
)
from reasonalloc.evaluation.store import Store
from reasonalloc.evaluation.study import Study, TaskSource
from reasonalloc.files import sealed
from reasonalloc.reasoner.train import Trainer, TrainingConfig
from reasonalloc.tasks import TASKS

DATA = Path(__file__).parents[2] / "shared" / "data"
TINY = {
    **SMALL,
    "ladders": {"maps": [4, 6], "programs": [3], "search": [4]},
    "shares": {"maps": 1, "programs": 1, "search": 1},
    "rise_below": {"lookups": 9.0, "maps": 0.05, "programs": 0.05, "search": 0.05},
    "tokens": 4000,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny reasoner that can do nothing yet: what it writes is rubbish, but its own."""
    folder = tmp_path_factory.mktemp("tiny")
    Trainer(TrainingConfig(**TINY), folder).run()
    return str(folder / "model")


DEMAND = Path(ra.__file__).parent / "reasoner" / "model" / "demand_profile.json"


def study_of(model, **changes):
    values = {
        "model": model,
        "tasks": [{"name": "maps:6", "count": 5}, {"name": "search:5", "count": 4}],
        "variants": ["full", "rkv", {"name": "small window", "method": "rkv", "changes": {"window": 2}}],
        "budgets": [16, 24],
        "samples": 1,
        "sampling": {"temperature": 0, "top_p": 1.0, "max_new_tokens": 60},
        "common": {"interval": 8},
        "dtype": "float32",
        "batch": 3,
    }
    return Study.from_dict({**values, **changes})


def test_the_extent_of_a_study_is_the_plan_s():
    tasks = [
        {"name": "maps:6", "count": 5},
        {"name": "search:5", "count": 4},
        {"name": "maps:4", "count": 3, "fidelity": True},
    ]
    study = study_of("m", tasks=tasks, samples=2, sampling={"max_new_tokens": 6000}, random_splits=3, random_count=2)
    sets = study.load_questions()
    assert study.extent(sets) == (
        "138 answers: 9 questions x 2 samples x 5 caches + 4 questions x 2 samples x 6 random splits; "
        "27 readings: 3 texts x 5 caches + 2 texts x 6 random splits, of at most 6,000 tokens each"
    )
    assert sum(map(len, study.plan("model", sets))) == 90 + 48 + 15 + 12
    one = study_of("m", tasks=tasks[:1], variants=["full"], sampling={"temperature": 0, "max_new_tokens": 1})
    assert one.extent(one.load_questions()) == "5 answers: 5 questions x 1 sample x 1 cache, of at most 1 token each"


# ---- questions and grading ----


def test_built_in_questions_are_those_of_the_test_split():
    questions = load_questions("programs:8", count=6)
    assert [q.prompt for q in questions.questions] == [
        TASKS.create("programs").problem(i, 8).question for i in range(6)
    ]
    assert load_questions("maps:4").first(7).questions == load_questions("maps:4", count=7).questions
    assert len(load_questions("search:5").questions) == 100


def test_settings_are_chosen_on_problems_that_the_test_split_does_not_hold():
    tests, trains = (load_questions("maps:8", count=20, split=split) for split in ("test", "train"))
    assert (tests.name, trains.name, trains.grader) == ("maps:8", "maps:8 train", "maps")
    assert not {q.prompt for q in tests.questions} & {q.prompt for q in trains.questions}
    texts = load_texts("maps:8", count=20, split="train")
    assert texts.name == "fidelity:maps:8 train"
    assert [q.prompt for q in texts.questions] == [q.prompt for q in trains.questions]
    for name, load in (("math500", load_questions), ("recall:8", load_questions), ("recall:8", load_texts)):
        with pytest.raises(ValueError, match=f"{name} has no split 'train'"):
            load(name, split="train")


def test_questions_from_a_file(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "2 + 2?", "answer": "so it is #### 4", "id": 7}\n\n{"question": "3?", "answer": 3}\n')
    mine = load_questions("mine", path)
    assert [(q.id, q.reference) for q in mine.questions] == [("7", "4"), ("3", "3")]
    assert mine.questions[0].prompt.startswith("2 + 2?\n\nPlease reason step by step")
    with pytest.raises(ValueError, match="line 1: no field 'problem'; there are question, answer, id"):
        load_questions("math500", path)
    with pytest.raises(ValueError, match="no field 'text'"):
        load_questions("mine", path, question_field="text")
    with pytest.raises(FileNotFoundError, match="no file at"):
        load_questions("mine", tmp_path / "none.jsonl")
    for empty in ("null", '""', '" "'):
        path.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": ' + empty + "}\n")
        with pytest.raises(ValueError, match="line 2: field 'answer' is empty"):
            load_questions("mine", path)
    path.write_text('{"question": "a", "answer": "1", "id": 1}\n{"question": "b", "answer": "1", "id": 1}\n')
    with pytest.raises(ValueError, match="the id '1' appears more than once"):
        load_questions("mine", path)


def test_several_answers_are_all_right_in_any_order(tmp_path):
    pytest.importorskip("math_verify")
    path = tmp_path / "own.jsonl"
    rows = [["5", 6], [5], ["(1, 2)", "\\frac{1}{2}"], ["\\{1, (2, 3)\\}", "4"], ["x"]]
    path.write_text("".join(json.dumps({"question": "q", "answer": row}) + "\n" for row in rows))
    references = [question.reference for question in load_questions("mine", path).questions]
    assert references == ["5, 6", "5", "(1, 2), \\frac{1}{2}", "\\{1, (2, 3)\\}, 4", "x"]
    for text, right in (("6, 5", True), ("5,6", True), ("5", False), ("5, 6, 7", False), ("5, 7", False)):
        assert grader("math")(references[0], f"\\boxed{{{text}}}").correct == right, text


def test_a_chat_of_one_turn_is_a_question(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4", "id": null}\n')
    (question,) = load_questions("mine", path, question_field="prompt").questions
    assert question.prompt.startswith("2 + 2?\n\n")
    assert question.id == "1"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answer", '{"a": 1}', "must be a text or a number, got {'a': 1}; remove the line or change it"),
        ("answer", "true", "must be a text or a number, got True"),
        ("answer", "NaN", "is NaN, no number; remove the line or fill it"),
        ("answer", "1e999", "must be a text or a number, got inf"),
        ("answer", "[]", "is empty"),
        ("answer", '["5", null]', "is empty"),
        ("answer", '["5", ["6"]]', r"must be a text or a number, got \['6'\]"),
        ("answer", '["5", false]', "must be a text or a number, got False"),
        ("answer", '["1,000", "2"]', "one of several answers cannot hold a comma, got '1,000'; write it without"),
        ("question", "false", "must be a text or a number"),
        ("question", '["a", "b"]', "must be a text, or a chat of the user's one turn"),
        (
            "question",
            '[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]',
            "answers follow one turn",
        ),
        ("question", '[{"role": "user", "content": [{"type": "text", "text": "y"}]}]', ", content must be a text"),
        ("question", '[{"role": "user"}]', ", content is empty"),
        ("id", "[1]", "must be a text or a number"),
        ("id", "{}", "must be a text or a number"),
    ],
)
def test_questions_that_are_no_text(tmp_path, field, value, message):
    path, row = tmp_path / "own.jsonl", {"question": '"q"', "answer": '"1"', "id": "2"}
    fields = ", ".join(f'"{name}": {text}' for name, text in {**row, field: value}.items())
    path.write_text(f'{{"question": "a", "answer": "1", "unused": NaN}}\n{{{fields}}}\n')
    with pytest.raises(ValueError, match=f"own.jsonl, line 2: field '{field}'.*{message}"):
        load_questions("mine", path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math50", "Did you mean 'math500'"),
        ("maps", "maps needs a size, for instance maps:48"),
        ("maps:big", "maps needs a size"),
        ("maps:2", "begins at difficulty 4"),
        ("recall:3", "recall takes 4 to"),
    ],
)
def test_unknown_questions(name, message):
    with pytest.raises(ValueError, match=message):
        load_questions(name)


@pytest.mark.skipif(not DATA.is_dir(), reason="no data for evaluation on this machine")
@pytest.mark.parametrize(
    ("name", "file", "count"), [("math500", "math500", 500), ("aime24", "aime24", 30), ("gsm8k", "gsm8k_test", 1319)]
)
def test_known_sets_from_files(name, file, count):
    questions = load_questions(name, DATA / f"{file}.jsonl").questions
    assert len(questions) == count
    pytest.importorskip("math_verify")
    for question in questions[:: count // 25]:
        assert grader("math")(question.reference, f"Hence \\boxed{{{question.reference}}}.").correct, question


@pytest.mark.parametrize(
    ("reference", "text", "extracted", "right"),
    [
        ("\\frac{1}{2}", "So the answer is \\boxed{0.5}.", True, True),
        ("42", "<think>maybe \\boxed{41}</think> It is \\boxed{42}.", True, True),
        ("42", "<think>maybe \\boxed{42}</think> It is \\boxed{41}.", True, False),
        ("7", "I do not know", False, False),
        ("(3,\\frac{\\pi}{2})", "\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", True, True),
    ],
)
def test_mathematics_is_graded_as_mathematics(reference, text, extracted, right):
    pytest.importorskip("math_verify")
    grade = grader("math")(reference, text)
    assert (grade.extracted is not None, grade.correct) == (extracted, right)


def test_an_unreadable_reference_is_nobody_s_fault():
    pytest.importorskip("math_verify")
    assert not grader("math")("\\$", "\\boxed{1}").gradable


def test_tasks_are_graded_by_their_own_checker():
    for name in ("maps", "programs", "search"):
        problem = TASKS.create(name).problem(3, 6)
        grade = grader(name)(problem.question, f"{problem.thought} <answer> {problem.answer}")
        assert grade.correct
        assert grade.extracted == problem.answer
        assert grader(name)(problem.question, problem.thought).extracted is None
        assert grader(name)(problem.question, f"{problem.thought} <answer> x1").score == 0.0


def test_recall():
    prompt, answers = recall_question(1, 30)
    assert (prompt, answers) == recall_question(1, 30)
    assert prompt.count("The number of") == 31  # the form of the answer is one more
    for thing, number in answers.items():
        assert f"The number of {thing} is {number}." in prompt
    said = " ".join(f"The number of {thing} is {number}." for thing, number in answers.items())
    assert grade_recall(json.dumps(answers), said).correct
    thing, number = next(iter(answers.items()))
    assert grade_recall(json.dumps(answers), f"**{thing.title()}**: {number}").score == 0.25
    assert grade_recall(json.dumps(answers), f"the number of {thing} is {int(number) + 1}").score == 0.0
    assert grade_recall(json.dumps(answers), "I forgot").extracted is None
    (text,) = load_texts("recall:30", count=2).questions[1:]
    assert text.prompt == prompt
    assert grade_recall(json.dumps(answers), text.reference).correct, "read teacher-forced: what it should have said"


def test_what_follows_the_thought():
    assert after_thought("a</think>b</think>c") == "c"
    assert after_thought("a</think>b[/THINK]c") == "c", "the last mark of any kind"
    assert after_thought("no thought") == "no thought"


# ---- answering ----


def test_answers_are_those_of_stock_generation(model):
    """Text, length and end of each answer in a padded batch, against transformers alone, one by one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reasonalloc.engines.transformers.loading import load

    network, tokenizer = load(model, "float32")
    prompts = [TASKS.create("maps").problem(i, d).question for i, d in enumerate((4, 6, 5))]
    got = answer(network, tokenizer, prompts, ra.Compression.method("full"), Sampling(0, 1.0, 50))
    stock = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    plain = AutoTokenizer.from_pretrained(model)
    for prompt, found in zip(prompts, got, strict=True):
        turns = [{"role": "user", "content": prompt}]
        ids = plain.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = stock.generate(**ids, max_new_tokens=50, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        finished = out[-1] == plain.eos_token_id
        assert (found.tokens, found.finished) == (len(out), finished)
        assert found.text == plain.decode(out[:-1] if finished else out)
        asked = ids["input_ids"].shape[1]
        assert found.kept_tokens == pytest.approx(asked + (len(out) - 1) / 2)


def test_answers_stay_inside_the_budget(model):
    from reasonalloc.engines.transformers.loading import load

    network, tokenizer = load(model, "float32")
    prompts = [TASKS.create("maps").problem(i, 6).question for i in range(3)]
    compression = ra.Compression.method("rkv", 16, interval=8)
    for found in answer(network, tokenizer, prompts, compression, Sampling(0, 1.0, 60)):
        assert 12 < found.kept_tokens <= 24
        assert found.kv_bytes == 2 * 4 * 8 * 2 * 2 * 24  # k and v, bytes, dim, layers, heads, slots
        assert found.evicted
    roomy = ra.Compression.method("rkv", 200, interval=8)
    assert not any(found.evicted for found in answer(network, tokenizer, prompts, roomy, Sampling(0, 1.0, 60)))


def test_an_interval_that_goes_with_the_budget(model):
    study = study_of(model, variants=["full", "rkv"], budgets=[16, 30, 64], common={}, interval_share=0.25)
    assert [cell.compression.interval for cell in study.cells] == [128, 4, 8, 16]
    assert Study.from_dict(json.loads(json.dumps(study.to_dict()))) == study
    with pytest.raises(ValueError, match="interval_share must be positive, got 0"):
        study_of(model, common={}, interval_share=0)
    with pytest.raises(ValueError, match="interval_share and an interval in common exclude each other"):
        study_of(model, common={"interval": 8}, interval_share=0.5)


def test_sampling_is_checked():
    with pytest.raises(ValueError, match=r"top_p in \(0, 1\]"):
        Sampling(top_p=0)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1)


# ---- studies ----


def test_study_survives_json(model, tmp_path):
    study = study_of(model, random_splits=2, random_budgets=[24], random_count=3)
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study.to_dict()))
    again = Study.load(path)
    assert again == study
    sets = study.load_questions()
    keys = [[unit.key for unit in batch] for batch in study.plan("m", sets)]
    assert keys == [[unit.key for unit in batch] for batch in again.plan("m", sets)]
    flat = [key for batch in keys for key in batch]
    assert len(set(flat)) == len(flat) == 9 * 5 + 2 * 6
    assert all(len(batch) <= 3 for batch in keys)
    other = {unit.key for batch in study.plan("other", sets) for unit in batch}
    assert other.isdisjoint(flat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ["rvk"]}, "Did you mean 'rkv'"),
        ({"variants": ["rkv", "rkv"]}, "two methods of one name"),
        (
            {"variants": [{"name": "a", "method": "rkv", "changes": {"scorer": {"name": "rkv", "kernal": 3}}}]},
            "'kernel'",
        ),
        ({"variants": [{"name": "a", "method": "rkv", "changes": {"budget": 3}}]}, "budgets are the study's"),
        ({"budgets": [4]}, "leaves nothing beside the window"),
        ({"samples": 2}, "greedy answers are all alike"),
        ({"tasks": []}, "at least one task"),
        ({"random_budgets": [99]}, "must be among the budgets"),
        ({"variants": ["reasonalloc-layer"], "common": {"layers": "wave"}}, "calibrate"),
        ({"nonsense": 1}, "unknown field 'nonsense'"),
        ({"budgets": [16, 16]}, "two budgets of one name"),
        ({"budgets": []}, "at least one budget"),
        ({"variants": [{"name": "random-split x", "method": "rkv"}]}, "kept for the control"),
        ({"random_count": 0}, "random_count must be positive"),
        ({"random_splits": -1}, "must not be negative"),
        ({"baseline": "rvk"}, "Did you mean 'rkv'"),
        ({"baseline": "snapkv"}, "unknown baseline among the study's methods 'snapkv'"),
    ],
)
def test_wrong_studies(model, changes, message):
    with pytest.raises(ValueError, match=message):
        study_of(model, **changes)


# ---- the store and its executors ----


def begin(study, folder):
    worker, store = Worker(study), Store(folder)
    store.begin(study, worker.fingerprint, study.load_questions())
    return worker, store


def run_all(study, folder):
    worker, store = begin(study, folder)
    run_local(worker, store, store.plan(), lambda *done: None)
    return store


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run."""
    return run_all(study_of(model), tmp_path_factory.mktemp("whole"))


def work(worker, folder, index, of, slow):
    """A shard; ``slow`` seconds before every result."""
    store = Store(folder)
    write, store.write = store.write, lambda *result: (time.sleep(slow), write(*result))
    run_local(worker, store, shard(store.plan(), index, of), lambda *done: None)


def in_process(*arguments):
    """``work`` in a process of its own. It brings the loaded model along: loading takes threads, which forks lack."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def test_killed_runs_are_resumed_by_another_executor(model, whole, tmp_path):
    """Killed five times at random moments, then finished by two shards: the same files, byte for byte."""
    study, folder = study_of(model), tmp_path / "run"
    expected, counts, rng = whole.results(), [], random.Random(0)
    worker, store = begin(study, folder)
    for _ in range(5):
        before = len(store.results())
        process = in_process(worker, folder, 0, 1, 0.05)
        deadline, more = time.monotonic() + 60, rng.randrange(1, 8)
        while len(store.results()) < before + more:
            assert process.is_alive(), "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        counts.append(len(store.results()))
        assert all(expected[key] == content for key, content in store.results().items())
    assert 0 < counts[0] < counts[-1] < len(expected), f"the runs were not killed half-way: {counts}"
    for index in (1, 0):
        work(worker, folder, index, 2, 0)
    assert store.results() == expected


def test_two_shards_at_once(model, whole, tmp_path):
    study, folder = study_of(model), tmp_path / "run"
    worker, _ = begin(study, folder)
    processes = [in_process(worker, folder, index, 2, 0.0) for index in range(2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert Store(folder).results() == whole.results()


def test_ray_survives_a_killed_worker(model, whole, tmp_path):
    ray = pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    from reasonalloc.evaluation.executors import run_ray

    study, folder, killed = study_of(model), tmp_path / "run", []
    _, store = begin(study, folder)

    def kill_once(*done):
        if not killed:
            (victim, *_) = [p for p in psutil.process_iter(["name"]) if "_RayWorker" in (p.info["name"] or "")]
            victim.kill()
            killed.append(victim.pid)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(OSError, match=r"2 workers of 1\.0 GPUs need 2\.0, the cluster has 0"):
            run_ray(study, store, store.plan(), workers=2, gpus=1.0, done=kill_once)
        run_ray(study, store, store.plan(), workers=2, gpus=0, done=kill_once)
    finally:
        ray.shutdown()
    assert killed
    assert store.results() == whole.results()


def test_sampled_answers_repeat(model, tmp_path):
    changes = {"samples": 3, "sampling": {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 20}, "budgets": [16]}
    first, again = (run_all(study_of(model, **changes), tmp_path / name).results() for name in "ab")
    assert first == again
    texts = {json.loads(content)["result"]["text"] for content in first.values()}
    assert len(texts) > len(first) // 3


def test_another_study_needs_another_folder(model, whole):
    for changes in ({"budgets": [16]}, {"batch": 5}):  # what is decoded together decides shards and sampling, too
        with pytest.raises(ValueError, match=rf"another study \(different: {next(iter(changes))}\)"):
            whole.check(study_of(model, **changes))
    whole.check(study_of(model))


def test_a_folder_of_a_version_with_fewer_settings_goes_on(model, tmp_path):
    store, study = Store(tmp_path), study_of(model)
    data = study.to_dict()
    for task in data["tasks"]:
        del task["split"]
    (tmp_path / "study.json").write_text(json.dumps(data))
    store.check(study)


def test_changed_inputs_need_another_folder(model, whole):
    study, worker = study_of(model), Worker(study_of(model))
    whole.begin(study, worker.fingerprint, study.load_questions())
    with pytest.raises(ValueError, match="other inputs: the model changed since"):
        whole.begin(study, "another", study.load_questions())
    with pytest.raises(ValueError, match="the questions changed"):
        whole.begin(study, worker.fingerprint, [found.first(2) for found in study.load_questions()])


def test_an_automatic_profile_is_settled_once(model, tmp_path):
    """Its hash is part of the keys, and a later run takes the folder's own."""
    auto = {"name": "auto", "method": "reasonalloc", "changes": {"profile": "auto"}}
    study = study_of(model, variants=["rkv", auto], budgets=[16], tasks=[{"name": "maps:4", "count": 2}])
    shape = ra.ModelShape(2, 2, 4, 8)
    first, other = (ra.DemandProfile.of_layers(waves, shape) for waves in ([1.0, 3.0], [2.0, 1.0]))
    store = Store(tmp_path / "run")
    for profile in (first, other):
        store.begin(study, "m", study.load_questions(), profile)
    digests = {unit.identity()["compression"]["profile"] for batch in store.plan() for unit in batch}
    assert digests == {None, first.digest}


def test_a_folder_that_cannot_be_written(model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reasonalloc.evaluation.store.write_atomically", full)
    with pytest.raises(OSError, match=r"cannot write to .*: No space left on device"):
        Store(tmp_path / "run").begin(study_of(model), "m", study_of(model).load_questions())


def test_a_disk_that_fills_up_loses_nothing(model, whole, tmp_path, monkeypatch):
    from reasonalloc.evaluation import store as module

    study, folder, write, left = study_of(model), tmp_path / "run", module.write_once, [7]

    def filling(path, content):
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        return write(path, content)

    monkeypatch.setattr(module, "write_once", filling)
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study.to_dict()))
    done = CliRunner().invoke(app, ["eval", "-o", str(folder), "--study", str(path)])
    assert done.exit_code == 2
    assert "No space left on device" in done.stderr
    monkeypatch.undo()
    done = CliRunner().invoke(app, ["eval", "-o", str(folder), "--resume"])
    assert done.exit_code == 0, done.stderr
    assert Store(folder).results() == whole.results()


def test_shards_are_numbered():
    assert shard([(1,), (2,), (3,)], 1, 2) == [(2,)]
    with pytest.raises(ValueError, match="shards are numbered 0/2 to 1/2, got 2/2"):
        shard([], 2, 2)


def test_fingerprints_tell_weights_apart(model):
    from reasonalloc.engines.transformers.loading import load

    network, tokenizer = load(model, "float32")
    before = fingerprint(network, tokenizer)
    assert fingerprint(*load(model, "float32")) == before
    tokenizer.chat_template += " "
    assert fingerprint(network, tokenizer) != before
    network, tokenizer = load(model, "float32")
    network.model.norm.weight.data[0] += 0.5
    assert fingerprint(network, tokenizer) != before


# ---- statistics ----


@pytest.mark.parametrize(("problems", "samples", "law"), [(200, 1, (2, 1)), (40, 4, (1, 1)), (60, 8, (0.5, 0.5))])
def test_intervals_cover_what_they_promise(monkeypatch, problems, samples, law):
    """1,000 simulated studies: problems of different difficulty, several samples of each."""
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    rng, inside = np.random.default_rng(1), 0
    for i in range(1000):
        difficulty = rng.beta(*law, problems)
        found = statistics.mean_score(rng.binomial(samples, difficulty) / samples, seed=i)
        inside += found.low <= law[0] / sum(law) <= found.high
    assert 930 <= inside <= 970


def test_paired_tests_hold_their_level_and_find_effects(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    rng = np.random.default_rng(2)
    inside = false = found = 0
    for i in range(1000):
        difficulty = rng.beta(2, 1, 100)
        a, b = (rng.binomial(4, difficulty) / 4 for _ in range(2))
        null = statistics.compare(a, b, i)
        inside += null.difference.low <= 0 <= null.difference.high
        false += null.p < 0.05
        worse = rng.binomial(4, 0.8 * difficulty) / 4
        found += statistics.compare(a, worse, i).p < 0.05
    assert 930 <= inside <= 970
    assert 30 <= false <= 70
    assert found > 900


def test_extreme_scores_have_honest_intervals():
    assert statistics.mean_score(np.ones(20)).low == pytest.approx(0.025 ** (1 / 20))
    assert statistics.mean_score(np.zeros(20)).high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert statistics.mean_score(np.ones(1)) == statistics.Estimate(1.0, 0.0, 1.0)
    same = statistics.compare(np.ones(9), np.ones(9))
    assert (same.difference.mean, same.p) == (0.0, 1.0)
    assert same.difference.high == -same.difference.low == pytest.approx(1 - 0.025 ** (1 / 9))
    assert statistics.compare(np.ones(9), np.ones(9), bounded=False).difference.high == np.inf
    with pytest.raises(ValueError, match="no problem"):
        statistics.compare(np.ones(0), np.ones(0))
    assert statistics.compare(np.ones(9), np.zeros(9)).p == 2**-8
    with pytest.raises(ValueError, match="same problems"):
        statistics.compare(np.ones(3), np.ones(4))


def test_holm():
    """Against the definition, on the textbook's example."""
    ps = [0.01, 0.04, 0.03, 0.005]
    made = [statistics.Comparison(statistics.Estimate(0, 0, 0), p, 1, 2) for p in ps]
    assert [c.corrected for c in statistics.correct(made)] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [c.real for c in statistics.correct(made)] == [True, False, False, True]


def test_the_sign_test_counts_problems_that_differ():
    """By hand: nine wins and one loss have p = 2 (1 + 10) / 2**10, however large the differences are."""
    first = np.array([0.5] * 9 + [0.0] + [0.25] * 30)
    second = np.array([0.25] * 9 + [1.0] + [0.25] * 30)
    found = statistics.compare(first, second)
    assert (found.above, found.below) == (9, 1)
    assert found.sign_p == pytest.approx(22 / 1024)
    assert statistics.correct([found])[0].sign_p == found.sign_p, "kept, and not corrected"
    assert statistics.compare(second, first).sign_p == found.sign_p
    same = statistics.compare(first, first)
    assert (same.above, same.below, same.sign_p) == (0, 0, 1.0)
    assert statistics.compare(np.ones(4), np.zeros(4)).sign_p == pytest.approx(2 / 2**4)
    samples = np.array([0.1, 0.2, 0.3])
    assert samples.sum() != samples[::-1].sum()
    orders = statistics.compare(np.array([samples.sum(), 1.0]), np.array([samples[::-1].sum(), 0.0]))
    assert (orders.above, orders.below) == (1, 0), "the same samples in another order are a tie"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.019, 0.3, False),
        (-0.021, 0.3, None),
        (-0.02, 0.3, None),
        (-0.3, -0.021, True),
        (-0.3, -0.02, None),
        (-0.019, -0.01, False),  # worse, but by less than the margin
        (-np.inf, np.inf, None),
    ],
)
def test_inferiority_is_decided_by_the_interval(low, high, expected):
    assert statistics.inferior(statistics.Estimate(0.0, low, high), 0.02) is expected


def test_rank_among_random_splits():
    assert statistics.rank_among(0.5, [0.4, 0.5, 0.6]) == (3, 4), "a tie is no merit"


# ---- the report ----


def fill(store, study, right, tokens=lambda method: 100, evicted=lambda *unit: None):
    """A finished study with made-up answers.

    ``right(method, budget, problem)`` says which are correct, ``evicted`` likewise, ``tokens(method)`` their length.
    """
    store.begin(study, "m", study.load_questions())
    plan = store.plan()
    for batch in plan:
        for unit in batch:
            name, _, size = unit.task.partition(":")
            problem = TASKS.create(name).problem(int(unit.question.id), int(size))
            correct = right(unit.cell.method, unit.cell.budget, int(unit.question.id))
            text = f"{problem.thought} <answer> {problem.answer if correct else 'x1'}"
            if correct is None:
                text = problem.thought
            kept, gone = unit.cell.budget or 200, evicted(unit.cell.method, unit.cell.budget, int(unit.question.id))
            store.write(unit, Answer(text, tokens(unit.cell.method), correct is not None, kept, 1000 * kept, gone))
    return plan


@pytest.mark.parametrize(("comparisons", "least"), [(1, 6), (2, 7), (3, 7), (4, 8), (40, 11)])
def test_the_fewest_problems_that_can_tell_anything(comparisons, least):
    """By hand: the smallest p of a sign-flip test of n problems is 2 / 2**n."""
    assert statistics.least_problems(comparisons) == least
    assert comparisons * 2.0 ** (1 - least) < 0.05 <= comparisons * 2.0 ** (2 - least)


def test_bytes_are_written_for_people():
    found = [_bytes(count) for count in (0, 512, 16_000, 954_368, 1_253_000, 143e6, 5.25e9, 2e12)]
    assert found == ["0 kB", "0.512 kB", "16 kB", "954 kB", "1.25 MB", "143 MB", "5.25 GB", "2000 GB"]


def test_report_says_what_is_real(model, tmp_path):
    study = study_of(
        model, tasks=[{"name": "maps:6", "count": 40}], variants=["full", "rkv", "h2o", "snapkv"], budgets=[16, 32],
        random_splits=3, random_count=20,
    )  # fmt: skip

    def right(method, budget, problem):
        if method == "full":
            return True
        if method.startswith("random"):
            return problem % 4 == int(method[-1])  # 25 % each
        share = {("rkv", 16): 2, ("h2o", 16): 6, ("snapkv", 16): 2, ("rkv", 32): 6, ("h2o", 32): 6, ("snapkv", 32): 1}
        return problem % 8 < share[method, budget] or (None if problem == 39 else False)

    def evicted(method, budget, problem):
        return {None: False, 16: True, 32: problem < 10}[budget] if method != "h2o" else None

    store = Store(tmp_path / "run")
    plan = fill(store, study, right, tokens=lambda method: 150 if method == "h2o" else 100, evicted=evicted)
    findings = collect(store, study, plan)
    cells = {(cell.method, cell.budget): cell for cell in findings.cells}
    assert cells["full", None].values[ACCURACY].mean() == 1
    assert cells["rkv", 16].values[ACCURACY].mean() == 0.25
    assert cells["h2o", 16].values[ACCURACY].mean() == 0.75
    assert cells["rkv", 16].unreadable == cells["rkv", 16].cut_off == 1 / 40
    text = "\n".join(sentences(findings, "maps:6"))
    assert "At budget 16, h2o is better than rkv (+50.0 [" in text
    # 20 of 40 problems differ, all to one side: 2 / 2**20. No problem differs: an interval of 1 - 0.025 ** (1 / 40).
    assert "better on 20 problems, worse on 0, sign test p = 1.9e-06): not inferior by more than 2 points." in text
    assert (
        "At budget 16, snapkv cannot be told from rkv (+0.0 [-8.8, +8.8] points, corrected p = 1; better on 0 "
        "problems, worse on 0, sign test p = 1): undecided at a margin of 2 points." in text
    )
    assert "better on 0 problems, worse on 25, sign test p = 6e-08): inferior by more than 2 points." in text
    assert "At budget 32, snapkv is worse than rkv (-62.5 [" in text
    assert "At budget 16, rkv is worse than the full cache (-75.0 [" in text
    assert "At budget 16, rkv (30.0) takes place 1 of 4 among random splits" in text
    assert "At budget 32, snapkv (15.0) takes place 4 of 4 among random splits" in text
    table = markdown(findings)
    first, last = table.index("| method | budget |"), table.index("## What the words mean")
    assert first < 250, "before the table stands what was asked, no more"
    for word in ("cut off", "unreadable", "exposure", "KV bytes", "mean length", "kept tokens", "not inferior"):
        assert table.index(f"**{word}**: ") > last > table.index("h2o is better than rkv")
    page = to_html(findings, {})
    assert page.index("<table>") < page.index("<h2>What the words mean</h2>") < page.index("<dt>unreadable</dt>")
    assert "| 16 kB |" in table
    assert "| rkv | 16 | 25.0 [" in table
    assert "| 8.0% | 2.5% | 2.5% | 40 | 40 |" in table
    shown = {(line["method"], line["budget"]): line for line in rows(findings, "maps:6")}
    assert list(shown["rkv", "16"])[2:6] == ["accuracy %", "score %", "mean length", "exposure"]
    costs = {name: (line["mean length"], line["exposure"]) for name, line in shown.items()}
    assert costs == {
        ("full", "-"): ("100 (1.00x)", "0.0%"),
        ("rkv", "16"): ("100 (1.00x)", "100.0%"),
        ("h2o", "16"): ("150 (1.50x)", "-"),
        ("snapkv", "16"): ("100 (1.00x)", "100.0%"),
        ("rkv", "32"): ("100 (1.00x)", "25.0%"),
        ("h2o", "32"): ("150 (1.50x)", "-"),
        ("snapkv", "32"): ("100 (1.00x)", "25.0%"),
    }
    warned = [line for line in text.splitlines() if "evicted nothing in 75.0% of what it wrote or read" in line]
    assert [line.split(" evicted")[0] for line in warned] == ["At budget 32, rkv", "At budget 32, snapkv"]
    assert text.count("evicted nothing") == 2
    lines = to_csv(findings).splitlines()
    assert len(lines) == 1 + 8 * (7 + 6)
    assert "maps:6,rkv,32,exposure,0.25,,,40,40" in lines
    assert "maps:6,h2o,32,exposure,,,,40,40" in lines
    compared = list(csv.DictReader(comparisons_csv(findings).splitlines()))
    assert [(line["base"], line["method"], line["budget"]) for line in compared] == [
        ("rkv", "h2o", "16"), ("rkv", "snapkv", "16"), ("rkv", "h2o", "32"), ("rkv", "snapkv", "32"),
        *(("full", method, budget) for budget in ("16", "32") for method in ("rkv", "h2o", "snapkv")),
    ]  # fmt: skip
    wanted = {"task": "maps:6", "difference": "0.5", "wins": "20", "losses": "0", "sign p": "1.90735e-06"}
    wanted |= {"verdict": "better", "margin": "2", "inferiority": "not inferior", "metric": "accuracy"}
    assert wanted.items() <= compared[0].items()
    assert float(compared[0]["corrected"]) == pytest.approx(4 * float(compared[0]["p"]), rel=1e-4)
    wanted = {"low": "-0.0880973", "high": "0.0880973", "verdict": "undecided", "inferiority": "undecided"}
    assert wanted.items() <= compared[1].items()
    wider = collect(store, study, plan, margin=9.0)
    assert wider.comparisons["maps:6"][1].inferiority == "not inferior"
    assert "not inferior by more than 9 points" in "\n".join(sentences(wider, "maps:6"))
    drawn = curves(findings, "maps:6")["control"]
    assert drawn == {16: pytest.approx([20] * 3), 32: pytest.approx([20] * 3)}, (
        "as if asked all 40: 25 - 30 + 25, 75 - 80 + 25"
    )
    pytest.importorskip("matplotlib")
    paths = write_report(findings, tmp_path / "report")
    assert {p.name for p in paths} == {"report.md", "report.csv", "report.html", "comparisons.csv", "maps-6.png"}
    page = to_html(findings, {"maps:6": b"png"})
    assert "data:image/png;base64,cG5n" in page
    assert "src='http" not in page


def drop(store, plan, *wanted):
    """Delete results: (method, budget, problem), all samples of them."""
    for batch in plan:
        for unit in batch:
            if (unit.cell.method, unit.cell.budget, int(unit.question.id)) in wanted:
                (path,) = store.folder.glob(f"results/*/{unit.key}.json")
                path.unlink()


def test_missing_answers_are_refused(model, tmp_path):
    study = study_of(model, tasks=[{"name": "maps:6", "count": 6}], random_splits=1, random_budgets=[24])
    store = Store(tmp_path / "run")
    plan = fill(store, study, lambda *unit: True)
    drop(store, plan, ("rkv", 16, 3), ("rkv", 16, 4), ("full", None, 3), ("random-split 0", 24, 1))
    with pytest.raises(ValueError, match="is incomplete") as caught:
        collect(store, study, plan)
    assert str(caught.value) == (
        f"{store.folder} is incomplete: maps:6 full (5 of 6 answers), maps:6 random-split 0 at budget 24 (5 of 6 "
        f"answers), maps:6 rkv at budget 16 (4 of 6 answers); run `reasonalloc eval --resume -o {store.folder}`, or "
        "report with --partial on the problems that all methods have"
    )
    for path in store.folder.glob("results/*/*.json"):
        path.unlink()
    more = study_of(model, tasks=[{"name": "maps:6", "count": 1}], budgets=[16, 24, 32, 40, 48, 56])
    store = Store(tmp_path / "none")
    store.begin(more, "m", more.load_questions())
    with pytest.raises(ValueError, match=r"maps:6 full \(0 of 1 answers\), .* and 5 more; run"):  # 13 cells
        collect(store, more, store.plan())


def test_partial_reports_compare_all_methods_on_one_set_of_problems(model, tmp_path):
    """R-KV is right on the problems 0 to 2, the full cache on all; what either lacks counts for nobody."""
    study = study_of(
        model, tasks=[{"name": "maps:6", "count": 6}, {"name": "search:5", "count": 2}], variants=["full", "rkv"],
        budgets=[16], samples=2, sampling={"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 60}, random_splits=2,
        random_count=4,
    )  # fmt: skip
    store = Store(tmp_path / "run")
    plan = fill(store, study, lambda method, budget, problem: method == "full" or problem < 3)
    assert {len(cell.problems) for cell in collect(store, study, plan).of("maps:6")} == {6}
    drop(store, plan, ("rkv", 16, 0), ("full", None, 5), ("random-split 1", 16, 3))
    maps = [unit for batch in plan for unit in batch if unit.task == "maps:6"]
    (path,) = {  # one of two samples: the problem is unfinished
        path for unit in maps for path in store.folder.glob(f"results/*/{unit.key}.json")
        if (unit.cell.method, int(unit.question.id), unit.sample) == ("full", 4, 1)
    }  # fmt: skip
    path.unlink()
    for unit in (unit for batch in plan for unit in batch if unit.task == "search:5"):
        if unit.cell.method == "rkv":
            for path in store.folder.glob(f"results/*/{unit.key}.json"):
                path.unlink()
    findings = collect(store, study, plan, partial=True)
    assert findings.missing == 2 + 2 + 2 + 1 + 2 + 2  # search's problem 0 of both methods, and R-KV's other one
    problems = {cell.method: cell.problems for cell in findings.of("maps:6")}
    assert problems == {"full": ("1", "2", "3"), "rkv": ("1", "2", "3")}
    problems = {cell.method: cell.problems for cell in findings.of("maps:6", control=True)}
    assert problems == {"random-split 0": ("1", "2", "3"), "random-split 1": ("1", "2")}
    (rkv,) = [cell for cell in findings.of("maps:6") if cell.method == "rkv"]
    assert rkv.values[ACCURACY].tolist() == [1, 1, 0]
    assert rkv.answers == 6
    (compared,) = findings.comparisons["maps:6"]
    assert (compared.problems, compared.wins, compared.losses) == (3, 0, 1)
    assert findings.tasks() == ["maps:6"]
    text = markdown(findings)
    assert "INCOMPLETE: 11 answers are missing; every task is judged by the problems that all" in text
    assert "search:5 is left out: no problem can be judged for all methods" in text


def test_a_report_reads_grades_and_resamples_once(model, tmp_path, monkeypatch):
    study = study_of(model, tasks=[{"name": "maps:6", "count": 6}], random_splits=1)
    store, counts = Store(tmp_path / "run"), dict.fromkeys(("read", "grade", "_bootstrap"), 0)
    plan = fill(store, study, lambda method, budget, problem: problem % 2 == (method == "rkv"))

    def counted(home, name):
        before = getattr(home, name)

        def call(*arguments):
            counts[name] += 1
            return before(*arguments)

        monkeypatch.setattr(home, name, call)

    counted(Store, "read")
    counted(Store, "grade")
    counted(statistics, "_bootstrap")
    done = CliRunner().invoke(app, ["report", str(store.folder)])
    assert done.exit_code == 0, done.stderr
    units = sum(map(len, plan))
    # Accuracy and score of 5 named cells and 2 random ones; of 6 comparisons those 4 in which problems differ, that is
    # R-KV's with the full cache and the small window's with R-KV (full and small window are right on the same).
    assert counts == {"read": units, "grade": units, "_bootstrap": 14 + 4}


def test_a_report_against_another_method(model, tmp_path):
    study = study_of(model, tasks=[{"name": "maps:6", "count": 20}])
    store = Store(tmp_path / "run")
    fill(store, study, lambda method, budget, problem: method == "rkv")
    done = CliRunner().invoke(app, ["report", str(store.folder), "--baseline", "small window"])
    assert done.exit_code == 0, done.stderr
    assert "At budget 16, rkv is better than small window (+100.0" in done.stdout
    assert "Compared with small window; the study's own base line is rkv.**" in done.stdout
    done = CliRunner().invoke(app, ["report", str(store.folder), "--baseline", "full"])
    assert "the base line must have a budget" in done.stderr
    done = CliRunner().invoke(app, ["report", str(store.folder), "--baseline", "smal window"])
    assert done.exit_code == 2
    assert "unknown baseline among the study's methods 'smal window'. Did you mean 'small window'?" in done.stderr


def test_a_report_on_some_methods(model, tmp_path):
    variants = ["full", "rkv", {"name": "h2o, wide", "method": "h2o"}, "snapkv"]
    study = study_of(model, tasks=[{"name": "maps:6", "count": 20}], variants=variants, random_splits=1)
    store = Store(tmp_path / "run")
    fill(store, study, lambda method, budget, problem: method == "snapkv")
    some = CliRunner().invoke(app, ["report", str(store.folder), "--methods", "h2o, wide; snapkv"])
    assert some.exit_code == 0, some.stderr
    assert "At budget 16, snapkv is better than h2o, wide (+100.0" in some.stdout
    assert "Not reported, though the study has them: full; rkv; 1 random splits.**" in some.stdout
    assert "Compared with h2o, wide; the study's own base line is rkv.**" in some.stdout
    assert "| rkv |" not in some.stdout
    assert "among random splits" not in some.stdout
    wrong = CliRunner().invoke(app, ["report", str(store.folder), "--methods", "snapvk"])
    assert wrong.exit_code == 2
    assert "unknown method among the study's 'snapvk'. Did you mean 'snapkv'?" in wrong.stderr


def test_pictures_of_one_budget_and_their_legend():
    pytest.importorskip("matplotlib")

    from reasonalloc.evaluation.plots import draw_curves

    def drawn(*budgets):
        series = {name: [(budget, (50.0, 40.0, 60.0)) for budget in budgets] for name in ("rkv", "h2o")}
        return draw_curves(series, None, {64: [45.0, 55.0]}, "maps:6", "accuracy %", True)

    figure = drawn(64)
    (axes,), (legend,) = figure.axes, figure.legends
    figure.draw_without_rendering()
    width = axes.get_window_extent().width
    shown = [float(line.get_transform().transform((line.get_xdata()[0], 50.0))[0]) for line in axes.lines]
    middle = axes.get_window_extent().x0 + width / 2
    assert len(shown) >= 2
    assert max(abs(x - middle) for x in shown) < width / 10, "beside one another in the middle"
    labels = [" ".join(text.get_text().split()) for text in legend.get_texts()]
    assert "random splits of the same total, R-KV's scores" in labels
    low, high = drawn(64, 256).axes[0].get_xlim()
    assert 32 < low < 64
    assert 256 < high < 512


def test_reading_given_solutions(model, tmp_path):
    """Likelihoods in the store are teacher_force's own, with the full cache at divergence 0, and the sign is right."""
    from reasonalloc.engines.transformers.loading import load
    from reasonalloc.evaluation.fidelity import make_trace, teacher_force

    changes = {"tasks": [{"name": "maps:4", "fidelity": True, "count": 3}], "budgets": [16], "random_splits": 2}
    changes["batch"] = 2
    study = study_of(model, **changes, sampling={"temperature": 0, "max_new_tokens": 50})
    store = run_all(study, tmp_path / "run")
    network, tokenizer = load(model, "float32")
    plan = store.plan()
    sizes = {len({unit.question.id for unit in batch}): len(batch) for batch in plan}
    assert sizes.keys() == {1, 2}, "texts are read with every cache in one batch"
    assert sum(sizes.values()) == 3 * 5
    for batch in plan:
        for unit in batch:
            problem = TASKS.create("maps").problem(int(unit.question.id), 4)
            trace = make_trace(tokenizer, "", problem.question, f"{problem.thought} <answer> {problem.answer}", 50)
            expected = teacher_force(network, trace, unit.cell.compression)
            found = store.read(unit)
            assert found.nll == pytest.approx(expected.nll.tolist(), abs=1e-5)
            assert len(found.nll) == found.tokens == 50
            if unit.cell.budget is None:
                assert max(found.kl) < 1e-5
                assert all(found.agree)
    findings = collect(store, study, plan)
    cells = {cell.method: cell for cell in findings.cells}
    assert (cells["full"].values[KL] < cells["rkv"].values[KL]).all()
    assert cells["rkv"].values[NLL].shape == (3,)
    drawn = curves(findings, "fidelity:maps:4")
    lost = (cells["rkv"].values[NLL] - cells["full"].values[NLL]).mean()
    assert drawn["series"]["rkv"][0][1][0] == pytest.approx(lost), "drawn from the full cache's own likelihood"
    assert drawn["full"] == (0, 0, 0)
    chance = findings.of("fidelity:maps:4", control=True)
    assert len(chance) == 2
    assert drawn["control"][16] == pytest.approx([(c.values[NLL] - cells["full"].values[NLL]).mean() for c in chance])
    assert "| nll | kl | agreement % |" in markdown(findings)
    assert sentences(findings, "fidelity:maps:4")[0].startswith("Too few problems (3): nothing can be told.")


def test_lower_likelihoods_are_better(model, tmp_path):
    study = study_of(
        model, tasks=[{"name": "maps:4", "fidelity": True, "count": 12}], variants=["rkv", "h2o"], budgets=[16]
    )
    store = Store(tmp_path / "run")
    store.begin(study, "m", study.load_questions())
    plan = store.plan()
    for batch in plan:
        for unit in batch:
            nll = [1.0, 2.0] if unit.cell.method == "rkv" else [0.5, 2.0 + 0.01 * int(unit.question.id)]
            store.write(unit, Reading(nll, [0.1, 0.1], [True, False], 16.0, 10))
    findings = collect(store, study, plan)
    text = "\n".join(sentences(findings, "fidelity:maps:4"))
    assert "At budget 16, h2o is better than rkv (-0.2225 [" in text
    # Problems 0 to 11: means of 1.5 against 1.25 + 0.005 i, always lower and so better: p = 2 / 2**12.
    assert "better on 12 problems, worse on 0, sign test p = 0.00049)." in text
    assert "nats, corrected p = " in text
    assert "margin" not in text
    assert "inferior" not in text
    (line,) = csv.DictReader(comparisons_csv(findings).splitlines())
    assert {"wins": "12", "losses": "0", "verdict": "better", "margin": "", "inferiority": ""}.items() <= line.items()


def test_problems_without_a_readable_reference_are_left_out(model, tmp_path):
    pytest.importorskip("math_verify")
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{i}", "answer": a}) + "\n" for i, a in enumerate("12$")))
    study = study_of(model, tasks=[{"name": "own", "data": str(data)}], variants=["full", "rkv"], budgets=[16])
    store = Store(tmp_path / "run")
    store.begin(study, "m", study.load_questions())
    for batch in store.plan():
        for unit in batch:
            store.write(unit, Answer("It is \\boxed{1}." if unit.cell.budget else "It is", 5, True, 16.0, 10))
    findings = collect(store, study, store.plan())
    assert [cell.values[ACCURACY].tolist() for cell in findings.cells] == [[0, 0], [1, 0]]
    assert [cell.unreadable for cell in findings.cells] == [1, 0]
    assert "own: 1 problem(s) left out, whose reference answer cannot be read" in markdown(findings)


def test_grades_are_made_anew_by_another_grader(model, tmp_path, monkeypatch):
    study = study_of(model, tasks=[{"name": "maps:6", "count": 2}], variants=["full"])
    store = Store(tmp_path / "run")
    (unit, *_), *_ = fill(store, study, lambda *unit: True)
    assert store.grade(unit, store.read(unit)).correct
    (path,) = store.folder.glob(f"grades/*/{unit.key}.json")
    kept = json.loads(path.read_text())
    changed = {name: value for name, value in kept.items() if name != "checksum"} | {"score": 0.5}
    path.write_text(json.dumps(sealed(changed)))
    assert store.grade(unit, store.read(unit)).score == 0.5, "kept"
    for other in ({"grader": "older"}, {"answer": "another"}, {"score": "0.5"}, {"more": 1}):
        path.write_text(json.dumps(sealed({**changed, **other})))
        assert store.grade(unit, store.read(unit)).score == 1.0
        assert json.loads(path.read_text()) == kept
    path.write_text(json.dumps({**kept, "score": 0.5}))
    assert store.grade(unit, store.read(unit)).score == 1.0, "damaged"
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("reasonalloc.evaluation.store.grader", lambda name: lambda *texts: Grade(None, 0.0, fault="slow"))
        assert store.grade(unit, store.read(unit)).fault == "slow"
    assert not path.exists()
    assert store.grade(unit, store.read(unit)).score == 1.0, "judged at the next time"


def test_whether_the_two_levels_of_a_split_add_up(model, tmp_path):
    """Of ten problems R-KV solves 2, layers 2 more, heads 3 more, both 6: one more than their sum."""
    profile, pin = {"profile": str(DEMAND)}, {"prompt": "pin", "pin_share": 0.5}
    own = {"rkv": {}, "reasonalloc-layer": profile, "reasonalloc-head": {}, "reasonalloc": profile}
    variants = [{"name": name, "method": name, "changes": found} for name, found in own.items()]
    variants += [{"name": f"{name}, p", "method": name, "changes": {**found, **pin}} for name, found in own.items()]
    variants += [{"name": "other", "method": "reasonalloc", "changes": {**own["reasonalloc"], "window": 4}}]
    study = study_of(model, tasks=[{"name": "maps:6", "count": 10}], variants=variants, budgets=[24])
    solved = {"rkv": 2, "reasonalloc-layer": 4, "reasonalloc-head": 5, "reasonalloc": 8, "reasonalloc, p": 7}
    store = Store(tmp_path / "run")
    fill(store, study, lambda method, budget, at: at < solved.get(method, solved.get(method.removesuffix(", p"), 0)))
    findings = collect(store, study, store.plan())
    alone, pinned = findings.interactions("maps:6")
    assert (alone.both.method, pinned.both.method) == ("reasonalloc", "reasonalloc, p")
    assert [pinned.none.method, pinned.layers.method, pinned.heads.method] == [
        "rkv, p", "reasonalloc-layer, p", "reasonalloc-head, p",
    ]  # fmt: skip
    assert alone.beyond.mean == pytest.approx(0.1)
    assert pinned.beyond.mean == pytest.approx(0)
    assert pinned.adds_up
    assert "At budget 24, reasonalloc changes +10.0 [" in markdown(findings)
    some = replace(findings, cells=tuple(cell for cell in findings.cells if cell.method != "reasonalloc-head"))
    assert [found.both.method for found in some.interactions("maps:6")] == ["reasonalloc, p"]


def test_a_report_of_controls_alone(model, tmp_path):
    study = study_of(model, tasks=[{"name": "maps:6", "count": 2}], variants=["rkv"], budgets=[16], random_splits=2)
    store = Store(tmp_path / "run")
    store.begin(study, "m", study.load_questions())
    for batch in store.plan():
        for unit in batch:
            if unit.cell.method.startswith("random"):
                store.write(unit, Answer("", 1, True, 16.0, 10))
    findings = collect(store, study, store.plan(), partial=True)
    assert findings.tasks() == []
    assert "INCOMPLETE: 2 answers" in markdown(findings)
    done = CliRunner().invoke(app, ["report", str(store.folder), "--partial"])
    assert done.exit_code == 2
    assert "no problem yet that can be judged for all methods" in " ".join(done.stderr.split())


def test_texts_from_a_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"question": "a", "solution": "one two"}\n{"question": "b", "solution": "one two three"}\n')
    assert [q.reference for q in load_texts("mine", path, least_words=3).questions] == ["one two three"]
    with pytest.raises(ValueError, match="no field 'proof'"):
        load_texts("mine", path, text_field="proof")
    with pytest.raises(ValueError, match="fidelity:mine has no questions"):
        load_texts("mine", path, least_words=9)
    path.write_text('{"question": "a", "solution": ["one", "two"]}\n')
    with pytest.raises(ValueError, match="line 1: field 'solution' must be a text or a number, got"):
        load_texts("mine", path)


def test_questions_drawn_at_random_follow_from_the_seed_alone(tmp_path):
    rows = [{"id": i, "question": f"q{i}", "answer": str(i)} for i in range(40)]
    ids = {}
    for name, order in (("forward", rows), ("backward", rows[::-1])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in order))
        for seed in (None, 0, 1):
            source = TaskSource("mine", str(path), count=10, shuffle_seed=seed)
            ids[name, seed] = [question.id for question in source.load().questions]
    assert ids["forward", None] == [str(i) for i in range(10)] != ids["backward", None]
    assert ids["forward", 0] == ids["backward", 0] != ids["forward", 1]
    assert len(set(ids["forward", 0])) == 10
    texts = TaskSource("mine", str(path), answer_field="question", fidelity=True, count=10, shuffle_seed=0)
    assert [question.id for question in texts.load().questions] == ids["forward", 0]
    with pytest.raises(ValueError, match="maps:6 makes its own questions at random: remove shuffle_seed 3"):
        TaskSource("maps:6", shuffle_seed=3)


def test_progress_counts_what_the_folder_holds(model, tmp_path):
    """Two batches were there before, one of them half: of 7 answers 4 are done, and 3 in this session."""
    study = study_of(
        model, tasks=[{"name": "maps:6", "count": 7}], variants=["rkv"], budgets=[16], batch=4, random_splits=0
    )  # fmt: skip
    store = Store(tmp_path / "run")
    plan = fill(store, study, lambda method, budget, problem: problem % 2 == 0)
    assert [len(batch) for batch in plan] == [4, 3]
    before, now = plan
    answers = [store.read(unit) for unit in now]
    drop(store, plan, ("rkv", 16, int(now[0].question.id)))
    seconds = [0.0]
    watch = eval_command._Watch(store, plan, clock=lambda: seconds[0])

    def share(units):
        return sum(int(unit.question.id) % 2 == 0 for unit in units) / len(units)

    with watch as shown:
        assert (shown.progress.done, shown.progress.total) == (4, 7)
        assert shown._said() == f"right so far: rkv {share(before):.0%}"
        store.write(now[0], answers[0])
        seconds[0] = 10.0
        shown.done(now, answers, 1.0)
        assert shown.progress.done == 7
        assert shown._said() == f"30 tokens/s in this session; right so far: rkv {share([*before, *now]):.0%}"
    assert len(list(store.folder.glob("grades/*/*.json"))) == 7, "graded once, for the report, too"


def test_the_commands(model, tmp_path):
    runner = CliRunner()
    base = ["eval", "-o", str(tmp_path / "run"), "-m", model, "--task", "maps:6", "--count", "3", "--samples", "1"]
    base += ["--temperature", "0", "--max-new-tokens", "30", "--dtype", "float32"]
    done = runner.invoke(app, [*base, "--methods", "full,rkv", "--budgets", "16,24", "--interval", "8"])
    assert done.exit_code == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("answers: ")]
    assert lines[0] == "answers: 0 of 9 done"
    assert lines[-1].startswith("answers: 9 of 9 done; ")
    assert "tokens/s in this session; right so far: " in lines[-1]
    done = runner.invoke(app, ["report", str(tmp_path / "run"), "--metric", "score", "--margin", "3"])
    assert done.exit_code == 0, done.stderr
    assert "by more than 3 points" in done.stdout
    default = next(o.default for o in get_command(app).commands["report"].params if o.name == "margin")
    assert default == MARGIN
    assert "Too few problems (3): nothing can be told. With 7 problems a method" in done.stdout
    assert "cannot be told from" not in done.stdout
    assert (tmp_path / "run" / "report" / "report.html").exists()
    for arguments, message in (
        ([*base, "--methods", "full,rkv", "--budgets", "16"], "another study (different: budgets"),
        ([*base, "--budgets", "16;24"], "--budgets takes whole numbers"),
        (
            ["eval", "-o", str(tmp_path / "run"), "--resume", "--budgets", "64", "--seed", "0"],
            "--budgets, --seed would have",
        ),
        ([*base, "--fidelity", "math500", "--data", "x.jsonl"], "--data is one set of questions"),
        ([*base[:1], "-o", str(tmp_path / "new"), *base[3:], "--data", "x.jsonl"], "maps:6 makes its own questions"),
        ([*base, "--shard", "0/2", "--ray-workers", "2"], "choose one"),
        ([*base[:-2], "--methods", "rvk"], "Did you mean 'rkv'"),
        (["eval", "-o", str(tmp_path / "run"), "--resume", "--shard", "2/2"], "shards are numbered"),
        ([*base, "--methods", "full", "--shard", "x"], "--shard is i/n"),
        (["eval", "-o", str(tmp_path / "other")], "name a --model and at least one --task or --fidelity"),
        (["eval", "-o", str(tmp_path / "other"), "--resume"], "holds no study"),
        (["report", str(tmp_path / "other")], "holds no study"),
        (["report", str(tmp_path / "run"), "--metric", "luck"], "accuracy or score"),
        (["report", str(tmp_path / "run"), "--margin", "nan"], "the margin is 0 to 100 points, got nan"),
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 2, done.stdout
        assert message in done.stderr.replace("\n", " ")


def test_texts_side_by_side_are_few_and_not_too_long(model, monkeypatch):
    study = study_of(model, tasks=[{"name": "maps:4", "fidelity": True, "count": 20}], batch=16)
    texts = study.load_questions()[0]
    sizes = [len(group) for group in study._together(texts)]
    assert sizes == [8, 8, 4]
    assert set.union(*study._together(texts)) == {text.id for text in texts.questions}
    monkeypatch.setattr("reasonalloc.evaluation.study.READ_LENGTH", 150)
    assert [len(group) for group in study._together(texts)] == [2] * 10  # of 60 tokens each, at most


def test_an_interrupted_batch_of_texts_goes_on_where_it_was(model, tmp_path, monkeypatch):
    """What a cache has read is kept at once; only the rest is read later."""
    from reasonalloc.evaluation import fidelity

    study = study_of(model, tasks=[{"name": "maps:4", "fidelity": True, "count": 3}], budgets=[16])
    whole, read = fidelity.read_together, []

    def counted(network, traces, compression, *more, **options):
        read.append(compression.budget)
        if len(read) == 3:
            raise KeyboardInterrupt
        return whole(network, traces, compression, *more, **options)

    monkeypatch.setattr(fidelity, "read_together", counted)
    with pytest.raises(KeyboardInterrupt):
        run_all(study, tmp_path / "run")
    store = Store(tmp_path / "run")
    assert len(store.results()) == 2 * 3  # full and rkv
    watch = eval_command._Watch(store, store.plan())
    assert (watch.progress.done, watch.progress.total) == (6, 9)
    read.clear()
    run_all(study, tmp_path / "run")
    assert read == [None, 16]  # the full cache for comparison, and the small window
    assert len(Store(tmp_path / "run").results()) == 3 * 3
