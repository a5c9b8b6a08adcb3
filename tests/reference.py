"""Tiny random models, and the independent reference: a full cache with a mask per (layer, sequence, head).

The reference shares no code with the ragged cache. It keeps every token, attends eagerly, and is only told, before
each step, which tokens each head still holds; its logits must then be those of the ragged cache.
"""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import sdpa_mask

import reasonalloc as ra
from reasonalloc.policies.allocation import MissGrid, PromptDemand

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_KEPT = {}


def tiny_model(kind="llama", dtype=torch.float32, attention="reasonalloc", **changes):
    """A random model, the same for the same arguments, whose attention is sharp enough to matter."""
    config_class, model_class = ARCHITECTURES[kind]
    sizes = {**SIZES, **changes}
    if kind == "qwen2":
        sizes.pop("head_dim")
    if kind == "mistral":
        sizes["sliding_window"] = None
    torch.manual_seed(0)
    model = model_class(config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model = model.to(dtype)
    model.set_attn_implementation(attention)
    return model


def tiny_profile(seed=0):
    """A profile of ``tiny_model`` with everything that allocators read, at random."""
    rng, curves = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    grids = {"rkv": MissGrid((10, 16, 32, 64, 128), 16)}
    prompts = [
        PromptDemand(
            f"{i}",
            10,
            rng.integers(100, 900, (1, 3, 6)).astype(float),
            {"rkv": np.sort(rng.random((5, 3, 3)), axis=0)[::-1] * 10},
            tokens=10,
            sensitivity=rng.normal(0.3, 0.3, (3, 3)),
            losses={"rkv": np.sort(curves.random((5, 3, 3)), axis=0)[::-1]},
        )
        for i in range(3)
    ]
    return ra.DemandProfile(ra.ModelShape(3, 3, 6, 16), (0.93,), tuple(prompts), grids=grids)


def method_of(name, budget, **changes):
    """A method by name; those that need a profile get a random one, and the full cache no budget."""
    if name in ("missalloc", "lossalloc", "sensitivity"):
        changes = {"profile": tiny_profile(), **changes}
    return ra.Compression.method(name, None if name == "full" else budget, **changes)


def word_tokenizer():
    """One token for each of the words w2 to w96 that the tiny models know."""
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 97)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


def prompts(lengths, seed=1):
    """Left-padded random prompts and their mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(2, 97, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return ids, mask


class _Full(DynamicCache):
    """Knows whose keys are attended to next: a module may serve several layers of the cache."""

    layer = 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        _Full.layer = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _masked_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    batch, heads, length, _ = key.shape
    queries, group = query.shape[2], query.shape[1] // key.shape[1]
    if attention_mask is None:
        attention_mask = torch.ones(batch, 1, queries, length, dtype=torch.bool).tril(length - queries)
    mask = attention_mask.expand(batch, heads, queries, length).clone()
    if _Full.layer in _KEPT:
        kept = _KEPT[_Full.layer]
        mask[..., : kept.shape[-1]] &= kept[:, :, None]
    mask = mask.repeat_interleave(group, 1)
    logits = (query @ key.repeat_interleave(group, 1).transpose(-1, -2)) * scaling
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num()
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("masked-reference", _masked_attention)
AttentionMaskInterface.register("masked-reference", sdpa_mask)


def kept_columns(cache, layer, columns):
    """Which columns of the text (padding included) each head of a layer holds: ``[batch, heads, len]``.

    ``columns[b]`` lists the columns of the real tokens of sequence b.
    """
    tokens = cache.ragged.tokens(layer)
    batch, heads = tokens.lengths.shape
    kept = torch.zeros(batch, heads, cache.get_seq_length(), dtype=torch.bool)
    for b in range(batch):
        where = torch.tensor(columns[b])
        for h in range(heads):
            length = int(tokens.lengths[b, h])
            positions = tokens.positions[b, h, :length]
            assert len(set(positions.tolist())) == length, "a token is stored twice"
            kept[b, h, where[positions]] = True
    return kept


def follow_reference(model, reference, cache, chunks, check):
    """Feed ``chunks`` of (ids, mask) to both models; ``check(ragged, full, step)`` compares the last logits.

    The text is the ragged model's business alone: both get the same tokens.
    """
    _KEPT.clear()
    full = _Full(config=reference.config)
    batch = chunks[0][0].shape[0]
    seen = torch.zeros(batch, 0, dtype=torch.long)
    for step, (ids, mask) in enumerate(chunks):
        seen = torch.cat([seen, mask], 1)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"attention_mask": seen, "position_ids": positions}
        with torch.no_grad():
            ragged = model(ids, past_key_values=cache, **inputs).logits[:, -1]
            wanted = reference(ids, past_key_values=full, **inputs).logits[:, -1]
        check(ragged, wanted, step)
        columns = [row.nonzero().flatten().tolist() for row in seen]
        for layer in range(len(cache.layers)):
            _KEPT[layer] = kept_columns(cache, layer, columns)


def random_chunks(lengths, steps, seed=2):
    """A left-padded prompt, then ``steps`` single tokens."""
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(len(lengths), 1, dtype=torch.long)
    decoded = [(torch.randint(2, 97, (len(lengths), 1), generator=generator), ones) for _ in range(steps)]
    return [prompts(lengths), *decoded]


def compression(method, budget=24, interval=16, **changes):
    """A method at a tiny budget; VaSE's window of 64 tokens is cut down to fit, and so is a pinned prompt."""
    if method in ("vase", "vase-queryfree"):
        changes = {"window": 8, **changes}
    if method == "random-pin":
        changes = {"pin_share": 0.25, **changes}
    return method_of(method, budget, interval=interval, **changes)
