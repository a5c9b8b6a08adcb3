"""Pages of records: what they hold, that they need nothing else, and how they look in a browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_record import forgetting, made, text_of, words
from recorded_run import run
from reference import word_tokenizer
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc import Recorder
from reasonalloc.cache.packed import unpack
from reasonalloc.cache.token_record import HELD, TokenRecord
from reasonalloc.cli.app import app
from reasonalloc.pages import assembly
from reasonalloc.pages.history import history

SEEN = [6, 10, 14]
EVIL = [
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "&lt;b&gt;",
]


@pytest.fixture(scope="module")
def batch() -> Recorder:
    """Two sequences, the second one shorter."""
    recorder = Recorder(tokens=True)
    _, ids, mask = run(ra.Compression.method("rkv", 24, interval=8), [40, 12], recorder)
    recorder.set_text(word_tokenizer(), ids, mask)
    return recorder


def small(about: str = "", pieces: list[str] | None = None, prompt: int = 4) -> Recorder:
    """2 layers of 3 heads, 3 rounds, 14 tokens and two that no round saw."""
    let_go = forgetting(2, 3, SEEN, 0.4)
    let_go[:, :, 2] = 1  # what no head holds after the second round
    return made(let_go, SEEN, pieces or [f" w{i}" for i in range(16)], prompt, about)


def data_of(page: Path) -> dict[str, Any]:
    """What a page holds: its facts and arrays."""
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])  # type: ignore[index]
    facts = json.loads(unpack(data["facts"]).tobytes())
    return facts | {name: unpack(array) for name, array in data["arrays"].items()}


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


# ---- what a record says of a sequence ----------------------------------------------------------------------


def test_history_is_of_one_sequence(batch: Recorder) -> None:
    tokens, arrays = batch.tokens, batch.arrays()
    assert tokens is not None
    for sequence in (0, 1):
        found = history(batch, sequence)
        assert found.tokens is not None
        assert found.tokens.text == tokens.texts[sequence]
        last = dict(zip([r.step for r in batch.routings], [seen[sequence] for seen in tokens.seen], strict=True))
        assert found.seen.tolist() == list(last.values())
        for name in ("budgets", "kept"):
            np.testing.assert_array_equal(getattr(found, name), arrays[name][:, :, sequence])
        np.testing.assert_array_equal(found.before, arrays["held"][:, :, sequence])
        own = tokens.let_go[:, sequence, :, : found.seen[-1]]
        np.testing.assert_array_equal(found.tokens.let_go, np.where(own == HELD, found.rounds, own))


def test_holders_are_heads_that_hold_a_token_after_a_round(batch: Recorder) -> None:
    tokens = history(batch, 0).tokens
    assert tokens is not None
    assert (tokens.holders(-1) == 9).all()
    for round in range(len(tokens.seen)):
        count = tokens.seen[round]
        assert tokens.holders(round)[:count].sum() == tokens.kept()[round].sum()


def test_a_sequence_that_left_has_the_rounds_that_it_was_in() -> None:
    record = TokenRecord()
    record.open(1, 1)
    recorder = Recorder(tokens=True)
    recorder.tokens, recorder.layers = record, 1
    one, zero = np.array([0]), np.zeros((1, 2, 1, 4), int)
    for step, rows in ((8, 2), (12, 1)):
        record.begin(step, rows)
        held = (zero + np.arange(4) + step - 4)[:, :rows]
        record.note(np.arange(rows), one, np.full(rows, step), held, np.full((1, rows, 1), 4))
        four = [[4]] * rows
        recorder.add(ra.cache.recorder.Routing(step, 0, [4] * rows, four, four, [[8]] * rows, None))  # type: ignore[attr-defined]
        if rows == 2:
            record.select([1], 2)
    first, second = history(recorder, 0), history(recorder, 1)
    assert (first.seen.tolist(), second.seen.tolist()) == ([8], [8, 12])
    assert first.tokens is not None
    assert second.tokens is not None
    assert first.tokens.let_go[0, 0].tolist() == [0] * 4 + [1] * 4
    assert second.tokens.let_go[0, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    record.set_texts([text_of([*range(8)], 4), text_of([*range(12)], 4)])


# ---- the page of one record --------------------------------------------------------------------------------


def test_a_page_holds_the_record(tmp_path: Path, batch: Recorder) -> None:
    ra.view(batch, tmp_path / "view.html", sequence=1)
    found, wanted = data_of(tmp_path / "view.html"), history(batch, 1)
    assert wanted.tokens is not None
    assert wanted.tokens.text is not None
    assert found["pieces"] == wanted.tokens.text.pieces
    assert (found["prompt"], found["sequence"], found["about"]) == (12, 1, batch.about)
    for name in ("budgets", "before", "kept"):
        np.testing.assert_array_equal(found[name].astype(int) - 1, getattr(wanted, name))
    born = np.searchsorted(found["seen"], np.arange(found["lived"].shape[-1]), side="right")
    let_go = np.where(found["lived"] == 255, wanted.rounds, found["lived"] + born)
    np.testing.assert_array_equal(let_go, wanted.tokens.let_go)


def test_a_page_needs_nothing_else_and_runs_nothing_else(tmp_path: Path) -> None:
    pieces = [*EVIL, *(f" w{i}" for i in range(13))]
    path = tmp_path / "view.html"
    ra.view(small(EVIL[0], pieces), path, title=EVIL[1])
    ra.compare(small(EVIL[0], pieces), small(EVIL[1], pieces), tmp_path / "compare.html")
    for page in (path, tmp_path / "compare.html"):
        text = page.read_text()
        assert not any(word in text for word in ("taken", "http:", "https:", "@import", "url(", "src=", "<link"))
        assert text.count("<script") == 2
        for tag in ("style", "script"):
            content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]  # type: ignore[index]
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in text
        assert "default-src 'none'" in text


def test_a_large_record_is_a_small_page(tmp_path: Path) -> None:
    """32 layers of 8 heads, 60 rounds of 128 tokens, 1024 kept: under 2 MB, though no head is like another."""
    seen = [100 + 128 * i for i in range(1, 61)]
    ra.view(made(forgetting(32, 8, seen, 128 / 1152), seen, words(seen[-1] + 1), 100), tmp_path / "view.html")
    assert (tmp_path / "view.html").stat().st_size < 2_000_000


def test_a_page_knows_whether_a_prompt_is_kept_beside_the_budget(tmp_path: Path) -> None:
    for prompt, wanted in (("protect", True), ("pin", False), ("compete", False)):
        recorder = Recorder(tokens=True)
        run(ra.Compression.method("reasonalloc-head", 16, interval=8, prompt=prompt, pin_share=0.25), [20], recorder)
        ra.view(recorder, tmp_path / "view.html")
        assert data_of(tmp_path / "view.html")["isPromptBeside"] is wanted


def test_pages_of_records_without_tokens_or_text(tmp_path: Path) -> None:
    full = small()
    assert full.tokens is not None
    plain = Recorder()
    for routing in full.routings:
        plain.add(routing)
    plain.save(tmp_path / "routing.npz")
    ra.view(tmp_path / "routing.npz", tmp_path / "view.html")
    found = data_of(tmp_path / "view.html")
    assert (found["recordsTokens"], found["pieces"], found["file"]) == (False, None, "routing.npz")
    assert "lived" not in found
    np.testing.assert_array_equal(found["kept"] - 1, [[r.kept[0] for r in full.routings[i : i + 2]] for i in (0, 2, 4)])
    full.tokens.texts = []
    ra.view(full, tmp_path / "view.html")
    assert (data_of(tmp_path / "view.html")["recordsTokens"], data_of(tmp_path / "view.html")["pieces"]) == (True, None)


def test_layers_that_have_not_routed_are_told_apart(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.layers = 2
    recorder.add(ra.cache.recorder.Routing(9, 1, [4], [[4]], [[4]], [[9]], [float("inf")]))  # type: ignore[attr-defined]
    ra.view(recorder, tmp_path / "view.html")
    found = data_of(tmp_path / "view.html")
    assert found["kept"].tolist() == [[[0], [5]]]
    assert found["threshold"] == [[None, "inf"]]


def test_view_refuses_in_one_sentence(tmp_path: Path, batch: Recorder) -> None:
    path = tmp_path / "view.html"
    for sequence in (2, -1):
        with pytest.raises(ValueError, match=f"the record has sequences 0 to 1, got {sequence}"):
            ra.view(batch, path, sequence=sequence)
    with pytest.raises(ValueError, match=r"a page is saved as \.html, got 'view\.txt'"):
        ra.view(batch, tmp_path / "view.txt")
    with pytest.raises(FileNotFoundError, match="no record at"):
        ra.view(tmp_path / "none.json", path)
    for tokens in (False, True):
        with pytest.raises(ValueError, match="no routing was recorded: the cache never held more than its budget"):
            ra.view(Recorder(tokens=tokens), path)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_beside_the_record(tmp_path: Path, batch: Recorder) -> None:
    batch.save(tmp_path / "routing.json")
    result = command("view", tmp_path / "routing.json")
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'routing.html'}: open it in a browser" in result.stdout.replace("\n", "")
    assert data_of(tmp_path / "routing.html")["file"] == "routing.json"
    result = command("view", tmp_path / "routing.json", "--sequence", 2, "-o", tmp_path / "other.html")
    assert result.exit_code == 2
    assert "the record has sequences 0 to 1, got 2" in result.stderr


# ---- two records -------------------------------------------------------------------------------------------


def parted() -> tuple[Recorder, Recorder]:
    """2 layers of 2 heads; rounds at 6 and 10 tokens, and texts that part at position 10."""
    let_go = np.full((2, 2, 10), -1)
    let_go[:, :, 1] = 0  # no head of the first holds token 1, and one of the four token 2
    let_go[0, 0, 2] = let_go[1, :, 2] = 0
    let_go[:, :, 4] = 1  # in the round at the end of the pass that chose the first other token
    other = np.full((2, 2, 10), -1)
    other[0, :, 3] = 0
    other[1, 0, 3] = 0
    pieces = [f" w{i}" for i in range(10)]
    return (
        made(let_go, [6, 10], [*pieces, " w1", " end"], 3, "first method"),
        made(other, [6, 10], [*pieces, " zz"], 3, "second method"),
    )


def test_where_texts_part_and_what_was_held_there(tmp_path: Path) -> None:
    first, second = parted()
    first.tokens.texts[0].ids[:] = [*range(10), 1, 50]  # type: ignore[union-attr]
    second.tokens.texts[0].ids[:] = [*range(10), 60]  # type: ignore[union-attr]
    found = ra.compare(first, second, tmp_path / "compare.html")
    assert (found.common, found.is_same) == (10, False)
    one, two = found.sides
    assert (one.round, two.round, one.heads) == (1, 1, 4)  # the round at 10 tokens came after the choice
    assert one.holders.tolist() == [4, 0, 1, 4, 4, 4, 4, 4, 4, 4]
    assert two.holders.tolist() == [4, 4, 4, 1, 4, 4, 4, 4, 4, 4]
    assert (one.forgotten, two.forgotten) == (1, 0)
    assert (found.kept(0), found.kept(1)) == ([3], [1, 2])
    assert (found.sources(0), found.sources(1)) == ([1], [])
    assert str(found).splitlines() == [
        "the texts are the same for 7 tokens behind the prompt",
        "then first writes ' w1', second writes ' zz'",
        "held by no head, of 10 tokens: 1 in first, 0 in second (at that moment)",
    ]
    data = data_of(tmp_path / "compare.html")
    assert data["holders0"].tolist() == one.holders.tolist()
    assert [side["kept"] for side in data["sides"]] == [[3], [1, 2]]


def test_texts_that_do_not_part() -> None:
    found, tokens = ra.compare(small(), small(), None), history(small(), 0).tokens
    assert found.is_same
    assert tokens is not None
    lost = (tokens.holders(2) == 0).sum()
    assert str(found).splitlines() == [
        "the texts are the same: 12 tokens behind the prompt",
        f"held by no head, of 16 tokens: {lost} in first, {lost} in second",
    ]
    pieces = [f" w{i}" for i in range(16)]
    shorter, longer = small(pieces=pieces), small(pieces=pieces)
    longer.tokens.texts = [text_of([*longer.tokens.texts[0].ids, 99], 4)]  # type: ignore[union-attr]
    shorter.tokens.texts = [text_of(longer.tokens.texts[0].ids[:-1], 4)]  # type: ignore[union-attr]
    found = ra.compare(shorter, longer, None)
    assert (found.common, found.is_same) == (16, False)
    assert "then first ends, second writes ' 99'" in str(found)


def test_the_summary_names_whole_words() -> None:
    first, second = parted()
    pieces = [f" w{i}" for i in range(10)]
    for record, rest in ((first, [" th", "ir", "teen", "\n", "end"]), (second, ["x"] * 20)):
        text = text_of([*range(10), *range(50 + len(rest), 50 + 2 * len(rest))], 3)
        record.tokens.texts = [replace(text, pieces=[*pieces, *rest])]  # type: ignore[union-attr]
    assert f"then first writes ' thirteen', second writes '{'x' * 12}'" in str(ra.compare(first, second, None))


def test_a_full_cache_has_forgotten_nothing() -> None:
    """Its recorder has seen no round."""
    full, other = Recorder(tokens=True), parted()[0]
    full.follow(lambda: None, 2, 2)
    full.tokens.set_texts([text_of([*other.tokens.texts[0].ids], 3)])  # type: ignore[union-attr]
    other.tokens.texts = full.tokens.texts  # type: ignore[union-attr]
    side = ra.compare(full, other, None).sides[0]
    assert (side.heads, side.round, side.holders.tolist()) == (4, 0, [4] * 12)


def test_a_run_compared_with_the_full_cache(tmp_path: Path) -> None:
    records = [tmp_path / "full.json", tmp_path / "rkv.json"]
    for path, budget in zip(records, (None, 24), strict=True):
        recorder = Recorder(tokens=True)
        _, ids, mask = run(ra.Compression.method(path.stem, budget, interval=8), [40], recorder)
        recorder.set_text(word_tokenizer(), ids, mask)
        recorder.save(path)
    result = command("compare", *records, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "the texts are the same: 26 tokens behind the prompt" in result.stdout
    assert [side["name"] for side in data_of(tmp_path / "page.html")["sides"]] == ["full", "rkv"]


def test_what_cannot_be_compared_is_said(tmp_path: Path, batch: Recorder) -> None:
    first, second = parted()
    one = small()
    with pytest.raises(
        ValueError, match=r"the record 'first' has no text: record with `reasonalloc generate --record`"
    ):
        ra.compare(Recorder(), first, None)
    with pytest.raises(ValueError, match=r"'second' is of 2 sequences: compare records of one"):
        ra.compare(first, batch, None)
    first.tokens.texts = [text_of([*range(12)], 3)]  # type: ignore[union-attr]
    second.tokens.texts = [text_of([*range(12)], 4)]  # type: ignore[union-attr]
    prompts = r"different prompts: at token 3, 'first' has '\(the end\)' and 'second' has ' 3'"
    with pytest.raises(ValueError, match=prompts):
        ra.compare(first, second, None)
    (text,) = one.tokens.texts  # type: ignore[union-attr]
    one.tokens.texts = [replace(text, ids=[i + 100 for i in text.ids])]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="of different tokenizers, which read the prompt in other tokens"):
        ra.compare(small(), one, None)
    one.save(tmp_path / "a.json")
    assert "no record at" in command("compare", tmp_path / "a.json", tmp_path / "b.json").stderr


# ---- in a browser ------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",
    "--dump-dom",
]
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open the page of these records in a browser that then runs a script; what it puts into ``found``."""
    read = assembly._read

    def open_page(*records: Recorder, script: str, address: str = "", width: int = 1300, before: str = "") -> Any:
        is_waiting = "!document.body.dataset.ready && element('waiting').textContent === 'Unpacking \u2026'"
        probe = (
            "\nasync function probe() {\n"
            f"while ({is_waiting}) await new Promise((done) => setTimeout(done, 5));"
            f"const found = {{}};\n{script}\n"
            "const out = document.createElement('pre'); out.id = 'found'; out.textContent = JSON.stringify(found);"
            "document.body.append(out); }\nprobe();"
        )
        name = "view.js" if len(records) == 1 else "compare.js"
        monkeypatch.setattr(
            assembly, "_read", lambda asset: before * (asset == "common.js") + read(asset) + probe * (asset == name)
        )
        path = tmp_path / "page.html"
        if len(records) == 1:
            ra.view(records[0], path)
        else:
            ra.compare(records[0], records[1], path)
        own = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
        assert CHROMIUM is not None
        done = subprocess.run(
            [CHROMIUM, *OPTIONS, *own, f"file://{path}{address}"], capture_output=True, text=True, timeout=120
        )
        found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
        return json.loads(html.unescape(found[1]))

    return open_page


@browser
def test_the_page_in_a_browser(opened: Any) -> None:
    pieces = [*EVIL, *(f" w{i}" for i in range(13))]
    recorder = small(EVIL[0], pieces)
    found = opened(
        recorder,
        address="#round=2",
        script="""
        const over = (target, type, x, y) => target.dispatchEvent(
          new MouseEvent(type, { bubbles: true, clientX: x, clientY: y }));
        const state = () => ({ where: element("where").textContent, summary: element("summary").textContent,
          classes: spans.map((span) => span.className), address: location.hash, hint: element("hint").textContent });
        found.held = Array.from(held); found.gone = Array.from(gone); found.text = spans.map((s) => s.textContent);
        found.title = document.title; found.about = element("about").textContent;
        found.images = document.querySelectorAll("img").length;
        found.opened = state();
        found.share = percent(average(means.slice(layers, 2 * layers)) / 10);
        found.legends = [element("later").textContent];
        element("round").value = 2; element("round").dispatchEvent(new Event("input")); found.moved = state();
        found.legends.push(element("later").textContent);
        over(spans[15], "mousemove", 5, 5); found.late = element("hint").textContent;
        found.dimmed = spans.map((s) => s.style.color.startsWith("color-mix"));
        const box = element("heads").getBoundingClientRect();
        const x = box.left + LEFT + 1.5 * cellWidth(), y = box.top + TOP + 1.5 * rowHeight();
        over(element("heads"), "mousemove", x, y); found.head = element("hint").textContent;
        over(element("heads"), "click", x, y); found.chosen = state(); found.heading = element("textTitle").textContent;
        over(spans[2], "mousemove", 5, 5); found.token = element("hint").textContent;
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" })); found.all = state();
        element("heads").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" })); found.keyed = state();
        location.hash = "#round=1"; await new Promise((done) => setTimeout(done, 50)); found.linked = state();
        const time = element("layers").getBoundingClientRect();
        over(element("layers"), "click", time.left + LEFT + 2.5 * columnWidth(), time.top + 9); found.timed = state();
        element("play").click(); found.first = state(); found.button = element("play").textContent;
        await new Promise((done) => setTimeout(done, 5000)); found.played = state();
        """,
    )
    tokens = history(recorder, 0).tokens
    assert tokens is not None
    held = np.array(found["held"]).reshape(3, 14)
    for round, seen in enumerate(SEEN):
        assert held[round, :seen].tolist() == tokens.holders(round)[:seen].tolist()
    assert found["gone"] == tokens.let_go.flatten().tolist()
    assert found["text"] == pieces
    assert (found["title"], found["images"]) == (EVIL[0], 0)
    assert found["about"] == "2 layers of 3 key/value heads"
    assert found["opened"]["where"] == "round 2 of 3 · 10 tokens read"
    few, lost = ((tokens.holders(1)[:10] < least).sum() for least in (3, 1))
    held_by = (
        f"{few} of 10 tokens ({10 * few}\u00a0%) are held by fewer than half of the heads, {lost} of these by none."
    )
    kept = int(history(recorder, 0).kept[1].mean() + 0.5)
    budget = f"A head holds {kept} of 10 tokens on average ({found['share']}); the budget is {kept}."
    assert found["opened"]["summary"] == f"{held_by} {budget}"

    def classes(round: int) -> list[str]:
        counts = tokens.holders(round)[: SEEN[round]]
        lost = ["lost" if count == 0 else "few" if count < 3 else "" for count in counts]
        return lost + ["later"] * (16 - SEEN[round])

    assert found["opened"]["classes"] == classes(1)
    assert found["opened"]["classes"][2] == "lost"
    assert found["moved"]["classes"] == found["all"]["classes"] == classes(2)
    assert found["dimmed"] == [name == "few" for name in classes(2)]
    assert found["legends"] == ["not read yet at this round", "written after the last round"]
    assert found["late"] == "“w12” at position 15\nwritten after the last round"
    assert found["moved"]["address"] == "#round=3"
    kept, before = history(recorder, 0).kept[2, 1, 1], history(recorder, 0).before[2, 1, 1]
    assert found["head"].splitlines() == [
        "layer 1, head 1",
        f"budget: {kept} tokens",
        f"held: {kept} after the round",
        f"held before its last eviction: {before}",
        "score that a token of the layer needed: 2.25",
    ]
    own = [
        "lost" if mine == "lost" else "" if when >= 3 else "gone"
        for mine, when in zip(classes(2), tokens.let_go[1, 1].tolist(), strict=False)
    ]
    assert found["chosen"]["classes"] == [*own, "later", "later"]
    assert found["chosen"]["address"] == "#round=3&head=1.1"
    assert found["heading"] == "Text as layer 1, head 1 holds it"
    assert found["token"].splitlines() == [
        "“&lt;b&gt;” at position 2 (prompt)",
        "held by 0 of 6 heads (0\u00a0%)",
        "layer 1, head 1: evicted in round 2",
        f"score: {tokens.scores[2, 2]} % (0: the worst of its head, 100: the best)",
        "the last head let go of it in round 2",
    ]
    assert found["keyed"]["address"] == "#round=3&head=0.0"
    assert found["linked"]["where"] == "round 1 of 3 · 6 tokens read"
    assert found["timed"]["where"] == "round 3 of 3 · 14 tokens read"
    assert (found["first"]["where"], found["button"]) == ("round 1 of 3 · 6 tokens read", "Pause")
    assert found["played"]["where"] == "round 3 of 3 · 14 tokens read"


@browser
def test_the_page_on_a_phone(opened: Any) -> None:
    recorder = Recorder(tokens=True)
    cache, ids, mask = run(ra.Compression.method("rkv", 16, interval=8, prompt="protect"), [20], recorder)
    recorder.set_text(word_tokenizer(), ids, mask)
    found = opened(
        recorder,
        width=390,
        script="""
        found.slider = element("round").clientWidth; found.width = innerWidth;
        found.needed = document.documentElement.scrollWidth;
        found.maps = ["heads", "layers"].map(element).map((x) => x.clientWidth <= x.parentElement.clientWidth - 20);
        found.summary = element("summary").textContent; found.title = document.title;
        found.waiting = element("waiting").hidden; found.content = element("content").hidden;
        found.ticks = shareTicks().map(([, word]) => word); found.axis = labelledRounds().map((r) => data.seen[r]);
        """,
    )
    assert found["slider"] > 300
    assert found["needed"] <= found["width"]
    assert found["maps"] == [True, True]
    seen = history(recorder, 0).seen.tolist()
    parts = found["summary"].split(". ")
    assert (
        parts[1]
        == f"A head holds 36 of {seen[-1]} tokens on average ({3600 / seen[-1]:.0f}\u00a0%): 36 = prompt 20 + budget 16"
    )
    per_token = cache.ragged.table.heads * cache.ragged.table.layers * recorder.entry_bytes / 1024
    kib = [f"{count * per_token:.1f}\u00a0KiB" for count in (36, seen[-1])]
    assert parts[2:] == [f"Held keys and values take {kib[0]}; a full cache would take {kib[1]}."]
    assert found["title"] == "rkv (scorer rkv, layers uniform, heads uniform), budget 16, interval 8, prompt protect"
    assert (found["waiting"], found["content"]) == (True, False)
    assert found["ticks"] == ["1", "2", "5", "9"]
    assert found["axis"] == seen


@browser
def test_a_browser_that_cannot_unpack_is_told(opened: Any) -> None:
    script = "found.words = element('waiting').textContent; found.content = element('content').hidden;"
    found = opened(small(), before="delete window.DecompressionStream;\n", script=script)
    assert found == {"words": "This page needs a browser of 2023 or later.", "content": True}


@browser
def test_a_page_without_tokens_in_a_browser(opened: Any) -> None:
    plain = Recorder()
    for routing in small().routings:
        plain.add(routing)
    found = opened(
        plain,
        script="""
        found.note = element("textNote").textContent; found.legend = element("textLegend").hidden;
        found.spans = spans.length; found.where = element("where").textContent;
        """,
    )
    assert "To see the text, record with Recorder(tokens=True)" in found["note"]
    assert (found["legend"], found["spans"], found["where"]) == (True, 0, "round 3 of 3 · 14 tokens read")


@browser
def test_long_lists_of_a_comparison_do_not_scroll_sideways(opened: Any) -> None:
    let_go = np.full((2, 2, 90), -1)
    let_go[:, :, ::2] = 0
    words = [f" w{i}" for i in range(90)]
    lists = "[0, 1].map((i) => element(`list${i}`))"
    found = opened(
        made(let_go, [89, 90], [*words, " one"], 3),
        made(np.where(let_go, 0, -1), [89, 90], [*words, " two"], 3),
        script=f"found.lists = {lists}.map((one) => [one.children.length, one.scrollWidth - one.clientWidth]);",
    )
    assert found["lists"] == [[45, 0], [45, 0]]


@browser
def test_a_comparison_in_a_browser(opened: Any) -> None:
    first, second = parted()
    first.tokens.texts[0].ids[:] = [*range(10), 1, 50]  # type: ignore[union-attr]
    second.tokens.texts[0].ids[:] = [*range(10), 60]  # type: ignore[union-attr]
    found = opened(
        first,
        second,
        script="""
        found.classes = spans.map((side) => side.map((span) => span.className));
        found.verdict = element("verdict").textContent;
        found.next = [0, 1].map((i) => element(`next${i}`).textContent);
        found.lists = [0, 1].map((i) => element(`list${i}`).textContent);
        spans[0][2].dispatchEvent(new MouseEvent("mousemove", { bubbles: true, clientX: 9, clientY: 9 }));
        found.hint = element("hint").textContent;
        found.marked = spans.map((side) => side.findIndex((span) => span.classList.contains("marked")));
        """,
    )
    assert found["classes"][0] == ["", "lost", "few", "kept", *[""] * 6, "new first", "new"]
    assert found["classes"][1] == ["", "kept", "kept", "few", *[""] * 6, "new first"]
    assert found["verdict"] == "The texts are the same for 7 tokens behind the prompt, and part at position 10."
    assert found["next"] == [
        "first writes “w1” next, which had stood before at",
        "second writes “zz” next, which had not stood before",
    ]
    assert found["lists"] == [
        "w3 at 3: first 4/4, second 1/4",
        "w1 at 1: first 0/4, second 4/4w2 at 2: first 1/4, second 4/4",
    ]
    assert found["hint"].splitlines() == [
        "“w2” at position 2 (prompt)",
        "first: held by 1 of 4 heads",
        "second: held by 4 of 4 heads",
    ]
    assert found["marked"] == [2, 2]
