"""Likelihoods against the full cache with a mask of its own for every head, and against the harness's own model."""

from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from reference import follow_reference, method_of, tiny_model, tiny_profile, word_tokenizer

import reasonalloc as ra
from reasonalloc.harness.model import CompressedLM

METHODS = ["full", "rkv", "h2o", "reasonalloc", "sensitivity", "random-pin"]
INTERVAL, BUDGET = 16, 24


def lm(method, batch_size=4, max_length=None):
    given = {} if method == "full" else {"budget": BUDGET, "interval": INTERVAL}
    if method == "sensitivity":
        given["profile"] = tiny_profile()
    if method == "random-pin":
        given["pin_share"] = 0.25
    given.update(tokenizer=word_tokenizer(), batch_size=batch_size, max_length=max_length)
    return CompressedLM(pretrained=tiny_model(dtype=torch.float64), method=method, **given)


def stock(batch_size=4, **changes):
    model = tiny_model(dtype=torch.float64, attention="sdpa")
    return HFLM(pretrained=model, tokenizer=word_tokenizer(), batch_size=batch_size, softmax_dtype="float32", **changes)


def words(count, seed):
    drawn = torch.randint(2, 97, (count,), generator=torch.Generator().manual_seed(seed))
    return [f"w{i}" for i in drawn.tolist()]


def request(*arguments):
    return SimpleNamespace(args=arguments, task_name="made up")


def masked(compression, prompt, answer):
    """Log-probabilities ``[answer, vocabulary]`` by the reference, which decodes token by token."""
    model, reference = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64, attention="masked-reference")
    rows, one = [], torch.ones(1, 1, dtype=torch.long)
    chunks = [(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long))]
    chunks += [(torch.tensor([[token]]), one) for token in answer[:-1]]
    follow_reference(
        model, reference, ra.Cache(model.config, compression), chunks, lambda _, full, step: rows.append(full[0])
    )
    return torch.stack(rows).log_softmax(-1)


def by_reference(compression, prompt, answer):
    """What a request must be answered with."""
    log_probs = masked(compression, prompt, answer)
    found = log_probs.gather(-1, torch.tensor(answer)[:, None]).sum()
    return float(found), log_probs.argmax(-1).tolist() == answer


def compression_of(method):
    changes = {"pin_share": 0.25} if method == "random-pin" else {}
    return method_of(method, BUDGET, interval=INTERVAL, **changes)


def ids(text):
    return [int(word[1:]) for word in text]


@pytest.mark.parametrize("method", METHODS)
def test_likelihoods_are_those_of_the_masked_reference(method):
    """Long and short contexts, one of them for several continuations, one empty; continuations of 1 to 70 tokens."""
    long, short = words(60, 1), words(9, 2)
    pairs = [(long, words(70, 3)), (long, words(1, 4)), (long, words(40, 5)), (short, words(50, 6)), ([], words(45, 7))]
    own = lm(method, batch_size=1 if method == "random-pin" else 4)
    found = own.loglikelihood(
        [request(" ".join(context), " " * bool(context) + " ".join(text)) for context, text in pairs], disable_tqdm=True
    )
    for (context, text), (score, greedy) in zip(pairs, found, strict=True):
        expected = by_reference(compression_of(method), ids(context) or [1], ids(text))
        assert (score, greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])
    if method != "full":
        assert (own.get_model_info()["reasonalloc"]["texts"], own.get_model_info()["reasonalloc"]["texts_evicted"]) == (
            5,
            4,
        )
        dense = stock().loglikelihood([request(" ".join(long), " " + " ".join(pairs[0][1]))], disable_tqdm=True)
        assert abs(found[0][0] - dense[0][0]) > 0.1, "nothing was forgotten"


def test_greedy_continuations_are_known_as_such():
    context, model, compression = words(60, 1), tiny_model(dtype=torch.float64), compression_of("rkv")
    prompt, cache = torch.tensor([ids(context)]), ra.Cache(model.config, compression)
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=40, do_sample=False)
    written = out[0, prompt.shape[1] :].tolist()
    assert by_reference(compression, ids(context), written)[1]
    texts = [written, [*written[:-1], 2 if written[-1] != 2 else 3]]
    found = lm("rkv").loglikelihood(
        [request(" ".join(context), " " + " ".join(f"w{i}" for i in text)) for text in texts], disable_tqdm=True
    )
    assert [greedy for _, greedy in found] == [True, False]
    dense = stock()
    text = " " + " ".join(f"w{i}" for i in written)
    assert not dense.loglikelihood([request(" ".join(context), text)], disable_tqdm=True)[0][1]


@pytest.mark.parametrize("method", ["rkv", "reasonalloc"])
def test_batches_change_nothing(method):
    requests = [
        request(" ".join(words(10 + 7 * (i % 3), i % 3)), " " + " ".join(words(1 + 13 * i % 60, 10 + i)))
        for i in range(8)
    ]
    alone, together = (lm(method, size).loglikelihood(requests, disable_tqdm=True) for size in (1, 5))
    for one, other in zip(alone, together, strict=True):
        assert one == (pytest.approx(other[0], abs=1e-4), other[1])


def test_the_full_cache_scores_as_the_harness_does():
    requests = [request(" ".join(words(20 + i, i)), " " + " ".join(words(1 + 5 * i, 10 + i))) for i in range(6)]
    found, expected = (one.loglikelihood(requests, disable_tqdm=True) for one in (lm("full"), stock()))
    for one, other in zip(found, expected, strict=True):
        assert one == (pytest.approx(other[0], abs=1e-4), other[1])
    texts = [request(" ".join(words(count, count))) for count in (5, 100)]
    found, expected = (
        one.loglikelihood_rolling(texts, disable_tqdm=True) for one in (lm("full", max_length=48), stock(max_length=48))
    )
    assert found == pytest.approx(expected, abs=1e-4)


def test_whole_texts_are_decoded_from_their_first_token_window_by_window():
    """Of 100 tokens and windows of 48, the last one has the tokens before it as its prompt, as in the harness."""
    text = words(100, 1)
    found = lm("rkv", max_length=48).loglikelihood_rolling([request(" ".join(text))], disable_tqdm=True)
    tokens, compression = ids(text), compression_of("rkv")
    windows = [([1], tokens[:48]), (tokens[47:48], tokens[48:96]), (tokens[51:96], tokens[96:])]
    assert found == pytest.approx([sum(by_reference(compression, *window)[0] for window in windows)], abs=1e-3)
    dense = stock(max_length=48).loglikelihood_rolling([request(" ".join(text))], disable_tqdm=True)
    assert abs(found[0] - dense[0]) > 0.1, "nothing was forgotten"


def test_long_contexts_are_cut_as_the_harness_cuts_them():
    context, text = words(80, 1), words(30, 2)
    (found,) = lm("rkv", max_length=64).loglikelihood(
        [request(" ".join(context), " " + " ".join(text))], disable_tqdm=True
    )
    assert found[0] == pytest.approx(by_reference(compression_of("rkv"), ids(context)[-35:], ids(text))[0], abs=1e-3)
    with pytest.raises(ValueError, match="a continuation of 70 tokens is longer than the model's 64"):
        lm("rkv", max_length=64).loglikelihood([request("w3", " " + " ".join(words(70, 1)))], disable_tqdm=True)
