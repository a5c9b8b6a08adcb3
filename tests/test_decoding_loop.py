"""The decoding loop against the stock loop; recorded steps, simulated on the CPU by running what was recorded again."""

import threading
import time
import warnings

import pytest
import torch
from reference import compression, prompts, tiny_model, word_tokenizer
from transformers import LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer

import reasonalloc as ra
from reasonalloc.cache.ragged import RaggedCache
from reasonalloc.engines.transformers import graph
from reasonalloc.engines.transformers.graph import Recorded, StepGraph
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT
from reasonalloc.evaluation.footprint import Footprint

GREEDY = {"do_sample": False, "max_new_tokens": 60}
METHODS = ["rkv", "reasonalloc-head", "h2o", "streaming", "reasonalloc"]
ENDS = (46, 29, 55)


class Simulated:
    """In the place of ``graph.record``: replaying is running again. ``rows`` has those of each recording."""

    def __init__(self):
        self.rows = []
        self.replays = 0

    def __call__(self, function, device):
        function()
        self.rows.append(len(function.__self__.ids))

        def replay():
            self.replays += 1
            function()

        return Recorded(replay, 1000 * self.rows[-1])


@pytest.fixture
def recorder(monkeypatch):
    simulated = Simulated()
    can_record = RaggedCache.can_record.fget

    def anywhere(ragged):
        found = can_record(ragged)
        return "" if found == "the device is a CPU" else found

    monkeypatch.setattr(RaggedCache, "can_record", property(anywhere))
    monkeypatch.setattr(graph, "record", simulated)
    return simulated


class EndAt:
    """Ends each prompt's row after its own number of tokens, whatever they are."""

    def __init__(self, ids, ends):
        self.columns = ids.shape[1]
        self.ends = {tuple(row): end for row, end in zip(ids.tolist(), ends, strict=True)}

    def __call__(self, input_ids, scores, **kwargs):
        written = input_ids.shape[1] - self.columns
        done = [self.ends[tuple(row)] <= written for row in input_ids[:, : self.columns].tolist()]
        return torch.tensor(done, device=input_ids.device)


class Listener:
    """A streamer that writes down what it is given."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


def loop(model, ids, mask, cache, **options):
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, custom_generate=ra.decoding_loop, **{**GREEDY, **options}
    )


def stock(model, ids, mask, cache, **options):
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **{**GREEDY, **options})


def made(model, method="reasonalloc-head", **changes):
    return ra.Cache(model.config, compression(method, **changes))


def ending(model, ids, mask, method, **options):
    """Options by which the rows end at different times, some of them after rounds."""
    answers = stock(model, ids, mask, made(model, method), **options)[:, ids.shape[1] :].tolist()
    first = [{token: row.index(token) for token in set(row)} for row in answers]
    late = [max(set(row), key=where.get) for row, where in zip(answers, first, strict=True)]
    stops = [late[0]]
    assert len({where.get(stops[0], 60) for where in first}) > 1, "all rows end together"
    return {"eos_token_id": stops, "pad_token_id": 0, **options}


# ---- the same texts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_recorded_and_eager_steps_equal_the_stock_loop(method, recorder):
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((9, 40, 61, 17))
    options = ending(model, ids, mask, method)
    want = stock(model, ids, mask, made(model, method), **options)
    caches = {"eager": made(model, method), "recorded": made(model, method)}
    texts = {name: loop(model, ids, mask, cache, graph=name == "recorded", **options) for name, cache in caches.items()}
    assert torch.equal(texts["eager"], want)
    assert torch.equal(texts["recorded"], want)
    eager, recorded = (cache.stats() for cache in caches.values())
    assert recorded.compressions >= 3
    assert recorded.kept == eager.kept
    assert recorded.kv_bytes == eager.kv_bytes
    assert recorder.replays == want.shape[1] - 61 - 1, "a step was not a replay"
    assert caches["recorded"].get_seq_length() == want.shape[1] - 1


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_other_decoders_are_recorded(kind, recorder):
    model = tiny_model(kind, dtype=torch.float64)
    ids, mask = prompts((9, 40))
    want = stock(model, ids, mask, made(model))
    assert torch.equal(loop(model, ids, mask, made(model)), want)
    assert recorder.rows == [2]


def test_without_padding_there_is_one_row_of_positions_for_all(recorder):
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((40, 40))
    want = stock(model, ids, mask, made(model))
    assert torch.equal(loop(model, ids, mask, made(model)), want)
    assert recorder.replays == 59


@pytest.fixture
def moving(monkeypatch):
    """Memory that moves every 20 tokens."""
    memory = RaggedCache.fixed_memory.fget
    monkeypatch.setattr(RaggedCache, "fixed_memory", property(lambda x: (x.columns // 20, *memory(x))))


def test_memory_that_moves_is_recorded_anew(recorder, moving):
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((40, 9))
    ends = {"stopping_criteria": StoppingCriteriaList([EndAt(ids, (60, 30))])}
    want = loop(model, ids, mask, made(model), graph=False, **ends)
    assert torch.equal(loop(model, ids, mask, made(model), **ends), want)
    assert recorder.rows == [2, 2, 1, 1], "the idle row leaves as soon as a step is recorded anew"
    assert recorder.replays == 59


def test_what_cannot_be_recorded_anew_goes_on_eagerly(recorder, moving, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((40, 9))
    want = stock(model, ids, mask, made(model))

    def once(function, device):
        if recorder.rows:
            raise RuntimeError("no more")
        return recorder(function, device)

    monkeypatch.setattr(graph, "record", once)
    cache = made(model)
    with pytest.warns(UserWarning, match="no more") as warned:
        assert torch.equal(loop(model, ids, mask, cache), want)
    assert ["no more" in str(warning.message) for warning in warned if warning.category is UserWarning] == [True]
    assert recorder.replays == 20
    assert cache.stats().graph.endswith("no more")
    assert cache.stats().graph_bytes == 2000


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("lengths", [(17,), (9, 40)])
def test_a_seed_gives_the_samples_of_the_stock_loop(lengths, recorded, recorder):
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts(lengths)
    texts = []
    for run in (stock, lambda *a, **k: loop(*a, graph=recorded, **k)):
        torch.manual_seed(7)
        texts.append(run(model, ids, mask, made(model), do_sample=True, top_k=20, temperature=1.7))
    assert torch.equal(*texts)
    torch.manual_seed(8)
    assert not torch.equal(loop(model, ids, mask, made(model), do_sample=True, temperature=1.7), texts[0])


@pytest.mark.parametrize("recorded", [True, False])
def test_processors_see_the_whole_text(recorded, recorder):
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((9, 40))
    seen = []

    def processor(input_ids, scores):
        seen.append(input_ids.clone())
        assert scores.dtype == torch.float32
        return scores

    options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    want = stock(model, ids, mask, made(model), **options)
    got = loop(
        model, ids, mask, made(model), graph=recorded, logits_processor=LogitsProcessorList([processor]), **options
    )
    assert torch.equal(got, want)
    assert [x.shape[1] for x in seen] == list(range(40, 100))
    assert torch.equal(seen[-1], want[:, :-1])


def test_scores_that_are_not_numbers_are_refused(recorder):
    model = tiny_model()
    ids, mask = prompts((9, 40))

    def broken(input_ids, scores):
        if input_ids.shape[1] > 50:
            scores[1, 5] = float("nan")
        return scores

    heard = Listener()
    with pytest.raises(RuntimeError, match="scores are nan"):
        loop(
            model,
            ids,
            mask,
            made(model),
            do_sample=True,
            logits_processor=LogitsProcessorList([broken]),
            streamer=heard,
        )
    assert len(heard.heard) == 1 + 11 + 1


@pytest.mark.parametrize("recorded", [True, False])
def test_a_prompt_of_embeddings(recorded, recorder):
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((17,))
    texts = []
    for more in ({}, {"custom_generate": ra.decoding_loop, "graph": recorded}):
        embeds = model.get_input_embeddings()(ids)
        texts.append(
            model.generate(inputs_embeds=embeds, attention_mask=mask, past_key_values=made(model), **GREEDY, **more)
        )
    assert torch.equal(*texts)
    assert bool(recorder.rows) == recorded


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(3, 7, 11, 20, 25, 30, 45, 50), (9, 9, 9, 9, 9, 30, 30, 50)])
def test_a_graph_serves_until_half_of_its_rows_have_finished(ends, recorder):
    model = tiny_model(dtype=torch.float64)
    lengths = (9, 40, 61, 17, 33, 21, 12, 50)
    ids, mask = prompts(lengths)
    options = {"stopping_criteria": StoppingCriteriaList([EndAt(ids, ends)])}
    logs = {"eager": [], "recorded": []}
    texts, kept, footprints = [], [], []
    for name, log in logs.items():
        cache, footprint = made(model), Footprint(8)

        def on_step(rows, tokens, log=log, cache=cache, footprint=footprint):
            log.append((rows.tolist(), tokens.tolist()))
            footprint.look(cache, rows.tolist())

        texts.append(loop(model, ids, mask, cache, graph=name == "recorded", on_step=on_step, **options))
        kept.append(cache.stats().kept)
        footprints.append((footprint.kept, footprint.kv_bytes))
    assert torch.equal(*texts)
    assert logs["recorded"] == logs["eager"]
    assert kept[0] == kept[1]
    assert footprints[0] == footprints[1]
    assert recorder.rows == ([8, 4, 2, 1] if ends[0] == 3 else [8, 3, 1])
    assert recorder.replays == 49
    assert [len(rows) for rows, _ in logs["recorded"]] == [sum(end > step for end in ends) for step in range(50)]


def test_what_idle_rows_decode_is_never_heard_of(recorder):
    """Idle rows write padding; with another padding everything else is the same."""
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((9, 40, 61))
    outputs = []
    for pad in (0, 5):
        listener, options = Listener(), {"stopping_criteria": StoppingCriteriaList([EndAt(ids, ENDS)])}
        text = loop(model, ids, mask, made(model), pad_token_id=pad, streamer=listener, **options)
        for row, end in enumerate(ENDS):
            assert (text[row, 61 + end :] == pad).all()
            text[row, 61 + end :] = 0
        heard = [[token if step < end else 0 for token, end in zip(tokens, ENDS, strict=True)]
                 for step, tokens in enumerate(listener.heard[1:-1])]  # fmt: skip
        assert [tokens[0] for tokens in listener.heard[1 + ENDS[0] : -1]] == [pad] * (ENDS[2] - ENDS[0])
        outputs.append((text.tolist(), heard))
    assert outputs[0] == outputs[1]
    assert recorder.rows == [3, 1, 3, 1]


# ---- streamers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("lengths", [(17,), (9, 40, 61, 17)])
def test_a_streamer_hears_what_the_stock_loop_says(lengths, recorded, recorder):
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts(lengths)
    options = {} if len(lengths) == 1 else ending(model, ids, mask, "rkv")
    want, got = Listener(), Listener()
    stock(model, ids, mask, made(model, "rkv"), streamer=want, **options)
    loop(model, ids, mask, made(model, "rkv"), streamer=got, graph=recorded, **options)
    assert got.heard == want.heard
    assert got.heard[-1] == "end"


def test_text_is_streamed_to_another_thread():
    model, tokenizer = tiny_model(), word_tokenizer()
    ids, mask = prompts((17,))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(loop(model, ids, mask, made(model), streamer=streamer, max_new_tokens=20))
    )
    thread.start()
    said = "".join(streamer)
    thread.join()
    assert said.split() == tokenizer.decode(found[0][0, 17:]).split()


@pytest.mark.parametrize("where", ["step", "refused"])
def test_a_stream_ends_with_an_error(where):
    model, tokenizer = tiny_model(), word_tokenizer()
    ids, mask = prompts((17,))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    steps = []

    def on_step(rows, tokens):
        steps.append(tokens)
        if len(steps) == 5:
            raise KeyError("stop")

    def run():
        more = {"on_step": on_step} if where == "step" else {"return_dict_in_generate": True}
        with pytest.raises((KeyError, ValueError)):
            loop(model, ids, mask, made(model), streamer=streamer, **more)

    thread = threading.Thread(target=run)
    thread.start()
    said = "".join(streamer)  # waits for ever, were the stream not ended
    thread.join()
    assert len(said.split()) == (4 if where == "step" else 0)


# ---- turns -------------------------------------------------------------------------------------------------------


def longer(text, mask, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    new = torch.randint(2, 97, (len(text), tokens), generator=generator)
    return torch.cat([text, new], 1), torch.cat(
        [mask, torch.ones(len(mask), text.shape[1] + tokens - mask.shape[1])], 1
    ).long()


@pytest.mark.parametrize("method", ["rkv", "reasonalloc-head", "h2o"])
def test_two_turns_equal_two_turns_of_the_stock_loop(method, recorder):
    model = tiny_model(dtype=torch.float64)
    texts = []
    for run in (stock, loop):
        text, mask = prompts((9, 40))
        cache = made(model, method)
        for turn in range(2):
            text = run(model, text, mask, cache)
            text, mask = longer(text, mask, 7, turn)
        texts.append(text)
    assert torch.equal(*texts)
    assert recorder.rows == [2, 2]


def test_a_wrong_second_text_is_refused_after_recorded_steps(recorder):
    model = tiny_model()
    ids, mask = prompts((9, 40))
    cache = made(model)
    text, longer_mask = longer(loop(model, ids, mask, cache), mask, 7, 0)
    for column in (40 + 3, 40 + 58):  # of a token that was decoded
        wrong = text.clone()
        wrong[1, column] = 2 + (wrong[1, column] - 1) % 95
        with pytest.raises(ValueError, match=f"sequence 1 differs from token {column} on"):
            loop(model, wrong, longer_mask, cache)
    loop(model, text, longer_mask, cache)


def test_the_last_sequences_go_on(recorder):
    """Which sequences a cache holds at the end does not depend on idle rows."""
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((9, 40, 61))
    options = {"stopping_criteria": StoppingCriteriaList([EndAt(ids, (46, 55, 50))])}
    texts = []
    for recorded in (True, False):
        cache = made(model)
        text = loop(model, ids, mask, cache, graph=recorded, **options)
        assert cache.stats().batch == 1
        text, shown = longer(text[1:2], mask[1:2], 5, 0)
        texts.append(loop(model, text, shown, cache, graph=recorded))
    assert torch.equal(*texts)


def test_rows_that_idle_at_the_end_leave(recorder):
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((9, 40, 61))
    options = {"stopping_criteria": StoppingCriteriaList([EndAt(ids, (20, 55, 55))])}
    cache = made(model)
    text = loop(model, ids, mask, cache, **options)
    assert recorder.rows == [3]
    assert cache.stats().batch == 2
    text, shown = longer(text[1:], mask[1:], 5, 0)
    loop(model, text, shown, cache)


# ---- what is recorded, and what is not ---------------------------------------------------------------------------


def test_stats_say_what_recording_takes(recorder):
    model = tiny_model()
    ids, mask = prompts((9, 40))
    cache = made(model)
    assert cache.stats().graph == "only reasonalloc.decoding_loop records steps"
    loop(model, ids, mask, cache, max_new_tokens=3)
    stats = cache.stats()
    assert (stats.graph, stats.graph_bytes) == ("", 2000)
    assert 0 < stats.graph_seconds < 60
    assert isinstance(stats, ra.CacheStats)
    assert {"graph", "graph_bytes", "graph_seconds", "kept", "total_bytes"} <= set(stats.to_dict())
    cache.reset()
    loop(model, ids, mask, cache, max_new_tokens=3, graph=False)
    assert (cache.stats().graph, cache.stats().graph_bytes) == ("graph=False was passed", 0)
    assert recorder.rows == [2]


def test_on_a_cpu_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(graph, "record", lambda *_: pytest.fail("recorded"))
    model = tiny_model()
    ids, mask = prompts((9,))
    cache = made(model)
    loop(model, ids, mask, cache, max_new_tokens=3)
    assert cache.stats().graph == "the device is a CPU"


@pytest.mark.parametrize("layer", [0, 1])
def test_a_step_that_cannot_be_recorded_is_decoded_eagerly(layer, recorder, monkeypatch):
    """It fails in the middle of a model: one warning, the same text."""
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((9, 40, 61))
    options = ending(model, ids, mask, "h2o")
    want = stock(model, ids, mask, made(model, "h2o"), **options)
    attention = model.model.layers[layer].self_attn.o_proj

    def waits(module, inputs):
        if fails["now"]:
            fails["times"] += 1
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    fails = {"now": False, "times": 0}
    attention.register_forward_pre_hook(waits)

    def record(function, device):
        function()
        fails["now"] = True
        try:
            function()
        finally:
            fails["now"] = False

    monkeypatch.setattr(graph, "record", record)
    cache = made(model, "h2o")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(loop(model, ids, mask, cache, **options), want)
    said = [str(warning.message) for warning in caught if "CUDA graph" in str(warning.message)]
    assert len(said) == 1
    assert "RuntimeError: operation not permitted" in said[0]
    assert "\n" not in said[0]
    assert fails["times"] == 1
    assert "operation not permitted" in cache.stats().graph
    assert cache.stats().graph_bytes == 0


def test_a_pass_that_is_broken_off_while_recording_leaves_nothing(recorder, monkeypatch):
    """Between a layer's update and its attention."""
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((9, 40))
    want = stock(model, ids, mask, made(model))
    cache = made(model)

    def record(function, device):
        layers = cache.layers
        layers[1].pending = True
        raise RuntimeError("no")

    monkeypatch.setattr(graph, "record", record)
    with pytest.warns(UserWarning, match="RuntimeError: no"):
        assert torch.equal(loop(model, ids, mask, cache), want)


def test_a_full_cache_grows(recorder):
    """Whether its steps are recorded or not, the text is the same."""
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((9, 40))
    full = ra.Compression.method("full")
    want = stock(model, ids, mask, ra.Cache(model.config, full))
    assert torch.equal(loop(model, ids, mask, ra.Cache(model.config, full)), want)


def step_inputs(model, cache, rows=2):
    ids, mask = prompts((9, 40))
    model(ids, attention_mask=mask, past_key_values=cache)
    return {
        "input_ids": ids[:, -1:],
        "position_ids": mask.sum(1, keepdim=True),
        "attention_mask": torch.ones(2, 41, dtype=torch.long),
        CACHE_ARGUMENT: cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"position_ids": torch.zeros(3, 2, 1, dtype=torch.long)}, "not given one position of each sequence"),
        ({"position_ids": None}, "not given one position of each sequence"),
        ({"token_type_ids": torch.zeros(2, 1)}, "given token_type_ids at every step"),
        ({"input_ids": None}, "not given one token id of each sequence"),
        ({"pixel_values": None, "output_attentions": False}, ""),
        ({"bias": {"a": torch.zeros(1)}}, "given bias at every step"),
    ],
)
@torch.no_grad()
def test_what_a_step_is_given_decides(change, said, recorder):
    model = tiny_model()
    cache = made(model)
    found = graph.problem(model, cache.ragged, {**step_inputs(model, cache), **change})
    assert (said in found) if said else found == ""


@torch.no_grad()
def test_which_models_are_recorded(recorder, monkeypatch):
    model = tiny_model()
    cache = made(model)
    inputs = step_inputs(model, cache)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "tp_size", 2)
        assert graph.problem(model, cache.ragged, inputs) == "several processes share the model"
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "get_text_config", lambda **_: object())
        assert graph.problem(model, cache.ragged, inputs) == "the model is more than a text decoder"
    model.lm_head.to("meta")
    assert graph.problem(model, cache.ragged, inputs) == "the model lies on several devices"


@pytest.mark.parametrize("recorded", [True, False])
def test_inference_mode(recorder, recorded):
    """As many people call it: with rows that leave, and rounds."""
    model = tiny_model(dtype=torch.float64)
    ids, mask = prompts((40, 9))
    ends = {"stopping_criteria": StoppingCriteriaList([EndAt(ids, (60, 30))])}
    want = loop(model, ids, mask, made(model), graph=recorded, **ends)
    cache = made(model)
    with torch.inference_mode():
        got = loop(model, ids, mask, cache, graph=recorded, **ends)
    assert torch.equal(got, want)
    assert not cache.ragged.pools[0].keys.is_inference()
    with torch.inference_mode():
        beams = model.generate(
            ids, attention_mask=mask, **{CACHE_ARGUMENT: made(model)}, num_beams=2, max_new_tokens=20
        )
    assert beams.shape[1] == ids.shape[1] + 20


@torch.no_grad()
def test_a_step_is_never_replayed_on_other_memory(recorder):
    model = tiny_model()
    cache = made(model)
    step = StepGraph(model, cache.ragged, step_inputs(model, cache))
    assert not step.is_stale
    cache.replay(step.replay, step.memory, step.ids)
    cache.batch_select_indices(torch.tensor([1]))
    assert step.is_stale
    with pytest.raises(RuntimeError, match="memory has moved"):
        cache.replay(step.replay, step.memory, step.ids)
    assert cache.get_seq_length() == 41, "and nothing is counted"


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = tiny_model(head_dim=64).cuda()
    loop(model, *(x.cuda() for x in prompts((9,))), made(model), max_new_tokens=4)  # what the first use compiles
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_recorded_steps_equal_eager_ones(method, on_gpu):
    model = on_gpu
    ids, mask = (x.cuda() for x in prompts((9, 40, 61, 17)))
    texts, caches = [], []
    for recorded in (False, True):
        caches.append(made(model, method))
        torch.cuda.synchronize()
        texts.append(loop(model, ids, mask, caches[-1], graph=recorded, max_new_tokens=60))
    eager, recorded = (cache.stats() for cache in caches)
    assert recorded.graph == ""
    assert recorded.graph_bytes > 0
    assert recorded.compressions >= 3
    assert torch.equal(*texts)
    assert recorded.kept == eager.kept


@pytest.mark.gpu
def test_on_a_gpu_rows_leave(on_gpu):
    """A batch of another size is another sum of floats: a token here and there may be another one."""
    model = on_gpu
    ids, mask = (x.cuda() for x in prompts((9, 40, 61, 17)))
    options = {"stopping_criteria": StoppingCriteriaList([EndAt(ids, (20, 57, 60, 33))])}
    eager, recorded = (loop(model, ids, mask, made(model), graph=graphs, **options) for graphs in (False, True))
    assert eager.shape == recorded.shape
    assert (eager == recorded).float().mean() > 0.5


@pytest.mark.gpu
def test_on_a_gpu_logits_are_those_of_an_eager_step(on_gpu):
    model = on_gpu
    ids, mask = (x.cuda() for x in prompts((9, 40)))
    found = []
    for recorded in (False, True):
        seen = []

        def keep(input_ids, scores, seen=seen):
            seen.append(scores.clone())
            return scores

        loop(model, ids, mask, made(model, "rkv"), graph=recorded, logits_processor=LogitsProcessorList([keep]))
        found.append(torch.stack(seen))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_two_turns(on_gpu):
    model = on_gpu
    texts = []
    for recorded in (False, True):
        text, mask = prompts((9, 40))
        cache = made(model, "rkv")
        for turn in range(2):
            text = loop(model, text.cuda(), mask.cuda(), cache, graph=recorded).cpu()
            text, mask = longer(text, mask, 7, turn)
        texts.append(text)
        assert (cache.stats().graph == "") == recorded
    assert torch.equal(*texts)


@pytest.mark.gpu
def test_on_a_gpu_a_step_is_recorded_in_less_than_a_second(on_gpu):
    model = on_gpu
    ids, mask = (x.cuda() for x in prompts((9, 40)))
    cache = made(model)
    started = time.perf_counter()
    loop(model, ids, mask, cache, max_new_tokens=3)
    assert cache.stats().graph == ""
    assert 0 < cache.stats().graph_seconds < min(1, time.perf_counter() - started)


@pytest.mark.gpu
def test_on_a_gpu_a_step_that_waits_is_decoded_eagerly(on_gpu):
    model = on_gpu
    ids, mask = (x.cuda() for x in prompts((9, 40)))

    def sampled(cache, **options):
        torch.manual_seed(3)
        return loop(model, ids, mask, cache, do_sample=True, **options)

    want = sampled(made(model), graph=False)

    def waits(module, inputs):
        inputs[0].sum().item()

    hook = model.model.layers[1].register_forward_pre_hook(waits)
    cache = made(model)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        got = sampled(cache)
    hook.remove()
    assert torch.equal(got, want)
    assert cache.stats().graph
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    cache = made(model)
    assert torch.equal(sampled(cache), want)
    assert cache.stats().graph == "", "a recording that failed spoils the next"


@pytest.mark.gpu
def test_on_a_gpu_a_recorded_step_waits_once(on_gpu):
    """For what the stopping criteria say; ``test_gpu.py`` looks at rounds."""
    model = on_gpu
    ids, mask = (x.cuda() for x in prompts((9, 40)))
    waits = []

    def on_step(rows, tokens):
        if len(waits) == 0 and cache.ragged.columns > 45:
            torch.cuda.set_sync_debug_mode("warn")
            waits.append(cache.ragged.columns)

    cache = made(model, interval=64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loop(model, ids, mask, cache, on_step=on_step, do_sample=True, max_new_tokens=30)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.stats().graph == ""
    steps = cache.ragged.columns - waits[0] + 1
    assert sum("synchroniz" in str(warning.message) for warning in caught) <= steps + 1
