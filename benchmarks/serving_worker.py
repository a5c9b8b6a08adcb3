"""One vLLM engine for serving.py, the plugin on where REASONALLOC is set. Reads commands, one JSON a line.

Every answer is a line of JSON. Weights are random (vLLM's own "dummy" format).
"""

import json
import os
import random
import sys
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever libraries print

from vllm import LLM, SamplingParams  # noqa: E402


class Engine:
    """An engine whose steps are counted."""

    def __init__(self, vocabulary: int, options: dict[str, Any]) -> None:
        llm = LLM(
            load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False,
            disable_log_stats=True, **options,
        )  # fmt: skip
        self.engine, self.vocabulary, self.added = llm.llm_engine, vocabulary, 0
        self.scheduler = self.engine.engine_core.engine_core.scheduler

    def add(self, prompt: int, tokens: int) -> None:
        """A request of random words that generates so many tokens."""
        choose = random.Random(self.added)
        ids = [choose.randrange(self.vocabulary) for _ in range(prompt)]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(str(self.added), {"prompt_token_ids": ids}, sampling)
        self.added += 1

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - began

    def fill(self, requests: int, prompt: int, tokens: int, apart: int) -> dict[str, Any]:
        """Requests that come ``apart`` steps one after the other, as a server's do."""
        for _ in range(requests):
            self.add(prompt, tokens)
            self.steps(apart)
        return {}

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of each of the next steps, and how many requests took part."""
        return {"seconds": [self.step() for _ in range(count)], "running": len(self.scheduler.running)}

    def answer(self, requests: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Seconds until all of so many requests are answered, and how many ran at once at most."""
        for _ in range(requests):
            self.add(prompt, tokens)
        seconds, running = 0.0, 0
        while self.engine.has_unfinished_requests():
            seconds += self.step()
            running = max(running, len(self.scheduler.running))
        return {"seconds": seconds, "running": running}


def main() -> None:
    engine = Engine(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(engine, command.pop("do"))(**command)), file=_answers, flush=True)


if __name__ == "__main__":
    main()
