"""The command line, on a tiny model saved to disk."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from reference import tiny_model, word_tokenizer
from rich.console import Console
from transformers import MistralConfig, MistralForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc.calibration.settings import MISS_BUDGETS
from reasonalloc.cli.app import app
from reasonalloc.cli.console import Progress, clear_errors, duration
from reasonalloc.cli.options import whole_numbers

PROMPT = " ".join(f"w{i}" for i in range(5, 60))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def commands(group=None, *path):
    """The words of every command and of every group."""
    group = group or get_command(app)
    for name, command in group.commands.items():
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)


def save(folder, model):
    word_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), tiny_model())


@pytest.mark.parametrize("method", ["full", "rkv", "reasonalloc"])
def test_generate_writes_text_record_and_statistics(model_folder, tmp_path, method):
    record, stats = tmp_path / "routing.json", tmp_path / "stats.json"
    result = run(
        "generate", "-m", model_folder, "-p", PROMPT, "-b", 24, "--interval", 16, "--method", method,
        "--max-new-tokens", 60, "--stats", stats, *(["--record", record] if method != "full" else []),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) >= 60
    found = json.loads(stats.read_text())
    assert found["seen"] == 55 + 59
    assert (found["evicted"] > 0) == (method != "full")
    if method == "reasonalloc":
        picture = tmp_path / "budgets.png"
        drawn = run("plot", "budgets", record, "-o", picture)
        assert drawn.exit_code == 0, drawn.output
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert len(ra.Recorder.load(record).arrays()["step"]) >= 3


def test_generate_is_greedy_and_repeatable_and_streams(model_folder):
    options = ("generate", "-m", model_folder, "-p", PROMPT, "-b", 24, "--interval", 16, "--max-new-tokens", 40)
    plain, again, streamed = run(*options), run(*options), run(*options, "--stream")
    assert plain.stdout == again.stdout
    assert plain.stdout.split() == streamed.stdout.split()
    sampled = [run(*options, "--temperature", 1, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_equals_the_library(model_folder):
    result = run("generate", "-m", model_folder, "-p", PROMPT, "-b", 24, "--interval", 16, "--max-new-tokens", 40)
    model = tiny_model()
    cache = ra.Cache(model.config, ra.Compression(budget=24, interval=16))
    ids = torch.arange(5, 60)[None]
    out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=40)[0, 55:]
    assert result.stdout.split() == [f"w{i}" if i > 1 else i for i in out.tolist() if i > 1]


def test_help_needs_neither_torch_nor_transformers():
    every = [(), *commands()]
    assert ("eval",) in every
    assert ("profile", "show") in every
    code = f"""
import sys
from typer.testing import CliRunner
from reasonalloc.cli import app
for words in {every}:
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0 and "Usage" in done.stdout, words
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rich" in done.stdout.split()
    assert not {"torch", "numpy", "scipy", "transformers", "matplotlib"} & set(done.stdout.split())


def test_every_command_has_a_file_of_its_name():
    files = {path.stem for path in Path(ra.__file__).with_name("cli").glob("*.py")}
    assert files == {words[0] for words in commands()} | {"__init__", "app", "console", "options"}


def test_calibrate_offers_the_budgets_of_the_library():
    options = get_command(app).commands["calibrate"].params
    default = next(option.default for option in options if option.name == "miss_budgets")
    assert tuple(whole_numbers(default, "--miss-budgets")) == MISS_BUDGETS


def test_methods_lists_every_method():
    result = run("methods")
    assert all(name in result.stdout for name in ("full", "rkv", "pyramid-rkv", "reasonalloc", "tova"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-b", "-5"), "budget must be a whole number of tokens, at least 1, got -5"),
        (("-b", "8"), "leaves nothing beside the window"),
        ((), "needs a budget"),
        (("-b", "64", "--method", "rvk"), "unknown method 'rvk'. Did you mean 'rkv'?"),
        (("-b", "64", "--profile", "missing.json"), "no demand profile at missing.json"),
        (("-b", "64", "--record", "routing.txt"), "saved as .json or .npz, got 'routing.txt'"),
        (("-b", "64", "--dtype", "int4"), "unknown dtype 'int4'"),
        (("-b", "64", "--interval", "0"), "interval must be a whole number of tokens, at least 1, got 0"),
    ],
)
def test_wrong_options_end_in_one_sentence(model_folder, arguments, message):
    result = run("generate", "-m", model_folder, "-p", PROMPT, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no-such-folder", "no model folder at no-such-folder"),
        ("/no/such/model.gguf", "no GGUF file at /no/such/model.gguf"),
        ("nobody/no-such-model", "cannot load 'nobody/no-such-model'"),
    ],
)
def test_missing_models(model, message):
    result = run("generate", "-m", model, "-p", "hello", "-b", 64)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_sliding_window_model_and_empty_prompt(tmp_path, model_folder):
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=64,
    )  # fmt: skip
    folder = save(tmp_path / "sliding", MistralForCausalLM(config))
    result = run("generate", "-m", folder, "-p", PROMPT, "-b", 24)
    assert result.exit_code == 2
    assert "slides over a window of 64 tokens" in " ".join(result.stderr.split())
    assert "the prompt is empty" in run("generate", "-m", model_folder, "-p", "  ", "-b", 24).stderr


def lines_of(steps, **settings):
    """What is printed without a terminal, when so many are done at such times: (seconds, how many)."""
    seconds, out = [0.0], io.StringIO()
    console = Console(file=out, width=40)
    with Progress("answers", 20, clock=lambda: seconds[0], to=console, **settings) as progress:
        for at, count in steps:
            seconds[0] = at
            progress.advance(count)
    return out.getvalue().splitlines()


def test_progress_without_a_terminal_is_a_line_a_minute():
    """Time left is at the pace of this session: 2 answers in 60 s leave 14 for 420 s."""
    assert lines_of([(30, 1), (60, 1), (90, 2), (119, 2), (121, 2), (400, 8)], done=4, said=lambda: "all well [b]") == [
        "answers: 4 of 20 done; all well [b]",
        "answers: 6 of 20 done; 7 min left; all well [b]",
        "answers: 12 of 20 done; 2 min left; all well [b]",
        "answers: 20 of 20 done; all well [b]",
    ]
    assert lines_of([]) == ["answers: 0 of 20 done"], "nothing new at the end"
    assert lines_of([(1, 20)], hidden=True) == []


def test_progress_of_work_that_fails_says_how_far_it_came():
    out = io.StringIO()
    progress = Progress("answers", 20, clock=lambda: 0.0, to=Console(file=out))

    def work():
        with progress:
            progress.advance(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert out.getvalue().splitlines()[-1].startswith("answers: 5 of 20 done")


def test_progress_on_a_terminal_is_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with Progress("answers", 20, done=4, said=lambda: "all well", clock=lambda: 0.0, to=console) as progress:
        progress.advance(16)
    assert "20/20" in out.getvalue()
    assert "all well" in out.getvalue()
    assert "answers: " not in out.getvalue()


def test_durations():
    assert [duration(x) for x in (0, 42.4, 60, 719, 3570, 12_000)] == [
        "0 s", "42 s", "1 min", "12 min", "1 h 0 min", "3 h 20 min",
    ]  # fmt: skip


def test_errors_are_printed_as_they_are(capsys):
    with pytest.raises(typer.Exit), clear_errors():
        raise ImportError("pip install 'reasonalloc[plot]'")
    assert capsys.readouterr().err == "error: pip install 'reasonalloc[plot]'\n"
