"""Part of ``make gpu``: tokens a second in Llama-8B's shape, against transformers' own caches, over the context.

``DynamicCache`` is decoded eagerly, ``StaticCache`` in one CUDA graph, which is the baseline: it attends to all of its
slots, so its context is its size. Ours holds the same whatever the context; a measured block is a whole interval of
recorded steps with its round. All caches are filled at random.
"""

from functools import partial
from typing import Any

import torch
import transformers
from common import full_cache, random_ids, random_model
from gpu_model import (
    GIB,
    Recorded,
    Sizes,
    begin,
    bytes_per_token,
    cell,
    filled,
    repeated,
    timed,
)
from gpu_report import Clock, figure
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

METHOD = "reasonalloc-head"
BLOCKS = 2
NEAR, FAR = 2048, 16384  # contexts at which the step is held to a bar
WHOLE = "every-slot"  # attention
SAME, FASTER, MORE = 1.0, 1.35, 10.0  # times the static cache's: the step at NEAR, at FAR, and tokens in equal memory


def _every_slot(
    module: torch.nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Stock sdpa, to all slots: without a mask it takes its fastest kernel, and repeats no heads."""
    out, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    return out, None


transformers.AttentionInterface.register(WHOLE, _every_slot)
transformers.AttentionMaskInterface.register(WHOLE, sdpa_mask)


class Bench:
    """A model, and what has been found of it.

    Attributes:
        steps: milliseconds of a step, by (cache, batch, context); ours has context 0.
        rates: tokens a second, likewise.
    """

    def __init__(self, model: Any, sizes: Sizes) -> None:
        self.model, self.sizes = model, sizes
        self.steps: dict[tuple[str, int, int], float] = {}
        self.rates: dict[tuple[str, int, int], float] = {}

    def dynamic(self, batch: int, context: int) -> None:
        """transformers' ``DynamicCache``, as a user has it."""
        self.model.set_attn_implementation("sdpa")
        cache, ids = full_cache(self.model, batch, context - 8), random_ids(self.model, batch)

        def step() -> None:
            self.model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache})

        timed(repeated(step, 2), ids.device)
        device, _ = timed(repeated(step, 4), ids.device)
        self._found("DynamicCache", batch, context, device / 4)

    def static(self, batch: int, context: int) -> None:
        """transformers' ``StaticCache`` in a CUDA graph."""
        self.model.set_attn_implementation(WHOLE)
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=context)
        self.model(random_ids(self.model, batch, 4), logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        for layer in cache.layers:
            for memory in (layer.keys, layer.values):
                for row in memory:
                    row.normal_()
        recorded = Recorded(self.model, cache, batch, context - 1)
        device, _ = recorded.milliseconds(self.sizes.steps)
        self._found("StaticCache, graph", batch, context, device)

    def ours(self, batch: int) -> None:
        """A step, and whole intervals."""
        self.model.set_attn_implementation("reasonalloc")
        sizes, name = self.sizes, f"ours, batch {batch}"
        cache = filled(self.model, METHOD, batch, sizes)
        recorded = Recorded(self.model, cache, batch, sizes.budget)
        device, _ = recorded.milliseconds(sizes.interval - 2)
        self.steps["ours", batch, 0] = device
        figure(f"{name}, step", device, "ms")
        interval = repeated(recorded.step, sizes.interval)
        interval()  # compiles the round
        milliseconds = sum(timed(interval, sizes.where)[0] for _ in range(BLOCKS)) / BLOCKS
        self.rates["ours", batch, 0] = rate = 1e3 * batch * sizes.interval / milliseconds
        figure(name, rate, "tokens/s")
        figure(f"{name}, keys and values", cache.stats().kv_bytes / GIB, "GiB")

    def _found(self, name: str, batch: int, context: int, milliseconds: float) -> None:
        self.steps[name, batch, context] = milliseconds
        self.rates[name, batch, context] = rate = 1e3 * batch / milliseconds
        figure(f"{name}, batch {batch}, {context} tokens, step", milliseconds, "ms")
        figure(f"{name}, batch {batch}, {context} tokens", rate, "tokens/s")

    def compare(self, batch: int, context: int) -> None:
        """Ours against the static cache at an equal batch."""
        ours, theirs = ("ours", batch, 0), ("StaticCache, graph", batch, context)
        if ours not in self.steps or theirs not in self.steps:
            return
        bar = FASTER if context == FAR else SAME if context >= NEAR else None
        times = self.steps[theirs] / self.steps[ours]
        figure(f"step, times as fast, batch {batch}, {context} tokens", times, "x", at_least=bar)
        if ours in self.rates:
            times = self.rates[ours] / self.rates[theirs]
            figure(f"tokens/s, rounds included, batch {batch}, {context} tokens", times, "x")

    def compare_largest(self, own: int, batch: int, context: int) -> None:
        """Both with as many rows as the same memory holds."""
        ours, theirs = ("ours", own, 0), ("StaticCache, graph", batch, context)
        if ours in self.rates and theirs in self.rates:
            times = self.rates[ours] / self.rates[theirs]
            figure(f"tokens/s, batch {own} against {batch}, {context} tokens", times, "x", at_least=MORE)


def measure(bench: Bench, clock: Clock) -> None:
    """All cells, those that say most first; what takes long without saying much comes last."""
    sizes = bench.sizes
    token = bytes_per_token(bench.model.config, sizes.dtype)
    slots = token * (sizes.budget + sizes.interval)
    *equal, (most, far) = sizes.contexts
    own = sizes.memory // slots

    def needed(rows: int, tokens: int) -> int:
        return rows * tokens * token

    cell(f"ours, batch {own}", partial(bench.ours, own), clock, own * slots * 21 // 20)
    cell(f"static, batch {most}, {far} tokens", partial(bench.static, most, far), clock, needed(most, far))
    bench.compare_largest(own, most, far)
    for batch in dict.fromkeys(batch for batch, _ in equal):
        cell(f"ours, batch {batch}", partial(bench.ours, batch), clock, batch * slots * 21 // 20)
    for batch, context in equal:
        cell(f"static, batch {batch}, {context} tokens", partial(bench.static, batch, context), clock,
             needed(batch, context))  # fmt: skip
        bench.compare(batch, context)
    for batch, context in sizes.contexts:
        cell(f"dynamic, batch {batch}, {context} tokens", partial(bench.dynamic, batch, context), clock,
             needed(batch, context) * 21 // 20)  # fmt: skip


def main() -> None:
    sizes, clock = begin(__doc__)
    measure(Bench(random_model(sizes.shape, device=sizes.device, dtype=sizes.dtype), sizes), clock)


if __name__ == "__main__":
    main()
