"""Training the small reasoner from scratch, seeded and resumable.

    python -m reasonalloc.reasoner.train -o reasoner

Every family climbs a ladder of difficulties of its own: half of its batches are at the top rung, the others anywhere
below, so that nothing is forgotten; it rises when the loss at the top falls far enough. At the end of the ladder all
its difficulties are equally frequent, for where one size prevails, distances that hold for it alone are learned in
place of names; in the last share of the tokens half are at the top once more, where most can go wrong. Looking up must
be learned before anything else can be, so bare look-ups open, until the last rung of a ladder of their own. Matrices
learn by Muon, the rest by AdamW, at full rates until the last share of the tokens, over which they fall to nothing. A
checkpoint is written every minute; the same command goes on from it, and ends with the same weights to the last bit.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer
from torch import Tensor

from reasonalloc.files import write_atomically
from reasonalloc.reasoner.lookups import lookups
from reasonalloc.reasoner.muon import Muon
from reasonalloc.reasoner.text import BEGIN, THINK, build_tokenizer, prompt_text, solution_text
from reasonalloc.tasks import TASKS

_IGNORED = -100  # label of what is not learned: the question
_LOOKUPS = "lookups"  # the opening's name in the log
_WARM_UP = 100  # steps over which the learning rates rise


@dataclass(frozen=True)
class TrainingConfig:
    """All that decides what comes out, beside the time spent.

    Attributes:
        ladders: for each task its difficulties, ascending.
        opening: sizes of the look-ups that come before anything else, ascending.
        shares: of the tokens, for each family, once the opening is over.
        rise_below: for each family and for "lookups", nats per learned token at the top rung, averaged, under which
            it takes the next. A family that can guess its easy problems must rise before it looks anything up.
        model: settings of transformers' ``LlamaConfig``.
        matrix_learning_rate: of Muon.
        learning_rate: of AdamW.
        tokens: to be seen in all, questions and padding included.
        decay: the share of them, the last, over which the learning rates fall.
        finish: the share of them, the last, in which half of all batches are at the end of the ladder.
        rows: problems in one batch.
        batch_tokens: bounds of a batch; short problems are more than ``rows``, long ones fewer.
        seed: of weights and data.
    """

    ladders: dict[str, list[int]]
    opening: list[int]
    shares: dict[str, float]
    rise_below: dict[str, float]
    model: dict[str, Any]
    matrix_learning_rate: float
    learning_rate: float
    tokens: int
    decay: float
    finish: float
    rows: int
    batch_tokens: list[int]
    seed: int

    def __post_init__(self) -> None:
        for name, ladder in self.climbs.items():
            if not ladder or list(ladder) != sorted(set(ladder)) or ladder[0] < 1:
                raise ValueError(f"the ladder of {name} must ascend, got {ladder}")
        for name, ladder in self.ladders.items():
            TASKS.create(name).problem(0, ladder[-1], "train")  # an impossible difficulty fails here
        lookups(random.Random(0), self.opening[-1])
        for field_name, names in (("shares", {*self.ladders}), ("rise_below", {*self.ladders, _LOOKUPS})):
            values = getattr(self, field_name)
            if set(values) != names or min(values.values()) <= 0:
                raise ValueError(f"{field_name} must be positive and name {', '.join(sorted(names))}, got {values}")
        if not 0 < self.decay <= 1 or not 0 <= self.finish <= 1:
            raise ValueError(f"decay and finish must be shares, got {self.decay} and {self.finish}")
        positive = [self.matrix_learning_rate, self.learning_rate, self.tokens, self.rows]
        if min(positive) <= 0 or not 0 < self.batch_tokens[0] <= self.batch_tokens[1]:
            raise ValueError("learning rates, tokens, rows and batch_tokens must be positive")

    @property
    def climbs(self) -> dict[str, list[int]]:
        """All ladders: that of the look-ups, then the families'."""
        return {_LOOKUPS: self.opening, **self.ladders}

    @classmethod
    def load(cls, path: Path | None = None) -> TrainingConfig:
        """From a JSON file; None takes the package's own."""
        text = (path or resources.files(__package__).joinpath("config.json")).read_text(encoding="utf-8")
        return cls(**json.loads(text))


@dataclass
class Progress:
    """Where training is. All of it is in the checkpoint.

    Attributes:
        step: optimisation steps done.
        tokens: tokens seen, questions and padding included.
        seconds: time spent.
        rungs: index into each family's ladder, and that of the look-ups; these are one past the end when done.
        losses: running mean of the loss at each top rung, at the end of a ladder of all batches; None after rising.
        seen: batches in it.
        spent: tokens of each family since the opening.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rungs: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float | None] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=dict)


class Trainer:
    """One training run in a folder: ``checkpoint.safetensors``, ``log.jsonl``, and the model."""

    def __init__(self, config: TrainingConfig, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config, self.folder = config, folder
        self.tokenizer = build_tokenizer(tuple(config.ladders))
        torch.manual_seed(config.seed)
        special = {
            "vocab_size": len(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "max_position_embeddings": 8192,
        }
        self.model = LlamaForCausalLM(LlamaConfig(**{**config.model, **special}))
        _initialise(self.model)
        named = dict(self.model.named_parameters())
        matrices = {name for name, p in named.items() if p.ndim == 2 and "embed" not in name and "lm_head" not in name}
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon([named[n] for n in sorted(matrices)], lr=config.matrix_learning_rate),
            torch.optim.AdamW(
                [p for n, p in sorted(named.items()) if n not in matrices], lr=config.learning_rate, weight_decay=0.0
            ),
        ]
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.progress = Progress(rungs=dict.fromkeys(config.climbs, 0), losses=dict.fromkeys(config.climbs))
        self.progress.seen, self.progress.spent = dict.fromkeys(config.climbs, 0), dict.fromkeys(config.ladders, 0)

    # ---- data ----

    def batch(self) -> tuple[str, int, Tensor, Tensor]:
        """The batch of the current step: family, difficulty, ids and labels, padded at the end."""
        rng = random.Random(f"{self.config.seed} {self.progress.step}")
        name = self._family()
        ladder = self.config.climbs[name][: self.progress.rungs[name] + 1]
        finishing = self.progress.tokens >= (1 - self.config.finish) * self.config.tokens
        at_top = (finishing or self._climbing(name)) and rng.random() < 0.5
        difficulty = ladder[-1] if at_top else rng.randint(ladder[0], ladder[-1])
        least, most = self.config.batch_tokens
        rows: list[tuple[list[int], list[int]]] = []
        size = 0
        while not rows or size < least or (len(rows) < self.config.rows and size < most):
            rows.append(self._row(rng, name, difficulty))
            size = len(rows) * max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), size // len(rows)), self.tokenizer.pad_token_id)
        labels = torch.full_like(ids, _IGNORED)
        for i, (row, learned) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, : len(row)] = torch.tensor(learned)
        return name, difficulty, ids, labels

    def _climbing(self, name: str) -> bool:
        """Whether there is something above the rung of ``name``: the families, for the look-ups."""
        return name == _LOOKUPS or self.progress.rungs[name] + 1 < len(self.config.ladders[name])

    def _row(self, rng: random.Random, name: str, difficulty: int) -> tuple[list[int], list[int]]:
        """Ids and labels of one problem."""
        if name == _LOOKUPS:
            question, thought, settled = lookups(rng, difficulty)
            prompt, solution = f"{BEGIN} {' '.join(question)} {THINK}", " ".join(thought)
        else:
            problem = TASKS.create(name).problem(rng.randrange(1 << 48), difficulty, "train")
            prompt, solution = prompt_text(problem), solution_text(problem)
            settled = [True] * len(solution.split())
        before, behind = self.tokenizer([prompt, solution]).input_ids
        learned = [i if known else _IGNORED for i, known in zip(behind, settled, strict=True)]
        return before + behind, [_IGNORED] * len(before) + learned

    def _family(self) -> str:
        """Whose turn it is: the look-ups', and once they are done the family's that has had least of its share."""
        if self.progress.rungs[_LOOKUPS] < len(self.config.opening):
            return _LOOKUPS
        return min(self.config.ladders, key=lambda name: self.progress.spent[name] / self.config.shares[name])

    # ---- training ----

    def step(self, rate: float) -> dict[str, Any]:
        """One optimisation step with learning rates times ``rate``; returns its line of the log."""
        name, difficulty, ids, labels = self.batch()
        hidden = self.model.model(input_ids=ids).last_hidden_state[:, :-1]
        learned = labels[:, 1:] != _IGNORED
        logits = self.model.lm_head(hidden[learned])  # the question's logits are never made
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, full in zip(groups, self.rates, strict=True):
            group["lr"] = full * rate
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += ids.numel()
        if name in self.progress.spent:
            self.progress.spent[name] += ids.numel()
        if not self._climbing(name) or difficulty == self.config.climbs[name][self.progress.rungs[name]]:
            self._climb(name, loss.item())
        return {"step": self.progress.step, "task": name, "difficulty": difficulty, "loss": round(loss.item(), 5)}

    def _climb(self, name: str, loss: float) -> None:
        """Follow the loss at the top rung, and take the next one when it is low."""
        progress, before = self.progress, self.progress.losses[name]
        mean = loss if before is None else 0.9 * before + 0.1 * loss
        progress.losses[name] = mean
        progress.seen[name] += 1
        if mean < self.config.rise_below[name] and progress.seen[name] >= 10 and self._climbing(name):
            progress.rungs[name] += 1
            progress.losses[name], progress.seen[name] = None, 0

    def rate(self) -> float:
        """What the learning rates are multiplied by now."""
        left = 1 - self.progress.tokens / self.config.tokens
        return min(1.0, (self.progress.step + 1) / _WARM_UP, max(0.02, left / self.config.decay))

    def run(self, every: float = 60.0) -> None:
        """Train until all tokens have been seen; a checkpoint every so many seconds, and the model at the end."""
        began, saved, lines = time.perf_counter() - self.progress.seconds, time.perf_counter(), []
        while self.progress.tokens < self.config.tokens:
            lines.append(self.step(self.rate()))
            self.progress.seconds = time.perf_counter() - began
            if time.perf_counter() - saved > every:
                self.save(lines)
                saved, lines = time.perf_counter(), []
                print(self._status(), flush=True)
        self.save(lines)
        self.export()

    def _status(self) -> str:
        progress = self.progress
        tops = [
            f"{name} {ladder[rung]} ({progress.losses[name] or float('nan'):.4f})"
            for name, rung in progress.rungs.items()
            if rung < len(ladder := self.config.climbs[name])
        ]
        share = progress.tokens / self.config.tokens
        return f"{progress.seconds / 60:.1f} min, step {progress.step}, {share:.1%}, top rungs: {', '.join(tops)}"

    # ---- files ----

    def save(self, lines: list[dict[str, Any]]) -> None:
        """Checkpoint: weights, optimizers, progress in one file; the log beside it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for i, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors.update({f"optimizer.{i}.{index}.{key}": torch.as_tensor(x) for key, x in state.items()})
        about = {"config": json.dumps(asdict(self.config)), "progress": json.dumps(asdict(self.progress))}
        contiguous = {name: x.contiguous().clone() for name, x in tensors.items()}
        write_atomically(self.folder / "checkpoint.safetensors", safetensors.torch.save(contiguous, about))
        log = self.folder / "log.jsonl"
        before = log.read_bytes() if log.exists() else b""
        write_atomically(log, before + "".join(json.dumps(line) + "\n" for line in lines).encode())

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, if there is one. The total of tokens may differ until rates fall.

        Raises:
            ValueError: it was begun with another configuration.
        """
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return False
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        before, now = json.loads(about["config"]), json.loads(json.dumps(asdict(self.config)))
        self.progress = Progress(**json.loads(about["progress"]))
        constant = (1 - self.config.decay) * min(before["tokens"], now["tokens"])
        if before | ({"tokens": now["tokens"]} if self.progress.tokens <= constant else {}) != now:
            raise ValueError(f"{path} was begun with another configuration: choose another folder")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        for i, optimizer in enumerate(self.optimizers):
            found = optimizer.state_dict()
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    _, _, index, key = name.split(".")
                    found["state"].setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict(found)
        return True

    def refine(self, model: Path) -> None:
        """Begin with a trained model's weights, every ladder at its top."""
        from transformers import LlamaForCausalLM

        trained = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.load_state_dict(trained.state_dict())
        self.progress.rungs = {name: len(ladder) - 1 for name, ladder in self.config.ladders.items()}
        self.progress.rungs[_LOOKUPS] = len(self.config.opening)

    def export(self) -> None:
        """The model in bfloat16 and its tokenizer, as plain transformers loads them."""
        target = self.folder / "model"
        self.model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        weights = self.model.state_dict()
        self.model.to(torch.bfloat16).save_pretrained(target)
        self.model.float().load_state_dict(weights)
        self.tokenizer.save_pretrained(target)


def _initialise(model: Any) -> None:
    """Weights at the scale of what they multiply: transformers' 0.02 takes several times as long to find look-ups.

    Some channels of the embedding begin as constants, which gives the first layers a bias.
    """
    residual = (2 * model.config.num_hidden_layers) ** -0.5
    for name, weight in model.named_parameters():
        if "embed" in name:
            torch.nn.init.normal_(weight)
            weight.data[:, :8] = 1.0
        elif "lm_head" in name:
            torch.nn.init.zeros_(weight)
        elif weight.ndim == 2:
            scale = residual if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of checkpoint, log and model.")],
    config: Annotated[Path | None, typer.Option(help="Training configuration (JSON).")] = None,
    weights: Annotated[Path | None, typer.Option(help="Model to refine: the curriculum begins at its end.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 2,
) -> None:
    """Train the small reasoner, or go on."""
    torch.set_num_threads(threads)
    trainer = Trainer(TrainingConfig.load(config), output)
    if trainer.resume():
        print(f"going on from step {trainer.progress.step}")
    elif weights is not None:
        trainer.refine(weights)
    trainer.run()


if __name__ == "__main__":
    typer.run(main)
