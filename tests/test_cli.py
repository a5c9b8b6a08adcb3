"""The command line, on a tiny model saved to disk."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import typer
from reference import tiny_model, tiny_profile, word_tokenizer
from rich.console import Console
from transformers import MistralConfig, MistralForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc.calibration.settings import MISS_BUDGETS
from reasonalloc.cli.app import app
from reasonalloc.cli.console import Calibrating, Phases, Progress, clear_errors, duration
from reasonalloc.cli.eval import _Watch
from reasonalloc.cli.options import whole_numbers
from reasonalloc.engines.transformers.loading import load
from reasonalloc.evaluation.executors import fingerprint
from reasonalloc.evaluation.store import Store
from reasonalloc.evaluation.study import Study

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
        "generate", "-m", model_folder, "-p", PROMPT, "--interval", 16, "--method", method, "--max-new-tokens", 60,
        "--stats", stats, *(["-b", 24, "--record", record] if method != "full" else []),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) >= 60
    found = json.loads(stats.read_text())
    assert found["seen"] == 55 + 59
    assert (found["evicted"] > 0) == (method != "full")
    assert found["full_bytes"] == (55 + 59) * 3 * 3 * 2 * 16 * 4, "layers, heads, keys and values, channels, float32"
    told = said(result)
    assert "; stopped at --max-new-tokens 60" in told
    if method == "full":
        assert found["kv_bytes"] > found["full_bytes"]
        assert "keys and values 128.2 KiB for 114 tokens (" in told
        assert "scorer" not in told
    else:
        assert "budget 24 (+ up to 16 between rounds), in which the prompt's 55 tokens compete" in told
        assert f"a full cache of this text takes 128.2 KiB ({found['kv_bytes'] / found['full_bytes']:.0%})" in told
    assert all(len(line) <= 80 for line in result.stderr.splitlines()[-5:]), result.stderr
    if method == "reasonalloc":
        picture = tmp_path / "budgets.png"
        drawn = run("plot", "budgets", record, "-o", picture)
        assert drawn.exit_code == 0, drawn.output
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert len(ra.Recorder.load(record).arrays()["step"]) >= 3


def test_generate_says_where_the_prompt_is_kept(model_folder):
    ask = ("generate", "-m", model_folder, "-p", PROMPT, "-b", 40, "--method", "rkv", "--max-new-tokens", 9)
    assert "between rounds) beside the prompt's 55 tokens" in said(run(*ask, "--protect-prompt"))
    assert "between rounds), 30 of them for the prompt's 55 tokens" in said(run(*ask, "--pin-prompt"))
    assert "4,096 positions and the longest prompt 55 tokens" not in said(run(*ask))
    few = said(run(*ask[:-4], "--method", "rkv", "--max-new-tokens", 9, "-p", "w5 w6"))
    assert "; nothing was evicted" in few


def test_generate_is_greedy_and_repeatable_and_streams(model_folder):
    options = ("generate", "-m", model_folder, "-p", PROMPT, "-b", 24, "--interval", 16, "--max-new-tokens", 40)
    plain, again, streamed = run(*options), run(*options), run(*options, "--stream")
    assert plain.stdout == again.stdout
    assert plain.stdout.split() == streamed.stdout.split()
    sampled = [run(*options, "--temperature", 1, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_models_that_were_saved_without_use_of_a_cache_are_served(model_folder, tmp_path):
    """Training sets use_cache=False, and many are published so. What needs the cache asks for it."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_cache": False}))
    options = ("-p", PROMPT, "-b", 24, "--interval", 16, "--max-new-tokens", 20)
    found, wanted = (run("generate", "-m", each, *options) for each in (folder, model_folder))
    assert found.exit_code == 0, found.output
    assert found.stdout == wanted.stdout
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"id": "1", "question": "w5 w6", "answer": "w7"}) + "\n")
    done = run(
        "eval", "-m", folder, "--task", "mine", "--data", questions, "--methods", "rkv", "--budgets", 24,
        "--samples", 1, "--max-new-tokens", 20, "-o", tmp_path / "results",
    )  # fmt: skip
    assert done.exit_code == 0, done.output


def test_generate_equals_the_library(model_folder):
    result = run("generate", "-m", model_folder, "-p", PROMPT, "-b", 24, "--interval", 16, "--max-new-tokens", 40)
    model = tiny_model()
    cache = ra.Cache(model.config, ra.Compression(budget=24, interval=16))
    ids = torch.arange(5, 60)[None]
    out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=40)[0, 55:]
    assert result.stdout.split() == [f"w{i}" if i > 1 else i for i in out.tolist() if i > 1]


def test_what_must_be_there_at_once_needs_neither_torch_nor_transformers():
    every = [(*words, "--help") for words in [(), *commands()]] + [("--version",), ("methods",)]
    assert ("eval", "--help") in every
    assert ("profile", "show", "--help") in every
    code = f"""
import sys
from typer.testing import CliRunner
from reasonalloc.cli import app
for words in {every}:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and done.stdout, words
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rich" in done.stdout.split()
    assert not {"torch", "numpy", "scipy", "transformers", "matplotlib"} & set(done.stdout.split())


def test_every_command_has_a_file_of_its_name():
    files = {path.stem for path in Path(ra.__file__).with_name("cli").glob("*.py")}
    assert files == {words[0].replace("-", "_") for words in commands()} | {"__init__", "app", "console", "options"}


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
        (("-b", "64", "--device", "gpu"), "device 'gpu' cannot be used here, ask for cpu or auto"),
        (("-b", "64", "--device", "meta"), "device 'meta' cannot be used here"),
        (("-b", "64", "--device", "cuda:99"), "device 'cuda:99' cannot be used here"),
        (("-b", "64", "--method", "full"), "method 'full' keeps every token and takes no budget, got 64"),
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
        ("no such model", "the model hub shows you no model of this name"),
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


# ---- nothing that is printed is markup ----


@pytest.fixture(scope="module")
def bracketed(tmp_path_factory):
    """A folder with brackets in its name, and in it a model, a profile, a study's results and a record."""
    folder = tmp_path_factory.mktemp("brackets") / "a [bold]b[/x] :smile: [/]"
    folder.mkdir(parents=True)
    save(folder / "model", tiny_model())
    lines = [json.dumps({"prompt": " ".join(f"w{i + j}" for j in range(40))}) for i in (5, 6)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def said(result, status=0):
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join((result.stdout + result.stderr).split())


def test_every_command_prints_names_as_they_are(bracketed):
    model, wave = bracketed / "model", bracketed / "wave.json"
    name = " ".join(str(bracketed).split())
    measured = run(
        "calibrate", "-m", model, "-o", wave, "--prompts", bracketed / "questions.jsonl", "--max-new-tokens", 80,
        "--name", "my [bold]model[/x]", "--sensitivity",
    )  # fmt: skip
    assert f"wrote {name}/wave.json" in said(measured)
    assert "my [bold]model[/x]: 2 prompts" in said(measured)
    assert "prompts: 0 of 2 done" in said(measured)
    for command in ("show", "study"):
        assert f"wrote {name}/{command}.png" in said(
            run("profile", command, wave, "--budget", 24, "--plot", bracketed / f"{command}.png")
        )
    assert "[bold]b" in said(run("profile", "compare", wave, bracketed / "missing[/x].json"), 2)
    other = bracketed / "[bold]other[x].json"
    other.write_bytes(wave.read_bytes())
    assert "[bold]other[x]" in said(run("profile", "compare", wave, other))
    assert f"{name}/[bold]other[x].json" in said(run("profile", "merge", wave, other, "-o", bracketed / "m.json"), 2)
    assert f"wrote {name}/m.json" in said(run("profile", "merge", wave, "-o", bracketed / "m.json"))

    record = bracketed / "routing.json"
    answered = run("generate", "-m", model, "-p", PROMPT, "-b", 24, "--interval", 16, "--max-new-tokens", 40,
                   "--record", record)  # fmt: skip
    assert "tokens/s" in said(answered)
    assert f"wrote {name}/b.png" in said(run("plot", "budgets", record, "-o", bracketed / "b.png"))
    assert f"wrote 8 problems to {name}/maps.jsonl" in said(run("problems", "maps:6", "-o", bracketed / "maps.jsonl"))
    results = bracketed / "results"
    asked = run(
        "eval", "-m", model, "-o", results, "--task", "maps:6", "--count", 2, "--methods", "full,rkv", "--budgets", 24,
        "--samples", 1, "--max-new-tokens", 24, "--window", 4,
    )  # fmt: skip
    assert f"{name}/results: done." in said(asked)
    assert "4 answers: 2 questions x 1 sample x 2 caches, of at most 24 tokens each" in said(asked)
    assert "positions" not in said(asked)
    assert json.loads((results / "study.json").read_text())["common"]["window"] == 4
    assert f"{name}/results/report/report.html" in said(run("report", results))
    assert "unknown method '[/x][bold]rkv'" in said(run("eval", "-m", model, "-o", bracketed / "r2", "--task", "maps:6",
                                                        "--methods", "[/x][bold]rkv"), 2)  # fmt: skip
    for command in (("generate", "-p", "x", "-b", 24), ("calibrate", "-o", bracketed / "x.json")):
        assert f"no model folder at {name}/[red]none[/]" in said(run(*command, "-m", bracketed / "[red]none[/]"), 2)
    for command in (("report",), ("plot", "budgets"), ("profile", "show"), ("eval", "--resume", "-o")):
        assert "none[/x]" in said(run(*command, bracketed / "none[/x]"), 2)
    file = bracketed / "file[/x]"
    file.parent.mkdir()
    file.touch()
    for command in (("problems", "maps:6", "-o", file / "p.jsonl"), ("demo", "-b", 3, "-o", file)):
        said(run(*command), 2)
    said(run("problems", "[/x][bold]:6", "-o", bracketed / "p.jsonl"), 2)


# ---- how errors end ----


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PermissionError(13, "Permission denied", "/x[/x]"), 2, "[Errno 13] Permission denied: '/x[/x]'"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB.\nmore"), 2, "out of memory: CUDA out of memory. Tri"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "out of memory: [enforce fail]"),
        (MemoryError(), 2, "out of memory"),
        (KeyError("layers[/x]"), 1, "KeyError: 'layers[/x]'. This is a bug of reasonalloc: please report it"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two. This is a bug of reasonalloc"),
    ],
)
def test_every_error_is_one_sentence(capsys, error, status, message):
    with pytest.raises(typer.Exit) as caught, clear_errors():
        raise error
    printed = capsys.readouterr().err
    assert caught.value.exit_code == status
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_debug_shows_the_traceback(model_folder):
    wrong = ("generate", "-m", model_folder, "-p", PROMPT, "-b", 64, "--dtype", "int4")
    assert "Traceback" not in run(*wrong).stderr
    shown = run("--debug", *wrong)
    assert shown.exit_code == 2
    assert shown.stderr.startswith("Traceback")
    assert shown.stderr.rstrip().splitlines()[-1].startswith("error: unknown dtype 'int4'")


def broken_models(folder, model_folder):
    """Folders and files that are no models, each with what must be said."""
    for name in ("unknown", "json", "cut", "tokenizer", "lacking"):
        shutil.copytree(model_folder, folder / name)
    config = json.loads((model_folder / "config.json").read_text())
    (folder / "unknown" / "config.json").write_text(json.dumps({**config, "model_type": "nobody[/x]"}))
    (folder / "json" / "config.json").write_text("{")
    weights = (model_folder / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "tokenizer" / "tokenizer.json").write_text('{"version": 3')
    state = tiny_model().state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, folder / "lacking" / "model.safetensors",
                                metadata={"format": "pt"})  # fmt: skip
    (folder / "empty.gguf").touch()
    (folder / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    return {
        "unknown": "nobody[/x]",
        "json": "config.json",
        "cut": "cannot load",
        "tokenizer": "cannot load",
        "lacking": "1 of its weights are not there, the first of them 'model.layers.1.mlp.up_proj.weight'",
        "empty.gguf": "cannot load",
        "short.gguf": "is it whole",
        "cut/model.safetensors": "is no model",
    }


def test_broken_models_are_refused_in_one_sentence(tmp_path, model_folder, monkeypatch):
    monkeypatch.setenv("REASONALLOC_CACHE", str(tmp_path / "cache"))
    for name, message in broken_models(tmp_path, model_folder).items():
        result = run("generate", "-m", tmp_path / name, "-p", PROMPT, "-b", 24, "--max-new-tokens", 2)
        printed = said(result, 2)
        assert message in printed, name
        assert name in printed
        assert result.stderr.count("\n") == 1, result.stderr


def test_a_mistyped_hub_id_is_asked_for_once(monkeypatch):
    asked = []

    def model_info(api, name, **options):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    result = run("generate", "-m", "nobody/no-such-model", "-p", "hello", "-b", 64)
    assert "the model hub cannot be reached (no network)" in said(result, 2)
    assert asked == ["nobody/no-such-model"]


# ---- GGUF ----


def tiny_gguf(path, seed=0):
    """A Llama of two layers with random weights and a byte-pair vocabulary."""
    gguf = pytest.importorskip("gguf")
    rng, words = np.random.default_rng(seed), [chr(256 + i) for i in range(59)]
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 64, "head_count": 2,
        "head_count_kv": 1, "vocab_size": 64,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", *words])
    writer.add_token_types([3, 3, *[1] * 62])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (64, 32), "output_norm": (32,), "output": (64, 32)}
    for i in range(2):
        block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
                 "attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}  # fmt: skip
        shapes.update({f"blk.{i}.{name}": shape for name, shape in block.items()})
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("REASONALLOC_CACHE", str(tmp_path / "cache"))
    path, calls, lines = tiny_gguf(tmp_path / "tiny.gguf"), [], []

    def loaded(**options):
        del calls[:], lines[:]
        return load(str(path), device="cpu", progress=lambda *x: calls.append(x), say=lines.append, **options)

    first, tokenizer = loaded()
    assert calls[-1] == (21, 21)
    (kept,) = (tmp_path / "cache" / "converted").iterdir()
    assert str(kept) in lines[0]
    assert "MB in" in lines[0]
    again, other = loaded()
    assert (calls, lines) == ([], [])
    assert fingerprint(first, tokenizer) == fingerprint(again, other)
    assert first.config.name_or_path == again.config.name_or_path == str(path)
    assert tokenizer("ab a") == other("ab a")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))

    assert loaded(dtype="bfloat16")[0].dtype == torch.bfloat16
    assert calls, "weights of another type are kept by themselves"
    (kept / "model.safetensors").write_bytes(b"cut off")
    assert fingerprint(*loaded()) == fingerprint(first, tokenizer)
    assert "cannot be read" in lines[0]
    before = path.stat()
    tiny_gguf(path, seed=1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert fingerprint(*loaded()) != fingerprint(first, tokenizer), "another content is another model"
    assert not list((tmp_path / "cache" / "converted").glob(".*"))


def test_a_gguf_file_is_loaded_though_nothing_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("REASONALLOC_CACHE", str(tmp_path / "cache"))
    lines = []
    load(str(tiny_gguf(tmp_path / "tiny.gguf")), device="cpu", say=lines.append)
    assert "could not be kept" in lines[0]


def test_loading_a_gguf_file_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("REASONALLOC_CACHE", str(tmp_path / "cache"))
    path = tiny_gguf(tmp_path / "tiny.gguf")
    command = ("generate", "-m", path, "-p", "ab", "--raw", "--method", "full", "--max-new-tokens", 2)
    first, again = run(*command), run(*command)
    assert "converted tensors: 0 of 21 done" in said(first)
    assert "de-quantizing" not in first.stderr
    assert "converted" not in said(again)
    assert first.stdout == again.stdout


# ---- help, and what stands before the command ----


@pytest.mark.parametrize("words", [(), *commands()], ids=" ".join)
def test_help_at_80_columns_has_every_name_in_full(words):
    command = get_command(app)
    for word in words:
        command = command.commands[word]
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).stdout
    assert max(map(len, shown.splitlines())) <= 80
    names = {name for option in command.params for name in (*option.opts, *option.secondary_opts) if name[0] == "-"}
    assert names <= set(shown.replace(",", " ").split())
    assert "…" not in shown
    assert not set("│╭╰") & set(shown)
    _, _, listed = shown.partition("Commands:\n")
    assert not [line for line in listed.splitlines() if line.endswith("...")], "the first sentence is too long"
    assert [option.name for option in command.params if option.help is None] == []


def test_methods_at_80_columns():
    lines = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "80"}).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "    ReasonAlloc: layers by demand, heads by threshold" in lines
    assert [line.split() for line in lines if line.startswith("reasonalloc ")] == [
        ["reasonalloc", "rkv", "wave/dynamic", "threshold"]
    ]


def test_a_terminal_that_lacks_letters(tmp_path):
    (tmp_path / "wave.json").write_bytes(tiny_profile().to_json())
    command = [sys.executable, "-m", "reasonalloc", "profile", "show", tmp_path / "wave.json", "--budget", "24"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"? s.e." in done.stdout


def test_version():
    assert run("--version").stdout == f"reasonalloc {ra.__version__}\n"


def test_completion():
    variables = {"_REASONALLOC_COMPLETE": "complete_bash", "COMP_WORDS": "reasonalloc gen", "COMP_CWORD": "1"}
    found = CliRunner().invoke(app, [], prog_name="reasonalloc", env=variables)
    assert found.stdout.split() == ["generate"]


def test_quiet_leaves_the_answer_and_errors(model_folder, tmp_path):
    command = ("generate", "-m", model_folder, "-p", PROMPT, "-b", 24, "--max-new-tokens", 4)
    assert run("--quiet", *command).stderr == ""
    assert run("--quiet", *command).stdout == run(*command).stdout != ""
    assert "error: unknown dtype" in run("--quiet", *command, "--dtype", "int4").stderr
    made = run("--quiet", "problems", "maps:6", "-o", tmp_path / "maps.jsonl")
    assert (made.stdout, made.stderr) == ("", "")


def test_a_smaller_window_can_be_asked_for(model_folder):
    command = ("generate", "-m", model_folder, "-p", PROMPT, "-b", 8, "--interval", 8, "--max-new-tokens", 16)
    assert "or pass a smaller window" in said(run(*command), 2)
    said(run(*command, "--window", 2))


def test_answers_beyond_the_model_s_positions_are_told_of(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("reasonalloc.evaluation.executors.run_local", lambda *args: None)
    ask = ("eval", "-m", model_folder, "--task", "maps:6", "--count", 2, "--methods", "full,rkv", "--budgets", "24,32")
    told = said(run(*ask, "-o", tmp_path / "far"))
    assert "48 answers: 2 questions x 8 samples x 3 caches, of at most 32,768 tokens each" in told
    room = int(told.partition("--max-new-tokens ")[2].partition(")")[0])
    assert f"the model has 4,096 positions and the longest prompt {4096 - room} tokens" in told
    assert "positions" not in said(run(*ask, "-o", tmp_path / "near", "--max-new-tokens", room))
    assert "positions" in said(run(*ask, "-o", tmp_path / "one", "--max-new-tokens", room + 1))


def test_a_wrong_field_is_called_by_its_option(bracketed):
    questions = ("--prompts", bracketed / "questions.jsonl", "--field", "question")
    assert "(--field)" in said(run("calibrate", "-m", bracketed / "model", "-o", bracketed / "f.json", *questions), 2)


# ---- time left ----


def test_time_left_of_phases_is_each_at_its_own_pace():
    seconds = [0.0]
    phases = Phases(lambda: seconds[0])
    for name, total in (("writing", 800), ("sensitivity", 40)):
        phases.report(name, 0, total)
    seconds[0] = 5
    phases.report("writing", 1, 800)
    assert phases.left() == "", "the first token takes longer"
    seconds[0] = 10
    phases.report("writing", 200, 800)
    assert phases.left() == "30 s left for writing, and sensitivity beyond that"
    seconds[0] = 70
    phases.report("sensitivity", 2, 40)
    assert phases.left() == f"{duration(30 + 38 * 30)} left" == "20 min left"
    assert phases.said() == "sensitivity 5% done"
    seconds[0] = 310
    phases.report("sensitivity", 10, 40)
    assert phases.left() == "16 min left"


def test_what_was_done_before_does_not_count_for_the_pace():
    seconds = [0.0]
    phases = Phases(lambda: seconds[0])
    phases.report("writing", 700, 800)
    seconds[0] = 10
    phases.report("writing", 710, 800)
    assert phases.left() == "2 min left"


def test_calibrating_shows_prompts_and_the_phase_at_work(capsys):
    with Calibrating() as shown:
        for what, done, total in (("writing", 0, 80), ("prompts", 0, 4), ("writing", 40, 80), ("prompts", 4, 4)):
            shown.report(what, done, total)
    assert capsys.readouterr().err.splitlines() == [
        "prompts: 0 of 4 done", "prompts: 4 of 4 done; writing 50% done",
    ]  # fmt: skip


def test_before_the_first_batch_ends_a_bound_is_said(bracketed):
    seconds = [0.0]
    study = Study.from_dict({
        "model": "m", "tasks": [{"name": "maps:6", "count": 4}], "variants": ["rkv"], "budgets": [24], "samples": 1,
        "sampling": {"temperature": 0.0, "max_new_tokens": 100}, "batch": 2,
    })  # fmt: skip
    store = Store(bracketed / "bound")
    store.begin(study, "model", study.load_questions(), None)
    watch = _Watch(store, store.plan(), hidden=False, clock=lambda: seconds[0])
    with watch:
        seconds[0] = 10
        watch.written(20)
        assert watch._left() == "at most 3 min left at this pace", "380 tokens, two a second"
        assert "2 tokens/s" in watch._said()
