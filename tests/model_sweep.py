"""Every decoder that transformers knows, tiny and random: does a ragged cache serve it, and is it right?

    python tests/model_sweep.py            # all types, minutes; writes docs/models.md
    python tests/model_sweep.py llama gpt2 # some, printed

A type is served if its texts equal those of transformers' own cache while nothing is evicted, and its logits those of
the masked reference when something is. Otherwise it must be refused when the cache is made.
"""

import copy
import os
import re
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from reference import compression, follow_reference, prompts, random_chunks
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import reasonalloc as ra

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGE_TEXT = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
TYPES = sorted({*CAUSAL, *IMAGE_TEXT})
# What a type's default configuration has, and some of its models have not.
WITHOUT_WINDOW = {"sliding_window": None}
NEED_IMAGES = {"blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2"}
STEPS = 24
TOLERANCE = 1e-3  # in float32, of logits of about 1; evicted tokens change them by far more


@dataclass(frozen=True)
class Outcome:
    """What came of a type.

    Attributes:
        kind: "equal", "refused", "not tried" (its tiny model cannot be made, or does not run by itself) or "wrong".
        why: what is served or refused and why, in one sentence; empty if there is nothing to say.
    """

    kind: str
    why: str = ""


def outcome(model_type: str) -> Outcome:
    """Try a type: its default configuration if that is refused, otherwise a tiny model."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:
        return Outcome("not tried", f"it has no default configuration: {_line(error)}")
    try:
        default = _refusal(config)
    except Exception as error:
        return Outcome("wrong", f"making the cache: {_line(error)}")
    changes, note = {}, ""
    if default:
        changes, note = WITHOUT_WINDOW, "without its sliding window"
    if default and not _takes(model_type, changes):
        return Outcome("refused", default)
    try:
        config = tiny_config(model_type, **changes)
    except Exception as error:
        return (
            Outcome("refused", default) if default else Outcome("not tried", f"no tiny configuration: {_line(error)}")
        )
    try:
        refused = _refusal(config)
    except Exception as error:
        return Outcome("wrong", f"making the cache: {_line(error)}")
    if refused:
        return Outcome("refused", default or refused)
    found = _compared(model_type, config)
    return Outcome(found.kind, found.why or note)


def _takes(model_type: str, changes: dict) -> bool:
    config = CONFIG_MAPPING[model_type]()
    if any(getattr(config, name, None) is None for name in changes) or getattr(config, "layer_types", None):
        return False
    try:
        return not _refusal(CONFIG_MAPPING[model_type](**changes))
    except Exception:  # it always has one
        return False


def _refusal(config) -> str:
    try:
        ra.Cache(config, compression("reasonalloc"))
    except ra.UnsupportedModelError as error:
        return str(error)
    return ""


def _compared(model_type: str, config) -> Outcome:
    try:
        stock = _model(model_type, config)
        ids, mask = prompts((9, 17))
        wanted = _generated(stock, ids, mask, DynamicCache(config=stock.config))
    except ImportError as error:
        return Outcome("not tried", f"a package is missing: {_line(error).partition('.')[0]}")
    except Exception as error:
        if model_type in NEED_IMAGES:
            return Outcome("not tried", "it takes an image with every prompt")
        return Outcome("not tried", f"the tiny model does not run by itself: {_line(error)}")
    ours = copy.deepcopy(stock)
    try:
        ours.set_attn_implementation("reasonalloc")
        cache = ra.Cache(ours.config, ra.Compression.method("full"))
    except ra.UnsupportedModelError as error:
        return Outcome("refused", str(error))
    except Exception as error:
        return Outcome("wrong", f"making the cache: {_line(error)}")
    try:
        got = _generated(ours, ids, mask, cache)
        difference = _difference(got, wanted)
        if difference > TOLERANCE:
            return Outcome("wrong", f"with everything kept logits differ by {difference:.2g}")
        if cache.get_seq_length() != ids.shape[1] + STEPS - 1:
            return Outcome("wrong", f"the cache has seen {cache.get_seq_length()} tokens")
        cache.reset()
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
        text = ours.generate(ids, past_key_values=cache, custom_generate=ra.decoding_loop, **options)
        if not torch.equal(text[:, ids.shape[1] :], wanted.argmax(-1).T):
            return Outcome("wrong", "the decoding loop writes another text")
        return _evicted(stock, ours)
    except Exception as error:
        return Outcome("wrong", f"generating: {_line(error)}")


def _evicted(stock, ours) -> Outcome:
    reference, found, ends = copy.deepcopy(stock), [], []
    reference.set_attn_implementation("masked-reference")

    def check(ragged, wanted, step):
        found.append(_difference(ragged, wanted))
        ends.append(ragged)

    chunks, last = random_chunks((9, 40), STEPS), []
    for kept in (compression("rkv"), ra.Compression.method("full")):
        cache = ra.Cache(ours.config, kept)
        follow_reference(ours, reference, cache, chunks, check)
        if kept.budget and not cache.stats().evicted:
            return Outcome("wrong", "nothing was evicted")
        last.append(ends[-1])
    if max(found) > TOLERANCE:
        return Outcome("wrong", f"under eviction logits differ by {max(found):.2g}")
    change = _difference(*last)
    if change < 10 * max(found):
        return Outcome("wrong", f"eviction changes the logits by {change:.2g} alone: nothing was tested")
    return Outcome("equal")


def _model(model_type: str, config):
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModelForImageTextToText
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _generated(model, ids, mask, cache) -> torch.Tensor:
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(out.logits)


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    scale = max(float(wanted[wanted.isfinite()].abs().max()), 1.0)
    return float((got - wanted).nan_to_num(0.0).abs().max()) / scale if got.shape == wanted.shape else float("inf")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _reason(why: str) -> str:
    """What differs from one refusal to the next."""
    return re.sub(r"^a ragged cache cannot serve this \S+ model: (.*)\. Use transformers' own .*$", r"\1", why)


def report(outcomes: dict[str, Outcome]) -> str:
    """``docs/models.md``."""
    counts = Counter(found.kind for found in outcomes.values())
    lines = [
        "# Supported models",
        "",
        f"Of the {len(outcomes)} types of text decoders and image-text models in transformers "
        f"{transformers.__version__}, {counts['equal']} are served, {counts['refused']} are refused when the "
        f"cache is made, and {counts['not tried']} were not tried. Written by `python tests/model_sweep.py`.",
        "",
        "* **equal**: a tiny random model, given text alone, writes what it writes with transformers' own cache while "
        "nothing is evicted (`generate` and `decoding_loop`, a padded batch), and under eviction its logits are those "
        "of a full cache whose masks hide the evicted tokens.",
        "* **refused**: `reasonalloc.Cache(model.config, ...)` says why, in one sentence, for the type's default "
        "configuration. A model of the type without what is refused may be served.",
        "* **not tried**: no tiny model of it could be made, or it does not run on text alone.",
        "",
        "| type | outcome | |",
        "|---|---|---|",
    ]
    for model_type, found in outcomes.items():
        why = _reason(found.why).replace("|", "\\|")
        lines.append(f"| {model_type} | {found.kind} | {why} |")
    return "\n".join(lines) + "\n"


def main(types: list[str]) -> None:
    """Print the outcome of each type; write the document after all of them."""
    outcomes = {}
    for model_type in types or TYPES:
        began = time.perf_counter()
        found = outcomes[model_type] = outcome(model_type)
        print(f"{model_type}: {found.kind}, {time.perf_counter() - began:.1f} s. {_reason(found.why)}", flush=True)
    if not types:
        DOCUMENT.write_text(report(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
