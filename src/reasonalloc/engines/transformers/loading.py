"""Loading a model and its tokenizer from a folder, a GGUF file or the hub, ready for a ragged cache."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonalloc.engines.models import ATTENTION_NAME

BUILT_IN = "reasonalloc/reasoner"  # the small reasoner that comes with this package
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quiet() -> None:
    """Silence transformers' progress bars and warnings: the command line has its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"  # the GGUF reader brings its own bar


def load(model: str, dtype: str = "auto", device: str = "auto", tensor_parallel: bool = False) -> tuple[Any, Any]:
    """Model (in evaluation mode, attention set) and tokenizer.

    Args:
        model: a local folder, a local ``.gguf`` file, a hub id, or "reasonalloc/reasoner", the built-in one.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "auto" (CUDA if there is one), or any torch device.
        tensor_parallel: share the model with the other processes that ``torchrun`` started, by the plan that
            transformers has for it.

    Raises:
        ValueError: an unknown dtype, a model that cannot be loaded (the message says from where), or tensor
            parallelism without other processes.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if tensor_parallel and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError("tensor parallelism needs several processes: start with torchrun --nproc-per-node N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = built_in_folder() if model == BUILT_IN else Path(model).expanduser()
    options: dict[str, Any] = {}
    source = model
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no GGUF file at {path}")
        source, options = str(path.parent), _gguf_options(path.name)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no model's folder: it holds no config.json")
        source = str(path)
    elif path.is_absolute() or model.startswith((".", "~")):
        raise ValueError(f"no model folder at {path}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **{k: v for k, v in options.items() if k == "gguf_file"})
        if tensor_parallel:
            options.update(_shared_options())
        network = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], attn_implementation=ATTENTION_NAME, **options
        )
    except OSError as error:
        raise ValueError(
            f"cannot load {model!r}: it is no local folder, and the model hub does not have it or cannot be reached"
        ) from error
    if path.suffix == ".gguf":
        network.config.name_or_path = str(path)  # not the folder, which may hold several
    return (network if tensor_parallel else network.to(device)).eval(), tokenizer


def ranks(model: Any) -> int:
    """How many tensor-parallel processes share a model."""
    return getattr(model, "tp_size", None) or 1


def _shared_options() -> dict[str, Any]:
    """How this transformers is told to share a model among processes."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # before it knew plans
        return {"tp_plan": "auto"}


def built_in_folder() -> Path:
    """Where the built-in reasoner lies."""
    return Path(str(resources.files("reasonalloc") / "reasoner" / "model"))


def model_name(config: Any) -> str:
    """Where a loaded model came from, as ``load`` takes it: the built-in reasoner's folder differs by machine."""
    name: str = config.name_or_path
    return BUILT_IN if name and Path(name) == built_in_folder() else name


def _gguf_options(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"gguf_file": name}
    try:
        from transformers import GgufConfig
    except ImportError:  # before 5.23 GGUF weights are always dequantised
        return options
    return {**options, "quantization_config": GgufConfig(dequantize=True)}


def encode(tokenizer: Any, questions: list[str], chat: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """Left-padded inputs for ``generate``; with ``chat`` each question becomes a user's turn of the model's template.

    Raises:
        ValueError: an empty question.
    """
    if any(not question.strip() for question in questions):
        raise ValueError("the prompt is empty")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat and tokenizer.chat_template:
        turns = [[{"role": "user", "content": question}] for question in questions]
        questions = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
        batch = tokenizer(questions, return_tensors="pt", padding=True, add_special_tokens=False)
    else:
        batch = tokenizer(questions, return_tensors="pt", padding=True)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
