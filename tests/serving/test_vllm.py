"""The plugin on a stock vLLM (CPU).

The model is the built-in reasoner, or the folder that REASONALLOC_TEST_MODEL names.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from reasonalloc.policies.allocation import HeadAllocator, apportion
from reasonalloc.policies.allocation.heads import HeadSplit

HERE = Path(__file__).parent
MODEL = os.environ.get("REASONALLOC_TEST_MODEL", str(HERE.parents[1] / "src/reasonalloc/reasoner/model"))
WORDS = json.loads(Path(MODEL, "config.json").read_text())["vocab_size"]
EAGER = {"enforce_eager": True}  # compiling takes longer than the tests
# What is freed goes back to the system, and oneDNN does not keep a matrix product for every number of tokens, which is
# 0.5 to 0.9 MB a request until 1,024 are kept: stock vLLM's growth, too.
MEMORY_SHOWS = {"MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


def run(tmp_path, asked, **job):
    """Tokens, and what else ``run_offline.py`` reports, with the plugin set to ``asked`` (None: stock vLLM)."""
    work, result = tmp_path / "job.json", tmp_path / "result.json"
    work.write_text(json.dumps({"model": MODEL, **job, "options": {**EAGER, **job.get("options", {})}}))
    settings = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {**os.environ, **settings, **job.get("environment", {})}
    environment.pop("REASONALLOC", None)
    if asked is not None:
        environment["REASONALLOC"] = json.dumps(asked)
    done = subprocess.run(
        [sys.executable, HERE / "run_offline.py", work, result], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(result.read_text())


def prompts(count, shortest, longest, seed=0):
    choose = random.Random(seed)
    return [[choose.randrange(20, WORDS) for _ in range(choose.randint(shortest, longest))] for _ in range(count)]


@pytest.mark.parametrize("chunk", [2048, 64])
def test_a_budget_that_nothing_exceeds_changes_nothing(tmp_path, chunk):
    """16 prompts of up to 200 tokens, 256 tokens each, greedy; also with prompts in chunks of 64."""
    job = {
        "prompts": prompts(16, 8, 200),
        "tokens": 256,
        "options": {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": max(chunk, 64)},
    }
    stock = run(tmp_path, None, **job)
    ours = run(tmp_path, {"method": "reasonalloc-head", "budget": 512}, **job)
    same = [a == b for a, b in zip(ours["tokens"], stock["tokens"], strict=True)]
    assert all(same), f"{same.count(False)} of {len(same)} differ"


@pytest.mark.parametrize(
    ("method", "pin"),
    [
        ("rkv", False),
        ("reasonalloc-head", False),
        ("reasonalloc", False),
        ("h2o", False),
        ("rkv", True),
        ("reasonalloc", True),
    ],
)
def test_what_is_kept_equals_the_transformers_adapter(tmp_path, method, pin):
    """One prompt, 400 greedy tokens, budget 64: the same positions stay in every layer and head, pinned ones, too."""
    import reasonalloc as ra

    profile = Path(MODEL, "demand_profile.json")  # layers of different sizes
    if method == "reasonalloc" and not profile.exists():
        pytest.skip(f"no {profile}")
    changes = {"interval": 32, **({"profile": str(profile)} if method == "reasonalloc" else {})}
    changes |= {"prompt": "pin", "pin_share": 0.5} if pin else {}
    asked = {"method": method, "budget": 64, **changes}
    [prompt] = prompts(1, 150, 150, seed=1)
    ours = run(tmp_path, asked, prompts=[prompt], tokens=400, watch=True)
    compare(ours, prompt, ra.Compression.method(method, 64, **changes))


def compare(ours, prompt, compression):
    """Tokens and kept positions against the transformers adapter's."""
    from transformers import AutoModelForCausalLM

    import reasonalloc as ra

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32", attn_implementation="reasonalloc")
    cache = ra.Cache(model.config, compression)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(ids, past_key_values=cache, max_new_tokens=400, do_sample=False, pad_token_id=0)
    assert ours["tokens"][0] == out[0, len(prompt) :].tolist()
    [kept] = ours["kept"].values()
    for i, layer in enumerate(kept):
        tokens = cache.ragged.tokens(i)
        expected = [sorted(r[: int(n)].tolist()) for r, n in zip(tokens.positions[0], tokens.lengths[0], strict=True)]
        assert layer == expected


@pytest.mark.parametrize("routing", ["rank", "global"])
def test_two_ranks_route_as_one_process_would_for_them(tmp_path, routing):
    """Tensor parallelism: heads of a rank among themselves, or by one split over both in the memory that each has."""
    import reasonalloc as ra

    if json.loads(Path(MODEL, "config.json").read_text())["num_key_value_heads"] % 2:
        pytest.skip("an odd number of heads")
    asked = {"method": "reasonalloc-head", "budget": 64, "interval": 32}
    [prompt] = prompts(1, 150, 150, seed=1)
    job = {"options": {"tensor_parallel_size": 2}, "environment": {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}}
    ours = run(tmp_path, {**asked, "routing": routing}, prompts=[prompt], tokens=400, watch=True, **job)
    method = ra.Compression.method("reasonalloc-head", 64, interval=32)
    compare(ours, prompt, method.replace(heads=TwoRanks(method.head_allocator, routing)))


@dataclass(frozen=True)
class TwoRanks(HeadAllocator):
    """What two ranks do, in one process."""

    inner: HeadAllocator
    routing: str

    def allocate(self, scores, lengths, total, window):
        every = self.inner.allocate(scores, lengths, total, window).budgets
        parts = []
        for split, own, held in zip(every.chunk(2, 1), scores.chunk(2, 1), lengths.chunk(2, 1), strict=True):
            if self.routing == "rank":
                parts.append(self.inner.allocate(own, held, total // 2, window).budgets)
            else:
                parts.append(apportion(split.double(), total // 2, held.double().clamp(max=window), held.double()))
        return HeadSplit(torch.cat(parts, 1), None)


def test_prompts_that_take_turns_are_not_compressed_half_way(tmp_path):
    """With --long-prefill-token-threshold a prompt pauses while others go on; it keeps what one in one piece keeps."""
    asked = {"method": "rkv", "budget": 48, "interval": 32}
    long = prompts(4, 200, 260, seed=5)
    turns = {"long_prefill_token_threshold": 16, "max_num_batched_tokens": 40, "max_num_seqs": 4}
    ours = run(tmp_path, asked, prompts=long, tokens=64, options=turns)
    alone = run(tmp_path, asked, prompts=long, tokens=64, options={"max_num_seqs": 1})
    assert ours["tokens"] == alone["tokens"]


def test_requests_together_equal_requests_alone(tmp_path):
    asked = {"method": "reasonalloc-head", "budget": 48, "interval": 32}
    together = prompts(8, 5, 300, seed=2)
    ours = run(tmp_path, asked, prompts=together, tokens=100, options={"max_num_seqs": 8})
    alone = run(tmp_path, asked, prompts=together, tokens=100, options={"max_num_seqs": 1})
    assert ours["tokens"] == alone["tokens"]


@pytest.mark.parametrize("method", ["h2o", "reasonalloc"])
def test_full_graphs_of_decoding_steps_change_nothing(tmp_path, method):
    """vLLM's runner chooses graphs, pads to them, and replays them; prompts of one token, and one token left of one."""
    profile = {"profile": str(Path(MODEL, "demand_profile.json"))} if method == "reasonalloc" else {}
    asked = {"method": method, "budget": 48, "interval": 16, **profile}
    choose = random.Random(6)
    job = {
        "prompts": [*prompts(8, 20, 150, seed=6), [33], [*range(30, 95)]],
        "tokens": [choose.randint(40, 100) for _ in range(10)],
        "options": {
            "max_num_seqs": 8,
            "num_gpu_blocks_override": 7,
            "max_num_batched_tokens": 64,
            "max_model_len": 512,
        },
    }
    graphs, eager = run(tmp_path, asked, graphs=True, **job), run(tmp_path, asked, backend=True, **job)
    assert graphs["tokens"] == eager["tokens"]
    assert graphs["counters"] == eager["counters"]
    assert graphs["counters"]["rounds"] > 50
    assert graphs["replays"] > 80


def test_eight_times_as_many_requests_fit(tmp_path):
    """Maximum length 4096, budget 128, the same bytes: prompts of 3,900 tokens at once, and one by one."""
    asked, options = {"method": "rkv", "budget": 128}, {"max_model_len": 4096}
    job = {"prompts": prompts(48, 3900, 3900, seed=3), "tokens": 48}
    small = {"prompts": [[1, 2, 3]], "tokens": 1, "options": options}
    stock_size, our_size = run(tmp_path, None, **small), run(tmp_path, asked, **small)
    part = max(1, stock_size["slots"] // (4 * 4096))  # of the GiB that vLLM gives: what four requests fill is enough

    def limits(size, most):
        return {**options, "num_gpu_blocks_override": size["blocks"] // part, "max_num_seqs": most}

    stock = run(tmp_path, None, **{**job, "prompts": job["prompts"][:8]}, options=limits(stock_size, 8))
    ours = run(tmp_path, asked, **job, options=limits(our_size, 48))
    print(f"stock {stock['running']} requests at once, ours {ours['running']} of {ours['blocks'] - 1}")
    assert stock["running"] < 8  # not all: the memory was full
    assert ours["running"] >= 8 * stock["running"]
    alone = run(tmp_path, asked, **job, options=limits(our_size, 1))
    assert ours["tokens"] == alone["tokens"]


def test_a_load_with_clients_that_hang_up(tmp_path):
    """200 requests of mixed lengths in 24 arenas, 20 aborted: all arenas come back, the other answers are right."""
    choose = random.Random(4)
    asked = {"method": "reasonalloc-head", "budget": 48, "interval": 32}
    job = {"prompts": prompts(200, 5, 300, seed=4), "tokens": [choose.randint(20, 120) for _ in range(200)]}
    abort = {str(number): choose.randint(1, 15) for number in choose.sample(range(200), 20)}
    few = {"num_gpu_blocks_override": 25, "max_num_seqs": 64}
    ours = run(tmp_path, asked, **job, abort=abort, options=few, environment=MEMORY_SHOWS)
    alone = run(tmp_path, asked, **job, options={"max_num_seqs": 1})
    assert ours["free"][0] == ours["free"][-1] == 24
    assert min(ours["free"]) == 0
    right = [ours["tokens"][i] == alone["tokens"][i] for i in range(200) if str(i) not in abort]
    assert all(right), f"{right.count(False)} of {len(right)} differ"
    assert growth(ours) < 8 << 20, f"{growth(ours)} bytes"


def growth(result):
    """Resident bytes while the last third of the requests end, over those of the middle third: medians."""
    third = len(result["tokens"]) // 3
    middle = [bytes_ for finished, bytes_ in result["memory"] if third <= finished < 2 * third]
    last = [bytes_ for finished, bytes_ in result["memory"] if finished >= 2 * third]
    return statistics.median(last) - statistics.median(middle)


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ({"budget": 64, "method": "reasonalloc"}, {}, "pass a calibrated"),
        ({"budget": 64, "method": "rkv", "prompt": "protect"}, {}, "has no bound"),
        ({"budget": 64, "method": "rvk"}, {}, "rkv"),
        ({"budget": 64, "method": "rkv"}, {"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"budget": 64, "method": "rkv"}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"),
        ({"budget": 64, "method": "rkv"}, {"kv_cache_dtype": "bfloat16"}, "--kv-cache-dtype"),
    ],
)
def test_what_cannot_be_served_is_refused_at_start(tmp_path, asked, options, message):
    with pytest.raises(AssertionError, match=message):
        run(tmp_path, asked, prompts=[[1, 2, 3]], tokens=2, options=options)
