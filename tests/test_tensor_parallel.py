"""Two processes share a model by transformers' own tensor parallelism (gloo, on the CPU)."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_reasoner import SMALL
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import reasonalloc as ra
from reasonalloc.reasoner.train import Trainer, TrainingConfig

BUDGET, INTERVAL, NEW = 14, 4, 40
RANK = """
import json, sys, torch, transformers
import reasonalloc as ra
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
folder, budget, interval, new = sys.argv[1], *map(int, sys.argv[2:])
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, tp_plan="auto", attn_implementation="reasonalloc", dtype="float64"
)
ids = torch.arange(3, 20)[None]
found = {}
for method in ("rkv", "reasonalloc"):
    recorder = ra.Recorder()
    compression = ra.Compression.method(method, budget, interval=interval)
    cache = ra.Cache(model.config, compression, recorder=recorder, tensor_parallel=model.tp_size)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    layers = [cache.ragged.tokens(layer) for layer in range(cache.shape.layers)]
    found[method] = {
        "tokens": out[0].tolist(),
        "positions": [[own[:n].tolist() for own, n in zip(tokens.positions[0], tokens.lengths[0].tolist())]
                      for tokens in layers],
        "rounds": [sum(sum(routing.budgets[0]) for routing in recorder.routings[i : i + len(layers)])
                   for i in range(0, len(recorder.routings), len(layers))],
    }
try:
    model.generate(ids, past_key_values=ra.Cache(model.config, compression), max_new_tokens=2)
except ValueError as error:
    found["untold"] = str(error)
parts = [None, None]
torch.distributed.all_gather_object(parts, found)
if torch.distributed.get_rank() == 0:
    print(json.dumps(parts))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).double().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def parts(folder):
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    numbers = [str(BUDGET), str(INTERVAL), str(NEW)]
    done = subprocess.run([*command, str(script), str(folder), *numbers], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))


def test_ranks_keep_what_one_process_keeps(folder, parts):
    """With equal budgets heads are independent, so two ranks' heads side by side are the single process's."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="reasonalloc", dtype="float64")
    cache = ra.Cache(model.config, ra.Compression.method("rkv", BUDGET, interval=INTERVAL))
    out = model.generate(
        torch.arange(3, 20)[None], past_key_values=cache, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    assert [part["rkv"]["tokens"] for part in parts] == [out[0].tolist()] * 2
    for layer in range(2):
        tokens = cache.ragged.tokens(layer)
        single = [tokens.positions[0, h, : tokens.lengths[0, h]].tolist() for h in range(4)]
        assert [head for part in parts for head in part["rkv"]["positions"][layer]] == single
    assert cache.stats().evicted > 0


def test_every_rank_conserves_its_own_total(parts):
    for part in parts:
        assert len(part["reasonalloc"]["rounds"]) > 5
        assert set(part["reasonalloc"]["rounds"]) == {2 * 2 * BUDGET}
    assert parts[0]["reasonalloc"]["tokens"] == parts[1]["reasonalloc"]["tokens"]


def test_a_cache_that_was_not_told(parts):
    assert "2 key/value heads per layer, the cache was made for 4" in parts[0]["untold"]
    assert "tensor_parallel=model.tp_size" in parts[0]["untold"]


@pytest.mark.slow
def test_evaluation_by_two_ranks_finds_what_one_process_finds(tmp_path):
    trainer = Trainer(TrainingConfig(**SMALL), tmp_path / "reasoner")
    torch.manual_seed(1)
    for weight in trainer.model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    trainer.export()
    study = "--task maps:4 --methods full,rkv --budgets 12 --interval 4 --count 3 --max-new-tokens 24"
    common = [
        *study.split(),
        "--samples",
        "1",
        "--temperature",
        "0",
        "--dtype",
        "float32",
        "--model",
        str(tmp_path / "reasoner" / "model"),
    ]
    alone_command = ["-m", "reasonalloc", "eval", *common, "-o", str(tmp_path / "alone")]
    together_command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    together_command += ["reasonalloc", "eval", *common, "-o", str(tmp_path / "together"), "--tensor-parallel"]
    for command in (alone_command, together_command):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, together = (
        [json.loads(path.read_text())["result"] for path in (tmp_path / name).rglob("results/**/*.json")]
        for name in ("alone", "together")
    )
    assert len(alone) == 6
    assert sorted(map(str, together)) == sorted(map(str, alone)), "texts, kept tokens, and the bytes of both ranks"
    again = [*together_command[:-3], "-o", str(tmp_path / "alone"), "--tensor-parallel"]
    done = subprocess.run([sys.executable, *again], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "the model changed since" in done.stderr, "ranks route alone: a folder holds one way or the other"
    lonely = [sys.executable, *alone_command[:-1], str(tmp_path / "lonely"), "--tensor-parallel"]
    done = subprocess.run(lonely, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "torchrun" in done.stderr


def test_what_ranks_cannot_share(folder):
    config = LlamaForCausalLM.from_pretrained(folder, attn_implementation="reasonalloc").config
    compression = ra.Compression.method("rkv", BUDGET)
    with pytest.raises(ValueError, match="4 key/value heads cannot be split over 3"):
        ra.Cache(config, compression, tensor_parallel=3)
    split = ra.Compression(BUDGET, layers="random-split", heads="random-split")
    ra.Cache(config, split)
    with pytest.raises(ValueError, match="ranks route alone"):
        ra.Cache(config, split, tensor_parallel=2)
