"""Teacher forcing by intervals must equal decoding token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import method_of, tiny_model, word_tokenizer

import reasonalloc as ra
from reasonalloc.evaluation import Trace, make_trace, teacher_force
from reasonalloc.evaluation.fidelity import read_together


def trace_of(prompt=50, answer=90):
    ids = torch.randint(2, 97, (prompt + answer,), generator=torch.Generator().manual_seed(1))
    return Trace("one", ids[:prompt], ids[prompt:])


def token_by_token(model, trace, compression):
    cache = ra.Cache(model.config, compression)
    with torch.no_grad():
        rows = [model(trace.prompt[None], past_key_values=cache).logits[0, -1]]
        for token in trace.answer[:-1]:
            rows.append(model(token[None, None], past_key_values=cache).logits[0, -1])
    return torch.stack(rows).log_softmax(-1), cache


METHODS = sorted(set(ra.METHODS) - {"random", "vase", "vase-queryfree"})


@pytest.mark.parametrize("prompt", ["compete", "protect"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_decoding_token_by_token(method, prompt):
    model = tiny_model(dtype=torch.float64)
    trace, compression = trace_of(), method_of(method, 32, interval=16, prompt=prompt)
    expected, _ = token_by_token(model, trace, compression)
    full = teacher_force(model, trace, ra.Compression.method("full"), keep_log_probs=True)
    found = teacher_force(model, trace, compression, full, keep_log_probs=True)
    assert found.log_probs.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert found.nll == pytest.approx(-expected.gather(-1, trace.answer[:, None]).squeeze(-1).numpy(), abs=1e-5)
    base = full.log_probs.double()
    assert found.kl == pytest.approx((base.exp() * (base - expected)).sum(-1).numpy(), abs=1e-4)
    assert (found.agree == (base.argmax(-1) == expected.argmax(-1)).numpy()).all()
    if method != "full":
        assert found.kl.max() > 0.01, "nothing was forgotten"


@pytest.mark.parametrize(("answer", "interval"), [(1, 16), (2, 16), (17, 16), (18, 16), (5, 1), (6, 2), (60, 16)])
@pytest.mark.parametrize("prompt", [1, 2, 40])
def test_edges_of_the_intervals(prompt, answer, interval):
    model, compression = tiny_model(dtype=torch.float64), ra.Compression.method("rkv", 20, interval=interval)
    trace = trace_of(prompt, answer)
    expected, _ = token_by_token(model, trace, compression)
    found = teacher_force(model, trace, compression)
    assert (found.likeliest == (expected.argmax(-1) == trace.answer).numpy()).all()
    assert found.nll == pytest.approx(-expected.gather(-1, trace.answer[:, None]).squeeze(-1).numpy(), abs=1e-5)
    assert found.kl is None
    assert found.log_probs is None


def test_a_trace_is_made_of_words():
    trace = make_trace(word_tokenizer(), "one", "w3 w4", "w5 w6 w7", most=2)
    assert (trace.name, trace.prompt.tolist(), trace.answer.tolist()) == ("one", [3, 4], [5, 6])


def test_bad_input():
    model = tiny_model()
    with pytest.raises(ValueError, match="0 answer tokens"):
        teacher_force(model, trace_of(5, 0), ra.Compression.method("full"))
    plain = teacher_force(model, trace_of(5, 5), ra.Compression.method("full"))
    with pytest.raises(ValueError, match="keep_log_probs"):
        teacher_force(model, trace_of(5, 5), ra.Compression.method("full"), plain)
    assert np.isfinite(plain.nll).all()
    with pytest.raises(ValueError, match="0 prompt and 5 answer tokens: one of each"):
        teacher_force(model, trace_of(0, 5), ra.Compression.method("full"))


@pytest.mark.parametrize("prompt", ["compete", "protect"])
@pytest.mark.parametrize("method", ["full", "rkv", "reasonalloc", "h2o"])
def test_texts_read_together_are_read_as_alone(method, prompt):
    """Prompts and answers of different lengths; some of a single token, two that end together, at an interval's end.
    The last text has the first one's prompt."""
    model, compression = tiny_model(dtype=torch.float64), method_of(method, 32, interval=16, prompt=prompt)
    sizes = ((50, 90), (41, 33), (7, 1), (64, 33), (30, 70), (50, 60))
    ids = torch.randint(2, 97, (6, 140), generator=torch.Generator().manual_seed(2))
    ids[5, :50] = ids[0, :50]
    traces = [Trace(str(i), row[:p], row[p : p + a]) for i, (row, (p, a)) in enumerate(zip(ids, sizes, strict=True))]
    full = [teacher_force(model, trace, ra.Compression.method("full"), keep_log_probs=True) for trace in traces]
    alone = [teacher_force(model, *pair[:1], compression, pair[1]) for pair in zip(traces, full, strict=True)]
    for one, other in zip(read_together(model, traces, compression, full), alone, strict=True):
        assert one.nll == pytest.approx(other.nll, abs=1e-5)
        assert one.kl == pytest.approx(other.kl, abs=1e-5)
        assert (one.agree == other.agree).all()
        assert (one.likeliest == other.likeliest).all()
        assert (one.kept_tokens, one.evicted) == (pytest.approx(other.kept_tokens), other.evicted)
        assert one.kv_bytes == other.kv_bytes
    single = [replace(trace, prompt=trace.prompt[-1:]) for trace in traces]
    alone = [teacher_force(model, trace, compression) for trace in single]
    for one, other in zip(read_together(model, single, compression), alone, strict=True):
        assert one.nll == pytest.approx(other.nll, abs=1e-5)
    with pytest.raises(ValueError, match="a prompt of one token counts as a step: read it apart"):
        read_together(model, [traces[0], single[0]], compression)
    with pytest.raises(ValueError, match="there is no text to read"):
        read_together(model, [], compression)
    with pytest.raises(ValueError, match="references must be of the same texts, in the same order"):
        read_together(model, traces, compression, full[::-1])
