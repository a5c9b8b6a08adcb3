"""The harness's model type "reasonalloc". Importing this module makes it known to the harness."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from reasonalloc.calibration.auto import auto_profile
from reasonalloc.engines.models import ATTENTION_NAME
from reasonalloc.engines.transformers.cache import Cache
from reasonalloc.engines.transformers.checkpoint import whole_model
from reasonalloc.engines.transformers.generation import decoding_loop
from reasonalloc.engines.transformers.loading import check_device, local_path
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.evaluation.fidelity import Trace, read_together
from reasonalloc.evaluation.footprint import Footprint
from reasonalloc.harness.arguments import Arguments
from reasonalloc.harness.stopping import Until
from reasonalloc.policies.compression import AUTO_PROFILE, Compression
from reasonalloc.version import __version__

_OWN = [name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")]
_KEY = "reasonalloc"  # in results, and in a file of kept answers
_PLACE = ("batch_size", "max_batch_size", "device")  # how the work is done, not what comes out
_log = logging.getLogger(__name__)
Request = tuple[Any, list[int], list[int]]  # what it is kept under, the context's tokens, the continuation's


def _device(wanted: str | None) -> str:
    """The device, once it is known to be there. The harness's command asks for "cuda:0" where nobody asks for any."""
    if wanted in (None, "cuda:0") and not torch.cuda.is_available():
        return "cpu"
    check_device(wanted or "cuda")
    return wanted or "cuda"


class _Loader:
    """In the place of transformers' ``AutoModelForCausalLM``: the attention is ours, and no weight may be missing."""

    @staticmethod
    def from_pretrained(source: str, **options: Any) -> Any:
        return whole_model(source, attn_implementation=ATTENTION_NAME, **options)


@register_model("reasonalloc")
class CompressedLM(HFLM):
    """The harness's own model for transformers, in which every text has a compressed cache.

    A text that is written has a fresh cache. Of a text that is scored, the context is the prompt, and the continuation
    is read as if it were decoded after it. With ``method=full`` it is scored as the harness does, in one dense pass.

    Attributes:
        compression: the cache.

    Raises:
        ValueError: an argument that is wrong, see ``Arguments``, a device or a folder that is not there, weights that
            are missing, or a profile of another model. All but the weights are looked at before the model is loaded.
        UnsupportedModelError: a ragged cache cannot serve this kind of model; before it is loaded, too.
    """

    AUTO_MODEL_CLASS = _Loader

    def __init__(self, **arguments: Any) -> None:
        asked = Arguments.of(arguments, _OWN)
        self.compression, self._most_written = asked.compression, asked.max_gen_toks
        self._texts = self._evicted = 0  # written or scored, and those of which a token was dropped before their end
        own = dict(asked.own)
        self._asked = {name: str(value) for name, value in own.items() if name not in _PLACE}
        if isinstance(own["pretrained"], str):
            path = None if own.get("gguf_file") else local_path(own["pretrained"])
            own["pretrained"] = own["pretrained"] if path is None else str(path)
            own["device"] = _device(own.get("device"))
        else:
            own["pretrained"].set_attn_implementation(ATTENTION_NAME)
            self._check(own["pretrained"].config)
        super().__init__(**own)
        if self.compression.profile == AUTO_PROFILE:
            profile = auto_profile(self.config, self.compression, self.model, self.tokenizer)
            self.compression = self.compression.replace(profile=profile)

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        super()._get_config(*args, **kwargs)
        self._check(self.config)

    def _check(self, config: Any) -> None:
        """Whether this model can have this cache; of a profile that is still to be made nothing is known."""
        made = self.compression.profile != AUTO_PROFILE
        Cache(config, self.compression if made else Compression.method("full"))

    @property
    def max_gen_toks(self) -> int:
        """The longest answer in tokens, where a task names none."""
        return self._most_written

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Continue a left-padded batch: ``[rows, columns]``, padded at the end. Rows leave it as they finish."""
        if not options.get("do_sample"):
            options = {**options, "do_sample": False}
            options.pop("temperature", None)
        options["use_cache"] = True  # whatever the model was saved with after its training
        columns, cache, footprint = context.shape[1], Cache(self.config, self.compression), Footprint(len(context))
        found: Tensor = self.model.generate(
            input_ids=context,
            max_new_tokens=max_length - columns,
            stopping_criteria=[Until(self.tokenizer, stop, columns)],
            pad_token_id=self.tokenizer.pad_token_id,
            custom_generate=decoding_loop,
            on_step=lambda rows, _: footprint.look(cache, rows.tolist()),
            **{CACHE_ARGUMENT: cache},
            **options,
        )
        self._count(footprint.evicted)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For every request the continuation's log-likelihood, and whether greedy decoding would have written it.

        Requests with one context are neighbours, so that it is read once for those of them that share a batch.
        """
        if self.compression.budget is None:
            dense: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return dense
        texts = [self._cut(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i][0]), texts[i][0], -len(texts[i][1])))
        size = override_bs or self.batch_size
        batches = [
            group[first : first + size]
            for group in ([i for i in order if len(texts[i][0]) > 1], [i for i in order if len(texts[i][0]) == 1])
            for first in range(0, len(group), size)
        ]
        results: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(order), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for batch in batches:
            traces = [Trace(f"request {i}", torch.tensor(texts[i][0]), torch.tensor(texts[i][1])) for i in batch]
            found = read_together(self.model, traces, self.compression)
            self._count([read.evicted for read in found])
            for i, read in zip(batch, found, strict=True):
                results[i] = (-float(read.nll.sum(dtype=float)), bool(read.likeliest.all()))
                if requests[i][0] is not None:  # parts of a longer text have no name
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
            bar.update(len(batch))
        bar.close()
        return [results[i] for i in range(len(requests))]

    def _count(self, evicted: Sequence[bool]) -> None:
        self._texts, self._evicted = self._texts + len(evicted), self._evicted + sum(evicted)

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A context that fits into the model's length together with its continuation, of which the last token is not
        read. Cut on the left, as the harness does.

        Raises:
            ValueError: the continuation alone is longer.
        """
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than the model's {self.max_length}: choose "
                "another task, or a max_length that the model can bear"
            )
        if len(context) > room:
            _log.warning("a context of %d tokens is cut to its last %d, the model's length", len(context), room)
        return context[-room:], continuation

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Answers kept by ``--use_cache`` do not say of which cache they are; so the file says it.

        Raises:
            ValueError: the file's answers are of another model, cache or way to load it.
        """
        super().set_cache_hook(cache_hook)
        kept, own = cache_hook.dbdict, {**self._asked, "longest": self.max_gen_toks, **self.compression.describe()}
        if kept is None:
            return
        if len(kept) and kept.get(_KEY) != own:
            raise ValueError("the file of --use_cache holds answers of other model arguments: name another file")
        kept[_KEY] = own

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model: the harness's own part, the cache, and how often it forgot anything."""
        own = {"version": __version__, **self.compression.describe()}
        if self.compression.budget is not None:
            own |= {"texts": self._texts, "texts_evicted": self._evicted}
        return {**super().get_model_info(), _KEY: own}
