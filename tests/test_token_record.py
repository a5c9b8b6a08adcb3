"""The record of tokens: it says of every head which tokens the cache really holds, after every round, and in files."""

from __future__ import annotations

import copy
import io
import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded_run import run
from reference import method_of, prompts, tiny_model, tiny_profile, word_tokenizer

import reasonalloc as ra
from reasonalloc import Recorder
from reasonalloc.cache.packed import MOST_BYTES, pack, unpack
from reasonalloc.cache.token_record import HELD, NO_SCORE, Text, TokenRecord
from reasonalloc.engines.transformers.names import CACHE_ARGUMENT

INTERVAL = 8
METHODS: dict[str, dict[str, Any]] = {
    "reasonalloc": {"profile": tiny_profile()},
    "dynamic layers": {"method": "reasonalloc", "layers": "dynamic"},
    "pyramid-rkv": {},
    "h2o": {},
    "streaming": {},
    "sensitivity": {},
    "protect": {"method": "rkv", "prompt": "protect", "budget": 10},
    "pin": {"method": "rkv", "prompt": "pin", "pin_share": 0.5},
    "random-pin": {"pin_share": 0.5},
    "by score": {"method": "rkv", "storage_order": "score"},
}


def compression_of(name: str) -> ra.Compression:
    changes = dict(METHODS[name])
    budget = changes.pop("budget", 24)
    return method_of(changes.pop("method", name), budget, interval=INTERVAL, **changes)


def held_by(cache: ra.Cache) -> list[list[list[set[int]]]]:
    """The positions that the cache itself holds: of every layer, row and head."""
    found = []
    for layer in range(cache.shape.layers):
        tokens = cache.ragged.tokens(layer)
        rows = zip(tokens.positions.tolist(), tokens.lengths.tolist(), strict=True)
        found.append([[set(p[:n]) for p, n in zip(*row, strict=True)] for row in rows])
    return found


def recorded(recorder: Recorder, seen: list[int]) -> list[list[list[set[int]]]]:
    """The positions that the record says are held now."""
    assert recorder.tokens is not None
    let_go = recorder.tokens.let_go

    def of_row(layer: int, row: int) -> list[set[int]]:
        late = range(let_go.shape[-1], seen[row])  # came after the last round
        return [{*np.flatnonzero(head[: seen[row]] == HELD), *late} for head in let_go[layer, row]]

    return [[of_row(layer, row) for row in range(len(seen))] for layer in range(len(let_go))]


@pytest.fixture(scope="module")
def whole() -> tuple[Recorder, torch.Tensor, torch.Tensor]:
    """Two sequences with their text; ids and mask."""
    recorder = Recorder(tokens=True)
    _, ids, mask = run(compression_of("reasonalloc"), [40, 12], recorder)
    recorder.set_text(word_tokenizer(), ids, mask)
    return recorder, ids, mask


@pytest.fixture
def record(whole: tuple[Recorder, torch.Tensor, torch.Tensor]) -> Recorder:
    return copy.deepcopy(whole[0])


@pytest.mark.parametrize("name", METHODS)
def test_the_record_holds_what_the_cache_holds(name: str) -> None:
    """In a padded batch, after every round; layers have budgets of their own and so evict at other times."""
    recorder, rounds = Recorder(tokens=True), []

    def look(cache: ra.Cache) -> None:
        if len(recorder.routings) > sum(rounds):
            rounds.append(len(recorder.routings) - sum(rounds))
            assert recorded(recorder, cache.ragged.table.seen.tolist()) == held_by(cache)

    run(compression_of(name), [50, 37, 12], recorder, look)
    assert len(rounds) > 1
    assert recorder.tokens is not None
    assert (recorder.tokens.let_go != HELD).any(-1).all(1).any()


def test_it_does_not_matter_how_layers_are_grouped() -> None:
    recorders = [Recorder(tokens=True), Recorder(tokens=True)]
    for recorder, options in zip(recorders, ({}, {"layers_at_once": 2}), strict=True):
        run(compression_of("reasonalloc"), [40, 31], recorder, **options)
    first, second = (recorder.tokens for recorder in recorders)
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first.let_go, second.let_go)
    np.testing.assert_array_equal(first.scores, second.scores)


def test_layers_that_route_at_other_rounds() -> None:
    """Budgets of 75, 15 and 30 a head: the layers evict for the first time at three different steps."""
    shape = ra.ModelShape(3, 3, 6, 16)
    profile = ra.DemandProfile.of_layers((400.0, 25.0, 100.0), shape, "llama")
    recorder = Recorder(tokens=True)

    def look(cache: ra.Cache) -> None:
        if recorder.routings:
            assert recorded(recorder, cache.ragged.table.seen.tolist()) == held_by(cache)

    run(ra.Compression(budget=40, profile=profile, interval=8), [20], recorder, look)
    assert recorder.tokens is not None
    assert recorder.tokens.steps == recorder.arrays()["step"].tolist()
    first = [min(layer[layer != HELD], default=-1) for layer in recorder.tokens.let_go]
    assert len(set(first)) == 3


def test_the_record_counts_as_the_routings_do(record: Recorder) -> None:
    tokens = record.tokens
    assert tokens is not None
    for routing, rows, seen in zip(record.routings, tokens.rows, tokens.seen, strict=True):
        for i, (sequence, count) in enumerate(zip(rows, seen, strict=True)):
            when = tokens.let_go[routing.layer, sequence, :, :count]
            assert ((when == HELD) | (when > tokens.steps.index(routing.step))).sum(-1).tolist() == routing.kept[i]


def test_scores_are_ranks_in_percent() -> None:
    """Two heads of one layer: the best is 100, the worst 0, what is not ranked has none; means over heads."""
    record = TokenRecord()
    record.open(1, 2)
    record.begin(7, 1)
    row, infinity = np.array([0]), np.inf
    positions = np.array([[[0, 1, 2, 3, 9], [0, 2, 3, 4, 9]]])
    scores = np.array([[[0.5, 0.1, 0.9, infinity, -infinity], [3.0, 2.0, 1.0, 0.0, infinity]]])
    record.score(row, positions, scores)
    record.note(row, np.array([0]), np.array([10]), positions[None][..., :3], np.array([[[3, 3]]]))
    wanted = [(50 + 100) / 2, 0, (100 + 200 / 3) / 2, 100 / 3, 0]
    assert record.scores[0, 0].tolist() == [*map(round, wanted), *[NO_SCORE] * 5]
    assert (record.let_go[0, 0, 0] != HELD).tolist() == [False] * 3 + [True] * 7


def test_ties_are_ranked_as_selection_ranks_them() -> None:
    """Of equal scores the earlier stored token wins."""
    record = TokenRecord()
    record.open(1, 1)
    record.begin(7, 1)
    positions = np.arange(3)[None, None]
    record.score(np.array([0]), positions, np.zeros((1, 1, 3)))
    record.note(np.array([0]), np.array([0]), np.array([3]), positions[None], np.array([[[3]]]))
    assert record.scores.tolist() == [[[100, 50, 0]]]


def test_evicted_tokens_were_the_worst() -> None:
    """One layer, one head: what stays ranks above what goes, but for the newest, which are not ranked."""
    model = tiny_model(num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=1)
    recorder = Recorder(tokens=True)
    cache = ra.Cache(model.config, ra.Compression.method("rkv", 24, interval=8), attention="rows", recorder=recorder)
    with torch.no_grad():
        model(prompts([60])[0], **{CACHE_ARGUMENT: cache})
    tokens = recorder.tokens
    assert tokens is not None
    scores, gone = tokens.scores[0, 0], tokens.let_go[0, 0, 0] != HELD
    ranked = scores != NO_SCORE
    assert gone.sum() == 36
    assert scores[gone].max() <= scores[ranked & ~gone].min()
    assert not (gone & ~ranked).any()


def test_a_recorder_without_tokens_records_none(record: Recorder) -> None:
    plain = Recorder()
    run(compression_of("reasonalloc"), [40, 12], plain)
    assert plain.tokens is None
    assert plain.routings == record.routings
    with pytest.raises(ValueError, match=r"make it with Recorder\(tokens=True\)"):
        plain.set_text(None, [[1]], [[1]])


# ---- rows that come and go ---------------------------------------------------------------------------------


def test_sequences_that_leave_and_move_keep_their_record() -> None:
    recorder = Recorder(tokens=True)
    cache, _, _ = run(compression_of("reasonalloc"), [40, 33, 21], recorder)
    tokens = recorder.tokens
    assert tokens is not None
    before, model = tokens.let_go.copy(), tiny_model()
    cache.batch_select_indices(torch.tensor([2, 0]))
    seen_before = cache.ragged.table.seen.copy()
    with torch.no_grad():
        for _ in range(2 * INTERVAL):
            seen, columns = cache.ragged.table.seen, cache.get_seq_length()
            whole = torch.zeros(2, columns + 1, dtype=torch.long)
            for i, count in enumerate(seen.tolist()):
                whole[i, columns - count :] = 1
            model(
                torch.full((2, 1), 5),
                attention_mask=whole,
                position_ids=torch.from_numpy(seen)[:, None].clone(),
                **{CACHE_ARGUMENT: cache},
            )
    after = tokens.let_go
    width = before.shape[-1]
    assert (seen_before < cache.ragged.table.seen).all()
    np.testing.assert_array_equal(after[:, 1, :, :width], before[:, 1])
    assert (after[:, [0, 2], :, :width] != before[:, [0, 2]]).any()
    assert tokens.rows[-1] == [2, 0]
    held = held_by(cache)
    for i, sequence in enumerate((2, 0)):
        seen = int(cache.ragged.table.seen[i])
        for layer in range(3):
            for head in range(3):
                kept = set(np.flatnonzero(after[layer, sequence, head, :seen] == HELD)) | set(
                    range(after.shape[-1], seen)
                )
                assert kept == held[layer][i][head]


def test_beams_are_refused() -> None:
    model, recorder = tiny_model(), Recorder(tokens=True)
    cache = ra.Cache(model.config, compression_of("reasonalloc"), attention="rows", recorder=recorder)
    ids, mask = prompts([40])
    with pytest.raises(ValueError, match=r"\(beams\): generate without beams, or record with Recorder\(\)"):
        model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=20, **{CACHE_ARGUMENT: cache})


def test_a_recorder_of_tokens_is_for_one_generation() -> None:
    recorder = Recorder(tokens=True)
    cache, text, _ = run(compression_of("reasonalloc"), [40], recorder)
    cache.reset()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="holds the tokens of another generation: give each generation a Recorder"),
    ):
        tiny_model()(text, **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize("tokens", [False, True])
def test_a_recorder_is_for_one_cache(record: Recorder, tokens: bool) -> None:
    """Two that take turns would be one record, of neither."""
    model, recorder = tiny_model(), Recorder(tokens)
    ra.Cache(model.config, compression_of("h2o"), attention="rows", recorder=recorder)
    for used in (recorder, record):
        with pytest.raises(ValueError, match="this recorder is another cache's: give each generation a Recorder"):
            ra.Cache(model.config, compression_of("h2o"), attention="rows", recorder=used)


def test_a_copied_cache_records_for_itself() -> None:
    recorder = Recorder(tokens=True)
    cache, text, _ = run(compression_of("reasonalloc"), [40], recorder)
    other, model, count = copy.deepcopy(cache), tiny_model(), len(recorder.routings)
    with torch.no_grad():
        for _ in range(INTERVAL):
            model(text[:, :1], **{CACHE_ARGUMENT: other})
    assert len(recorder.routings) == count
    copied = other.ragged.recorder
    assert copied is not None
    assert len(copied.routings) > count
    assert recorded(copied, other.ragged.table.seen.tolist()) == held_by(other)


def test_assisted_decoding_is_recorded() -> None:
    """Tokens that were taken back have left no trace."""
    model, recorder = tiny_model(), Recorder(tokens=True)
    cache = ra.Cache(model.config, compression_of("reasonalloc"), attention="rows", recorder=recorder)
    ids, mask = prompts([40])
    model.generate(
        ids, attention_mask=mask, prompt_lookup_num_tokens=3, max_new_tokens=30, do_sample=False,
        **{CACHE_ARGUMENT: cache},
    )  # fmt: skip
    assert len(recorder.tokens.steps) > 2  # type: ignore[union-attr]
    assert recorded(recorder, cache.ragged.table.seen.tolist()) == held_by(cache)


def test_rows_leave_after_what_was_only_speculated_is_settled() -> None:
    """Settling it is a round of all rows, those that leave included."""
    model, recorder = tiny_model(), Recorder(tokens=True)
    cache = ra.Cache(model.config, compression_of("pyramid-rkv"), attention="rows", recorder=recorder)
    ids, mask = prompts([40, 33, 30])
    more = torch.full((3, INTERVAL), 5)
    whole = torch.cat([mask, torch.ones_like(more)], 1)
    positions = (whole.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions[:, :40], **{CACHE_ARGUMENT: cache})
        cache.ragged.hold()
        model(more, attention_mask=whole, position_ids=positions[:, 40:], **{CACHE_ARGUMENT: cache})
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert recorder.tokens is not None
    assert recorder.tokens.rows[-1] == [0, 1, 2]
    held, let_go = held_by(cache), recorder.tokens.let_go
    for i, sequence in enumerate((2, 0)):
        seen = int(cache.ragged.table.seen[i])
        assert held[0][i] == [{*np.flatnonzero(head[:seen] == HELD)} for head in let_go[0, sequence]]


def test_a_round_that_is_refused_is_not_in_the_record(tmp_path: Path) -> None:
    """What was recorded until a scorer went wrong can be saved and looked at."""

    class Failing(ra.RKV):
        failing = False

        def score(self, observation: Any) -> torch.Tensor:
            return super().score(observation) * (float("nan") if Failing.failing else 1)

    model, recorder = tiny_model(), Recorder(tokens=True)
    compression = ra.Compression(budget=24, interval=INTERVAL, scorer=Failing())
    cache = ra.Cache(model.config, compression, attention="rows", recorder=recorder)
    with torch.no_grad():
        model(prompts([40])[0], **{CACHE_ARGUMENT: cache})
        for _ in range(INTERVAL - 1):
            model(torch.full((1, 1), 5), **{CACHE_ARGUMENT: cache})
        Failing.failing = True
        with pytest.raises(ValueError, match="returned NaN"):
            model(torch.full((1, 1), 5), **{CACHE_ARGUMENT: cache})
    for name in ("routing.json", "routing.npz"):
        recorder.save(tmp_path / name)
        loaded = Recorder.load(tmp_path / name)
        assert loaded.routings == recorder.routings
        assert loaded.tokens is not None
        assert loaded.tokens.steps == [40]


# ---- text --------------------------------------------------------------------------------------------------


class Letters:
    """Puts a space between two tokens, as tokenizers of whole words do."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(chr(96 + token) for token in ids)


def test_pieces_make_up_the_text() -> None:
    text = Text.of(Letters(), [1, 2, 3], 1)
    assert text.pieces == ["a", " b", " c"]
    assert "".join(text.pieces) == Letters().decode([1, 2, 3])


def test_padding_is_no_text(record: Recorder, whole: tuple[Recorder, torch.Tensor, torch.Tensor]) -> None:
    _, ids, _ = whole
    first, second = record.tokens.texts  # type: ignore[union-attr]
    assert (first.prompt, second.prompt) == (40, 12)
    assert first.ids == ids[0].tolist()
    assert second.ids == ids[1, 28:].tolist()
    assert "".join(second.pieces) == word_tokenizer().decode(second.ids)


def test_a_text_that_is_not_the_caches_is_refused(
    record: Recorder, whole: tuple[Recorder, torch.Tensor, torch.Tensor]
) -> None:
    _, ids, mask = whole
    with pytest.raises(ValueError, match="the record is of 2 sequences, and the text of 1"):
        record.set_text(word_tokenizer(), ids[:1], mask[:1])
    with pytest.raises(ValueError, match=r"text of sequence 0 has 50 tokens, and the cache had seen \d+: pass all"):
        record.set_text(word_tokenizer(), ids[:, :50], mask)
    with pytest.raises(ValueError, match="ids are of 2 sequences and attention_mask of 1, or ids are shorter"):
        record.set_text(word_tokenizer(), ids, mask[:1])


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_files_hold_the_tokens(tmp_path: Path, record: Recorder, suffix: str) -> None:
    path = tmp_path / f"routing.{suffix}"
    record.save(path)
    loaded = Recorder.load(path)
    assert loaded.about == record.about
    assert loaded.about.startswith("reasonalloc (scorer rkv, layers wave, heads threshold), budget 24, interval 8")
    assert loaded.entry_bytes == record.entry_bytes == 2 * tiny_model().config.head_dim * 4
    assert loaded.routings == record.routings
    assert loaded.tokens is not None
    assert record.tokens is not None
    assert loaded.tokens.document() == record.tokens.document()
    for name in ("let_go", "scores"):
        found, wanted = getattr(loaded.tokens, name), getattr(record.tokens, name)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_an_older_record_still_loads(tmp_path: Path, record: Recorder) -> None:
    entries = [vars(routing) for routing in record.routings]
    path = tmp_path / "routing.json"
    path.write_text(json.dumps({"schema": 1, "layers": 3, "routings": entries}).replace("Infinity", '"inf"'))
    loaded = Recorder.load(path)
    assert (loaded.routings, loaded.about, loaded.tokens) == (record.routings, "", None)
    assert loaded.entry_bytes == 0
    record.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as saved:
        older = {
            name: saved[name]
            for name in saved
            if name not in ("about", "entry_bytes") and not name.startswith("tokens")
        }
    np.savez(tmp_path / "older.npz", **older)
    assert Recorder.load(tmp_path / "older.npz").tokens is None


def test_a_changed_json_is_noticed(tmp_path: Path, record: Recorder) -> None:
    path = tmp_path / "routing.json"
    record.save(path)
    path.write_text(path.read_text().replace('"prompt": 40', '"prompt": 39'))
    with pytest.raises(ValueError, match=r"routing\.json is not a record of routings, or damaged: its content is not"):
        Recorder.load(path)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_what_a_file_says_of_its_method_cannot_command_a_terminal(
    tmp_path: Path, record: Recorder, suffix: str
) -> None:
    path = tmp_path / f"routing.{suffix}"
    record.about = "rkv\x1b[2J"
    record.save(path)
    with pytest.raises(ValueError, match="or damaged: about holds control characters"):
        Recorder.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [[0, 1]]},
        {"seen": 3},
        {"steps": [1]},
        {"texts": [{"ids": [1], "pieces": ["a"], "prompt": 0}] * 2},
        {"texts": [{"ids": [1], "pieces": [2], "prompt": 0}] * 2},
        {"texts": [7]},
        {"let_go": pack(np.zeros((3, 2, 3, 4), np.uint8))},
        {"scores": pack(np.zeros((1, 2, 4), np.uint8))},
        {"let_go": None},
        {"colour": "blue"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_tokens_that_do_not_fit_together_are_refused(tmp_path: Path, record: Recorder, change: dict[str, Any]) -> None:
    path = tmp_path / "routing.json"
    record.save(path)
    data = json.loads(path.read_text())
    del data["checksum"]
    data["tokens"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"routing\.json is not a record of routings, or damaged: "):
        Recorder.load(path)


@pytest.mark.parametrize("suffix", ["json", "npz"])
@pytest.mark.parametrize("layers", [2, 4, 900])
def test_tokens_are_of_as_many_layers_as_the_model(tmp_path: Path, record: Recorder, suffix: str, layers: int) -> None:
    path = tmp_path / f"routing.{suffix}"
    record.layers = layers
    record.save(path)
    with pytest.raises(ValueError, match=f"its tokens are of 3 layers, and the record of {layers}"):
        Recorder.load(path)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_a_record_without_a_round_comes_back(tmp_path: Path, suffix: str) -> None:
    recorder, path = Recorder(tokens=True), tmp_path / f"routing.{suffix}"
    ra.Cache(tiny_model().config, compression_of("h2o"), recorder=recorder)
    recorder.save(path)
    assert Recorder.load(path).layers == 3


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_arrays_longer_than_what_was_seen_are_refused(tmp_path: Path, record: Recorder, suffix: str) -> None:
    """Zeros deflate to nothing: a small file must not claim as much memory as it likes."""
    path, tokens = tmp_path / f"routing.{suffix}", record.tokens
    assert tokens is not None
    arrays = {name: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 500)]) for name, x in tokens.arrays().items()}
    tokens.arrays = lambda: arrays  # type: ignore[method-assign]
    record.save(path)
    with pytest.raises(ValueError, match=r"or damaged: its tokens are of .* longer or shorter ones, than its arrays"):
        Recorder.load(path)


def test_an_npz_is_measured_without_being_held(tmp_path: Path) -> None:
    path, size = tmp_path / "routing.npz", 1 << 25
    np.savez_compressed(path, schema=np.array(2), other=np.zeros(size, np.uint8))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="its schema is 2"):
            Recorder.load(path)
        assert tracemalloc.get_traced_memory()[1] < size / 2
    finally:
        tracemalloc.stop()


def test_an_npz_with_a_huge_array_is_refused(tmp_path: Path) -> None:
    path, member = tmp_path / "routing.npz", io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (MOST_BYTES + 1,)}
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tokens_let_go.npy", member.getvalue())
    with pytest.raises(ValueError, match=r"'tokens_let_go.npy' of \d+ bytes is too large"):
        Recorder.load(path)


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_tokens_too_many_to_be_loaded_again_are_not_saved(
    tmp_path: Path, record: Recorder, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("reasonalloc.cache.token_record.MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"\(let_go\) take \d+ bytes.*: record fewer sequences at a time"):
        record.save(tmp_path / f"routing.{suffix}")


def test_a_damaged_npz_with_tokens_says_so(tmp_path: Path, record: Recorder) -> None:
    path = tmp_path / "routing.npz"
    record.save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(len(content), size=60).tolist():
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(flipped))
        try:
            loaded = Recorder.load(path)
        except ValueError as error:
            assert "routing.npz is not a record of routings, or damaged: " in str(error)  # noqa: PT017
            refused += 1
        else:
            assert loaded.tokens is not None
            np.testing.assert_array_equal(loaded.tokens.let_go, record.tokens.let_go)  # type: ignore[union-attr]
    assert refused > 30


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32"])
def test_packed_arrays_come_back(kind: str) -> None:
    array = np.arange(24, dtype=kind).reshape(2, 3, 4)
    found = unpack(json.loads(json.dumps(pack(array))))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 3]}, {"shape": [2, 3, 5]}, {"shape": [1 << 40]}, {"shape": [-1]}, {"kind": "object"},
        {"deflated": "AAAA"},
    ],
)  # fmt: skip
def test_packed_arrays_that_are_damaged_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a packed array"):
        unpack(pack(np.zeros((2, 3, 4), np.uint8)) | change)
    with pytest.raises(ValueError, match=r"a packed array of .* bytes is too large"):
        unpack(pack(np.zeros(3, np.uint8)) | {"shape": [MOST_BYTES + 1]})
    with pytest.raises(ValueError, match="arrays are packed as"):
        pack(np.zeros(3))
