"""Scenarios on tiny models: everything that a transformers cache is asked to do, at a tiny budget.

Tokens are fed, not generated, wherever that is possible: what is kept then depends on one rounding less.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as remember

import torch
from reference import compression, prompts, tiny_model, tiny_profile
from transformers import StoppingCriteria, StoppingCriteriaList

import reasonalloc as ra
from golden.access import kept_positions
from golden.arrivals import arrivals
from golden.rounds import Round, Watch


@dataclass(frozen=True)
class Variant:
    """How a scenario is computed. The recorded outcome is the default's; none of these may change it.

    Attributes:
        dtype: of weights and inputs.
        attention: the backend.
        noise: relative, on all weights or inputs; greater than any rounding.
    """

    dtype: torch.dtype = torch.float32
    attention: str = "auto"
    noise: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """A named run of one method."""

    name: str
    play: Callable[[Variant], Iterator[Round]]


# ---- scripts: tokens that are fed --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feed:
    """One forward pass."""

    ids: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Select:
    """Rows are kept, repeated and reordered."""

    rows: list[int]


@dataclass(frozen=True)
class Reset:
    """The cache is emptied for another batch."""


@dataclass(frozen=True)
class Speculate:
    """One forward pass whose last ``rejected`` tokens are taken back."""

    ids: torch.Tensor
    rejected: int


class Script:
    """Writes a script; random tokens come from its seed."""

    def __init__(self, seed: int) -> None:
        self.events: list[Feed | Select | Reset | Speculate] = []
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)

    def tokens(self, rows: int, count: int) -> torch.Tensor:
        return torch.randint(2, 97, (rows, count), generator=self.generator)

    def prompt(self, lengths, cuts=()):
        """A left-padded prompt, cut into chunks of these lengths."""
        ids, mask = prompts(lengths, seed=self.seed)
        cuts = list(cuts) or [max(lengths)]
        self.events += map(Feed, ids.split(cuts, 1), mask.split(cuts, 1))
        return self

    def decode(self, rows, steps):
        self.events += [Feed(self.tokens(rows, 1), torch.ones(rows, 1, dtype=torch.long)) for _ in range(steps)]
        return self

    def distinct(self, lengths, steps):
        """A left-padded prompt and ``steps`` tokens; no row has a token twice."""
        count = max(lengths) + steps
        rows = torch.stack([torch.randperm(95, generator=self.generator)[:count] + 2 for _ in lengths])
        mask = torch.ones_like(rows)
        for row, length in enumerate(lengths):
            mask[row, : max(lengths) - length] = 0
        cuts = [max(lengths), *[1] * steps]
        self.events += map(Feed, (rows * mask).split(cuts, 1), mask.split(cuts, 1))
        return self

    def turn(self, mask):
        """Several tokens of every row, of which ``mask`` says which are real."""
        mask = torch.tensor(mask)
        self.events.append(Feed(self.tokens(*mask.shape), mask))
        return self

    def select(self, *rows):
        self.events.append(Select(list(rows)))
        return self

    def reset(self):
        self.events.append(Reset())
        return self

    def speculate(self, rounds, tokens, rejected):
        self.events += [Speculate(self.tokens(1, tokens), rejected[i % len(rejected)]) for i in range(rounds)]
        return self


@remember
def model_of(variant):
    model = tiny_model(dtype=variant.dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + variant.noise * torch.randn(parameter.shape, generator=generator, dtype=variant.dtype))
    return model


def follow(script, chosen, variant) -> Iterator[Round]:
    """Feed a script to one cache."""
    model = model_of(variant)
    cache = ra.Cache(model.config, chosen, attention=variant.attention)
    watch, seen, step, last = Watch(), None, 0, None
    for event in script.events:
        if isinstance(event, Select):
            cache.batch_select_indices(torch.tensor(event.rows))
            watch.select(event.rows)
            seen, last = seen[event.rows], None
            continue
        if isinstance(event, Reset):
            cache.reset()
            watch, seen = Watch(), None
            continue
        mask = torch.ones_like(event.ids) if isinstance(event, Speculate) else event.mask
        seen = mask if seen is None else torch.cat([seen, mask], 1)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -mask.shape[1] :]
        if isinstance(event, Speculate):
            cache.activate_past_recording()
        with torch.no_grad():
            model(event.ids, past_key_values=cache, attention_mask=seen, position_ids=positions)
        new = mask.sum(1).tolist()
        if isinstance(event, Speculate):
            cache.crop(-event.rejected)
            seen = seen[:, : seen.shape[1] - event.rejected]
            new = [new[0] - event.rejected]
        step += 1
        last = Round(step, list(range(len(seen))), kept_positions(cache))
        if watch.forgot(last.kept, new):
            yield last
            last = None
    if last is not None:
        yield last


def at_budget(method, **changes):
    """The method at a budget of 24; what reads a profile gets a random one."""
    if method in PROFILED:
        changes = {"profile": tiny_profile(), **changes}
    return compression(method, **changes)


PROFILED = ("reasonalloc", "reasonalloc-layer", "missalloc", "sensitivity")


def _ragged_turn(columns, real):
    """Rows of a turn that pads on both sides: ``real`` gives the first and the end of every row's tokens."""
    return [[int(first <= i < end) for i in range(columns)] for first, end in real]


# What is fed, and what is changed of the method's settings.
SCRIPTS: dict[str, tuple[Callable[[int], Script], dict]] = {
    "padded": (lambda seed: Script(seed).prompt((5, 17, 40)).decode(3, 70), {}),
    "distinct": (lambda seed: Script(seed).distinct((5, 17, 40), 50), {}),
    "single": (lambda seed: Script(seed).prompt((61,)).decode(1, 70), {}),
    "turns": (lambda seed: Script(seed).prompt((12, 40)).decode(2, 25).turn([[1] * 11] * 2).decode(2, 30), {}),
    "padded-turns": (
        lambda seed: (
            Script(seed)
            .prompt((9, 40, 61))
            .decode(3, 30)
            .turn(_ragged_turn(20, [(3, 20), (0, 20), (12, 20)]))
            .turn([[1], [0], [1]])  # a step in which the second row only pads
            .decode(3, 30)
        ),
        {},
    ),
    "chunks": (lambda seed: Script(seed).prompt((61,), (7, 30, 2, 22)).decode(1, 40), {}),
    "padded-chunks": (lambda seed: Script(seed).prompt((9, 40, 61), (25, 5, 20, 11)).decode(3, 40), {}),
    "protect": (lambda seed: Script(seed).prompt((5, 40)).decode(2, 60), {"prompt": "protect"}),
    "protect-chunks": (lambda seed: Script(seed).prompt((40,), (30, 8, 2)).decode(1, 50), {"prompt": "protect"}),
    "protect-turns": (
        lambda seed: Script(seed).prompt((12, 30)).decode(2, 30).turn([[1] * 7] * 2).decode(2, 40),
        {"prompt": "protect"},
    ),
    "select": (
        lambda seed: (
            Script(seed).prompt((9, 40, 61)).decode(3, 25).select(2, 0, 0).decode(3, 30).select(1, 0).decode(2, 20)
        ),
        {},
    ),
    "reset": (lambda seed: Script(seed).prompt((40, 9)).decode(2, 30).reset().prompt((30,)).decode(1, 40), {}),
    "one-token": (lambda seed: Script(seed).prompt((1,)).decode(1, 60), {}),
    "one-token-protect": (lambda seed: Script(seed).prompt((1,)).decode(1, 60), {"prompt": "protect"}),
    "budget": (lambda seed: Script(seed).prompt((24,)).decode(1, 40), {}),
    "budget-and-one": (lambda seed: Script(seed).prompt((25,)).decode(1, 40), {}),
    "bounds": (lambda seed: Script(seed).prompt((1, 24, 25)).decode(3, 40), {}),
    "speculated": (lambda seed: Script(seed).prompt((40,)).speculate(20, 5, (2, 0, 4, 1)), {"interval": 6}),
    "every-step": (lambda seed: Script(seed).prompt((20, 30)).decode(2, 20), {"interval": 1}),
    "score": (lambda seed: Script(seed).prompt((5, 17, 40)).decode(3, 70), {"storage_order": "score"}),
}

# ---- transformers' own loops -------------------------------------------------------------------------------------


def _generate(variant, chosen, lengths, seed, **options):
    model = model_of(variant)
    cache = ra.Cache(model.config, chosen, attention=variant.attention)
    ids, mask = prompts(lengths, seed=seed)
    torch.manual_seed(seed)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return cache, out


def _final(cache, out) -> Iterator[Round]:
    kept = kept_positions(cache)
    yield Round(out.shape[1], list(range(len(kept[0]))), kept)


class _Rounds(StoppingCriteria):
    """Stops nothing: it looks at the cache in every step of transformers' loop."""

    def __init__(self, lengths):
        self.cache, self.new = None, lengths
        self.watch, self.rounds, self.step = Watch(), [], 0

    def look(self, rows):
        self.step += 1
        found = Round(self.step, rows, kept_positions(self.cache))
        if self.watch.forgot(found.kept, self.new):
            self.rounds.append(found)
        self.new, self.last = [1] * len(rows), found

    def __call__(self, input_ids, scores, **kwargs):
        self.look(list(range(len(input_ids))))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def beams(chosen, variant, seed):
    yield from _final(*_generate(variant, chosen, (9, 17, 40), seed, num_beams=3, do_sample=False, max_new_tokens=45))


def samples(chosen, variant, seed):
    """Two samples of every prompt, after every round of the stock loop."""
    lengths = (9, 40)
    rounds = _Rounds([length for length in lengths for _ in range(2)])
    model = model_of(variant)
    rounds.cache = ra.Cache(model.config, chosen, attention=variant.attention)
    ids, mask = prompts(lengths, seed=seed)
    torch.manual_seed(seed)
    options = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 45}
    model.generate(
        ids,
        attention_mask=mask,
        past_key_values=rounds.cache,
        stopping_criteria=StoppingCriteriaList([rounds]),
        **options,
    )
    yield from rounds.rounds
    if rounds.rounds[-1] is not rounds.last:
        yield rounds.last


class _EndAt(StoppingCriteria):
    """Ends each prompt's row after its own number of tokens, whatever they are."""

    def __init__(self, ids, ends):
        self.columns = ids.shape[1]
        self.ends = {tuple(row): end for row, end in zip(ids.tolist(), ends, strict=True)}

    def __call__(self, input_ids, scores, **kwargs):
        written = input_ids.shape[1] - self.columns
        return torch.tensor([self.ends[tuple(row)] <= written for row in input_ids[:, : self.columns].tolist()])


def decoding_loop(chosen, variant, seed):
    """Rows end at different times and leave the batch, some just before a round, whose last queries are older."""
    lengths = (9, 40, 61)
    ids, mask = prompts(lengths, seed=seed)
    model = model_of(variant)
    rounds = _Rounds(list(lengths))
    rounds.cache = ra.Cache(model.config, chosen, attention=variant.attention)
    alive = list(range(3))

    def on_step(rows, tokens):
        nonlocal alive
        rows = rows.tolist()
        if rows != alive:
            at = [alive.index(row) for row in rows]
            rounds.watch.select(at)
            rounds.new = [1] * len(rows)
            alive = rows
        rounds.look(rows)

    model.generate(
        ids,
        attention_mask=mask,
        past_key_values=rounds.cache,
        do_sample=False,
        max_new_tokens=60,
        stopping_criteria=StoppingCriteriaList([_EndAt(ids, (46, 29, 55))]),
        custom_generate=ra.decoding_loop,
        on_step=on_step,
    )
    yield from rounds.rounds
    if rounds.rounds[-1] is not rounds.last:
        yield rounds.last


def _speculative(chosen, variant, seed, **options):
    yield from _final(*_generate(variant, chosen, (17,), seed, do_sample=False, max_new_tokens=80, **options))


def assisted(chosen, variant, seed):
    draft = tiny_model(dtype=variant.dtype, attention="sdpa")
    with torch.no_grad():
        for parameter in draft.model.layers[2].parameters():
            parameter.mul_(0.97)  # an imperfect draft: some of its tokens are rejected
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = 5, "constant"
    settings.assistant_confidence_threshold = 0.0
    yield from _speculative(chosen, variant, seed, assistant_model=draft)


def lookup(chosen, variant, seed):
    yield from _speculative(chosen, variant, seed, prompt_lookup_num_tokens=3)


LOOPS = {
    "beams": beams,
    "samples": samples,
    "drop-finished": decoding_loop,
    "assisted": assisted,
    "lookup": lookup,
}

# ---- which method does what --------------------------------------------------------------------------------------

TELLING = ("rkv", "reasonalloc", "h2o", "reasonalloc-dynamic")
ONE_MORE = {  # beside the padded batch
    "snapkv": "turns",
    "streaming": "padded-turns",
    "tova": "select",
    "knorm": "protect",
    "pyramid-rkv": "padded-chunks",
    "adakv-rkv": "drop-finished",
    "reasonalloc-layer": "beams",
    "reasonalloc-head": "select",
    "missalloc": "protect-turns",
    "sensitivity": "chunks",
    "random": "select",
}
BY_SCORE = ("rkv", "reasonalloc")  # methods whose outcome depends on the order of storage
ARENA_METHODS = ("rkv", "reasonalloc-head", "adakv-rkv", "h2o", "streaming")
TIED = ("knorm", "vase", "vase-queryfree")  # in the first layer equal tokens have equal scores, up to rounding
DRAWING = ("random", "vase", "vase-queryfree")
SEEDS: dict[str, int] = {}  # of scenarios that would depend on rounding with seed 1; none does


def _scenario(method, kind):
    name = f"{method}-{kind}"
    seed = SEEDS.get(name, 1)
    if kind == "arenas":
        return Scenario(name, lambda variant: arrivals(method, variant, seed))
    if kind in LOOPS:
        return Scenario(name, lambda variant: LOOPS[kind](at_budget(method), variant, seed))
    script, changes = SCRIPTS[kind]
    return Scenario(name, lambda variant: follow(script(seed), at_budget(method, **changes), variant))


def _kinds(method):
    if method in TELLING:
        left_out = {"distinct"} if method in BY_SCORE else {"distinct", "score"}
        return [kind for kind in (*SCRIPTS, *LOOPS) if kind not in left_out]
    batch = "distinct" if method in TIED else "padded"
    return [batch, ONE_MORE[method]] if method in ONE_MORE else [batch]


def _scenarios(methods, in_arenas):
    return [
        *(_scenario(method, kind) for method in methods for kind in _kinds(method)),
        *(_scenario(method, "arenas") for method in in_arenas),
    ]


LATER = ("random-pin", "lossalloc")  # than the cache that was recorded
METHODS = [method for method in ra.METHODS if method not in ("full", *DRAWING, *LATER)]
KEPT = _scenarios(METHODS, ARENA_METHODS)
DRAWN = _scenarios(DRAWING, DRAWING)  # their random numbers are not promised, and may be based anew on purpose
FILES = {"kept": KEPT, "drawn": DRAWN}
