"""A day in the life: random requests, batches, turns, copies, threads and interruptions, one after the other.

Every text must equal that of its prompt alone in a cache of its own, whatever happened before, and memory must not
grow. All in float64, where a batch and a single run choose the same tokens. The slow test goes on for an hour, or as
long as REASONALLOC_SOAK_SECONDS says.
"""

import copy
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import pytest
import torch
from reference import compression, prompts, tiny_model, word_tokenizer

import reasonalloc as ra
from reasonalloc.calibration import CalibrationSettings, ProbePrompt
from reasonalloc.evaluation.executors import Worker, run_local
from reasonalloc.evaluation.store import Store
from reasonalloc.evaluation.study import Study

# Not those that draw: a row of a batch draws other numbers than the row alone.
METHODS = ["rkv", "snapkv", "h2o", "tova", "streaming", "reasonalloc", "reasonalloc-head", "adakv-rkv", "pyramid-rkv"]
KINDS = ["llama", "qwen3"]
KEPT = 200  # texts that are remembered
GROWTH = 64 << 20  # bytes that the process may have grown by, from the first quarter of the day to its end


@dataclass(frozen=True)
class Request:
    """A prompt, and what it is answered with."""

    kind: str
    method: str
    budget: int
    interval: int
    length: int
    seed: int
    tokens: int


@contextmanager
def interrupted(seconds):
    """A KeyboardInterrupt at some moment in here, as Ctrl-C makes it, unless all is done by then."""

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Day:
    """What goes on, and what is remembered of it.

    Attributes:
        done: how often each thing was done.
        broken: how many runs were interrupted before they had ended.
    """

    def __init__(self, seed, folder):
        self.random, self.folder = random.Random(seed), folder
        self.models = {kind: tiny_model(kind, torch.float64) for kind in KINDS}
        self.texts, self.caches = {}, {}
        self.done, self.broken = Counter(), Counter()
        self.deeds = [self.batch, self.batch, self.again, self.turns, self.copied, self.threads, self.stopped]
        self.rare = [self.calibration, self.evaluation]

    def live(self, seconds):
        """Go on for so long. Bytes of the process after a quarter of it and at the end."""
        self.batch()  # what is imported at first use
        began, process, early = time.monotonic(), psutil.Process(), 0
        while (passed := time.monotonic() - began) < seconds or not set(self.deeds + self.rare) <= self.done.keys():
            deed = self.random.choice(self.deeds if self.random.random() < 0.95 and self.done else self.rare)
            if passed >= seconds:  # whatever has not been done yet
                deed = next(deed for deed in self.deeds + self.rare if deed not in self.done)
            deed()
            self.done[deed] += 1
            if not early and passed > seconds / 4:
                early = process.memory_info().rss
        return early, process.memory_info().rss

    # ---- requests ----

    def request(self, **changes):
        draw = self.random
        made = Request(
            draw.choice(KINDS), draw.choice(METHODS), draw.choice([24, 32, 40]), draw.choice([8, 16]),
            draw.choice([5, 17, 40, 61]), draw.randrange(40), draw.choice([12, 30, 50]),
        )  # fmt: skip
        return replace(made, **changes)

    def several(self):
        """Requests that can be answered in one batch."""
        first = self.request()
        lengths = [self.random.choice([5, 17, 40, 61]) for _ in range(self.random.randint(1, 3))]
        return [first, *(replace(first, length=n, seed=self.random.randrange(40)) for n in lengths)]

    def cache(self, request):
        return ra.Cache(self.models[request.kind].config, compression(request.method, request.budget, request.interval))

    def answered(self, requests, cache, loop=False):
        """Token ids of each request, in one batch."""
        rows = [prompts((request.length,), request.seed)[0][0] for request in requests]
        longest = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
        return self.generated(requests[0], ids, mask, cache, loop)[:, longest:].tolist()

    def generated(self, request, ids, mask, cache, loop=False):
        more = {"custom_generate": ra.decoding_loop} if loop else {}
        return self.models[request.kind].generate(
            ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=request.tokens, **more
        )

    def remembered(self, key, make):
        """What ``make`` gave for this key, undisturbed."""
        if key not in self.texts:
            if len(self.texts) >= KEPT:
                self.texts.clear()
            self.texts[key] = make()
        return self.texts[key]

    def want(self, request):
        """The same alone, in a cache of its own."""
        return self.remembered(request, lambda: self.answered([request], self.cache(request))[0])

    def check(self, requests, found):
        assert found == [self.want(request) for request in requests], requests

    # ---- what goes on ----

    def batch(self):
        requests = self.several()
        self.check(requests, self.answered(requests, self.cache(requests[0]), self.random.random() < 0.5))

    def again(self):
        """A cache that served others before."""
        requests = self.several()
        key = (requests[0].kind, requests[0].method, requests[0].budget, requests[0].interval)
        cache = self.caches.setdefault(key, self.cache(requests[0]))
        cache.reset()
        self.check(requests, self.answered(requests, cache))

    def turn(self, request, text, seed):
        """More of a conversation: the text so far and new tokens."""
        new = prompts((9,), seed)[0]
        return torch.cat([text, new.expand(len(text), -1)], 1)

    def turns(self):
        """Two turns of a batch of two equal lengths, against each conversation alone."""
        first = self.request()
        requests, found = [first, replace(first, seed=first.seed + 40)], []
        for group in (requests, requests[:1], requests[1:]):
            cache = self.cache(first)
            ids = torch.cat([prompts((request.length,), request.seed)[0] for request in group])
            text = self.generated(first, ids, torch.ones_like(ids), cache)
            ids = self.turn(first, text, first.seed)
            found.append(self.generated(first, ids, torch.ones_like(ids), cache).tolist())
        assert found[0] == found[1] + found[2], requests

    def copied(self):
        """A copy in the middle of a conversation; both go on."""
        request = self.request()
        cache, ids = self.cache(request), prompts((request.length,), request.seed)[0]
        text = self.generated(request, ids, torch.ones_like(ids), cache)
        ids = self.turn(request, text, request.seed)
        found = []
        for one in (copy.deepcopy(cache), cache):
            found.append(self.generated(request, ids, torch.ones_like(ids), one).tolist())
        assert found[0] == found[1], request

    def threads(self):
        """Three at once, with a cache each and one model."""
        groups = [self.several() for _ in range(3)]
        caches, found = [self.cache(group[0]) for group in groups], [None] * 3

        def work(i):
            found[i] = self.answered(groups[i], caches[i], i == 1)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for group, texts in zip(groups, found, strict=True):
            self.check(group, texts)

    def stopped(self):
        """Ctrl-C at any moment; after a reset the cache is as good as new."""
        requests = self.several()
        cache, loop = self.cache(requests[0]), self.random.random() < 0.5
        try:
            with interrupted(self.random.uniform(0.001, 0.3)):
                found = self.answered(requests, cache, loop)
        except KeyboardInterrupt:
            self.broken["generate"] += 1
            cache.reset()
            found = self.answered(requests, cache, loop)
        self.check(requests, found)

    def until_done(self, name, work):
        """Work that goes on where it was interrupted."""
        for seconds in (self.random.uniform(0.005, 0.2) for _ in range(4)):
            try:
                with interrupted(seconds):
                    return work()
            except KeyboardInterrupt:
                self.broken[name] += 1
        return work()

    def calibration(self):
        model, tokenizer = tiny_model(), word_tokenizer()
        probes = [ProbePrompt(f"w{i} w{i + 1} w{i + 2} w{2 * i}") for i in range(2, 8)]
        settings = CalibrationSettings(max_new_tokens=24, batch_size=2, temperature=0.0, least_tokens=4)
        partial = self.folder / "profile.partial"

        def run(partial=None):
            return ra.calibrate(model, tokenizer, probes, settings, partial=partial).to_json()

        want = self.remembered("profile", run)  # first: modules do not survive it if their import is interrupted
        assert self.until_done("calibrate", lambda: run(partial)) == want
        partial.unlink(missing_ok=True)

    def evaluation(self):
        study = Study.from_dict(
            {
                "model": "reasonalloc/reasoner", "tasks": [{"name": "maps:4", "count": 4}], "variants": ["full", "rkv"],
                "budgets": [24], "samples": 1, "sampling": {"temperature": 0, "top_p": 1.0, "max_new_tokens": 24},
                "common": {"interval": 8}, "dtype": "float32", "batch": 2,
            }
        )  # fmt: skip

        def run(folder):
            worker, store = Worker(study, "cpu"), Store(folder)
            store.begin(study, worker.fingerprint, study.load_questions())
            run_local(worker, store, store.plan(), lambda *_: None)
            return {unit.key: store.read(unit) for batch in store.plan() for unit in batch}

        number = self.done[self.evaluation]
        want = self.remembered("results", lambda: run(self.folder / f"whole{number}"))
        assert self.until_done("eval", lambda: run(self.folder / f"run{number}")) == want


def lived(seconds, seed, folder):
    """A day; what was done is printed."""
    day = Day(seed, folder)
    early, late = day.live(seconds)
    print({deed.__name__: count for deed, count in day.done.items()}, dict(day.broken), f"{late - early:+} bytes")
    return day, early, late


def test_a_short_day(tmp_path):
    day, _, _ = lived(5, seed=1, folder=tmp_path)
    assert set(day.done) == set(day.deeds + day.rare)


@pytest.mark.slow
def test_a_long_day(tmp_path):
    seconds = float(os.environ.get("REASONALLOC_SOAK_SECONDS", 3600))
    day, early, late = lived(seconds, seed=int(time.time()) if seconds >= 3600 else 2, folder=tmp_path)
    assert {"generate", "calibrate", "eval"} <= day.broken.keys()
    assert late - early < GROWTH, f"{(late - early) / 2**20:.0f} MiB more"
