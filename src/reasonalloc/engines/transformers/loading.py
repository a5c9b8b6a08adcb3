"""Loading a model and its tokenizer from a folder, a GGUF file or the hub, ready for a ragged cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import AutoTokenizer

from reasonalloc.engines.models import ATTENTION_NAME
from reasonalloc.engines.transformers.checkpoint import whole_model
from reasonalloc.engines.transformers.gguf import check_packages, load_gguf

BUILT_IN = "reasonalloc/reasoner"  # the small reasoner that comes with this package
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PATIENCE = 10.0  # seconds that the model hub has for an answer


def quiet() -> None:
    """Silence transformers' progress bars and warnings: the command line has its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


def to_stderr(text: str) -> None:
    """Print a line."""
    print(text, file=sys.stderr, flush=True)


def load(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    tensor_parallel: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = to_stderr,
) -> tuple[Any, Any]:
    """Model (in evaluation mode, attention set) and tokenizer.

    Args:
        model: a local folder, a local ``.gguf`` file, a hub id, or "reasonalloc/reasoner", the built-in one.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: "auto" (CUDA if there is one), or any torch device.
        tensor_parallel: share the model with the other processes that ``torchrun`` started, by the plan that
            transformers has for it.
        progress: called with (tensors done, all tensors) while a GGUF file is converted, which takes minutes.
        say: gets a sentence about converted weights that are kept in the user's cache folder.

    Raises:
        ValueError: an unknown dtype, a device that is not there, a model that cannot be loaded (the message says from
            where and why) or lacks weights, or tensor parallelism without other processes.
        ImportError: a GGUF file without the packages that read it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if tensor_parallel and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError("tensor parallelism needs several processes: start with torchrun --nproc-per-node N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "attn_implementation": ATTENTION_NAME}
    path = local_path(model)
    if path is not None and path.suffix == ".gguf":
        check_packages()
    if path is None:
        options["local_files_only"] = not on_hub(model)
    if tensor_parallel:
        options.update(_shared_options())
    with _in_one_sentence(f"cannot load {model!r}"):
        if path is not None and path.suffix == ".gguf":
            network, tokenizer = load_gguf(path, dtype, options, progress, say, keep=not tensor_parallel)
            network.config.name_or_path = str(path)  # not the folder, which may hold several
        else:
            source, local = model if path is None else str(path), options.get("local_files_only", False)
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            network = whole_model(source, **options)
    return (network if tensor_parallel else network.to(device)).eval(), tokenizer


def local_path(model: str) -> Path | None:
    """Where a model lies on this machine; None for a hub id.

    Raises:
        ValueError: it is the name of a path, and no model is there.
    """
    path = built_in_folder() if model == BUILT_IN else Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no GGUF file at {path}")
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no model's folder: it holds no config.json")
        return path
    if path.is_file():
        raise ValueError(f"{path} is no model: a model is a folder with a config.json, a .gguf file or a hub id")
    if path.is_absolute() or model.startswith((".", "~")):
        raise ValueError(f"no model folder at {path}")
    return None


def on_hub(model: str) -> bool:
    """Ask the model hub once whether it has a model, where downloads would be tried again and again.

    Returns:
        Whether files may be fetched; False: the hub cannot be reached, and what an earlier download left is used.

    Raises:
        ValueError: no name of a model, a model that the hub does not have, or no hub and nothing downloaded before.
    """
    try:
        huggingface_hub.HfApi().model_info(model, timeout=_PATIENCE)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"cannot load {model!r}: it is no local folder, and the model hub shows you no model of this name"
        ) from error
    except HfHubHTTPError:  # an answer, though not to this question: a download will say more
        return True
    except Exception as error:
        if isinstance(huggingface_hub.try_to_load_from_cache(model, "config.json"), str):
            return False
        raise ValueError(
            f"cannot load {model!r}: it is no local folder, and the model hub cannot be reached ({_reason(error)})"
        ) from error
    return True


def check_device(device: str) -> None:
    """Raise ``ValueError`` for a device that is none, or that cannot hold numbers here."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # an AssertionError, a RuntimeError, a NotImplementedError: each kind has its own
        raise ValueError(f"device {device!r} cannot be used here, ask for cpu or auto ({_reason(error)})") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on any device."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error) or "out of memory" in str(error)


@contextmanager
def _in_one_sentence(what: str) -> Iterator[None]:
    """Whatever is wrong with a model's files becomes a ``ValueError`` of one line; no memory stays what it is."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what}: {_reason(error)}") from error
    except Exception as error:  # each format has its own: struct.error, SafetensorError, KeyError, ...
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{what}: {_reason(error)}; is it whole, and of a kind that transformers {transformers.__version__} knows?"
        ) from error


def _reason(error: Exception) -> str:
    """An error as one line of at most 300 letters, with its kind where that says more than the text."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not isinstance(error, ValueError | OSError | ImportError | RuntimeError | AssertionError) or not text:
        kind, module = type(error).__name__, type(error).__module__
        text = f"{kind if module == 'builtins' else f'{module}.{kind}'}: {text}".removesuffix(": ")
    return text if len(text) <= 300 else text[:297] + "..."


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


def end_tokens(config: Any) -> set[int]:
    """Tokens that end a text, by a ``generation_config`` or a model's own configuration; none if it names none."""
    ends = getattr(config, "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


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
