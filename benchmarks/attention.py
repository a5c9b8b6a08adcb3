"""Decode attention over a ragged slab: the backends, against a padded gather and against sdpa on equal heads.

    python benchmarks/attention.py [--budget 128] [--batch 8] [--dtype float32]

One step attends in 30 layers of SmolLM2's shape, each with storage of its own, so that memory is really read.
"equal heads, sdpa" is what a cache with equal budgets could do at best; the ragged ones hold as many tokens.
Attention reads every key and value once: its bytes per second stand against those of a large copy in the same rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from common import save

from reasonalloc.attention import AttentionBackend, choose_backend
from reasonalloc.storage import RaggedSlab

LAYERS, HEADS, GROUP, DIM, INTERVAL = 30, 3, 3, 64, 128
COPIED = 1 << 28  # bytes, far more than any cache holds


def ragged_slab(batch: int, budget: int, dtype: torch.dtype) -> RaggedSlab:
    share = np.random.default_rng(0).uniform(0.25, 2.0, (batch, HEADS))
    budgets = (share / share.sum(1, keepdims=True) * budget * HEADS).astype(np.int64)
    like = torch.zeros(batch, HEADS, 1, DIM, dtype=dtype)
    slab = RaggedSlab(like, like, budgets + INTERVAL, track_received=False)
    slab.keys.normal_()
    slab.values.normal_()
    slab.lengths[:] = budgets + INTERVAL // 2
    return slab


def padded_gather(query: torch.Tensor, slab: RaggedSlab, scaling: float) -> torch.Tensor:
    tokens = slab.padded()
    rows = query.view(*tokens.keys.shape[:2], GROUP, DIM)
    return F.scaled_dot_product_attention(
        rows, tokens.keys, tokens.values, attn_mask=tokens.valid[:, :, None], scale=scaling
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    query = torch.randn(options.batch, HEADS * GROUP, 1, DIM, dtype=dtype)
    slabs = [ragged_slab(options.batch, options.budget, dtype) for _ in range(LAYERS)]
    live = options.budget + INTERVAL // 2
    equal = [torch.randn(2, options.batch, HEADS, live, DIM, dtype=dtype) for _ in range(LAYERS)]
    scaling = DIM**-0.5

    def with_backend(backend: AttentionBackend) -> Callable[[int], torch.Tensor]:
        return lambda i: backend.attend(query, slabs[i], scaling)

    rows = query.view(options.batch, HEADS, GROUP, DIM)
    contenders: dict[str, Callable[[int], torch.Tensor]] = {
        "equal heads, sdpa": lambda i: F.scaled_dot_product_attention(rows, equal[i][0], equal[i][1], scale=scaling),
        "ragged, padded gather": lambda i: padded_gather(query, slabs[i], scaling),
    }
    for name in ("rows", "compiled"):
        contenders[f"ragged, {name}"] = with_backend(choose_backend(name, query.device, dtype, False))
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    tokens = {name: sum(int(slab.lengths.sum()) for slab in slabs) for name in contenders}
    tokens["equal heads, sdpa"] = LAYERS * options.batch * HEADS * live
    bytes_per_token = 2 * DIM * dtype.itemsize
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    copying: list[float] = []
    with torch.no_grad():
        for repeat in range(options.repeats + 1):
            began = time.perf_counter()
            target.copy_(source)
            if repeat:
                copying.append(time.perf_counter() - began)
            for name, attend in contenders.items():
                began = time.perf_counter()
                for i in range(LAYERS):
                    attend(i)
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians["equal heads, sdpa"]
    shares: dict[str, list[float]] = {}
    limit = [2 * COPIED / s for s in copying]  # a copy reads and writes
    for name, median in medians.items():
        shares[name] = [
            tokens[name] * bytes_per_token / mine / best for mine, best in zip(seconds[name], limit, strict=True)
        ]
        print(
            f"{name:24s} {1e3 * median:8.2f} ms/step   {median / base:5.2f} x equal heads   "
            f"{statistics.median(shares[name]):4.0%} of a copy's bytes per second"
        )
    results = {"seconds": seconds, "copy_gigabytes_per_second": [1e-9 * best for best in limit]}
    save(
        f"attention-{options.dtype}-{options.budget}",
        {**vars(options), **results, "share_of_copy": shares},
    )


if __name__ == "__main__":
    main()
