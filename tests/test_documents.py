"""What README and the pages say works as written: every Python block, every command and its options, every link."""

import inspect
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from pages import PAGES, ROOT, anchors, blocks, commands, links, text
from typer.main import get_command
from typer.testing import CliRunner

import reasonalloc as ra
from reasonalloc.cli.app import app
from reasonalloc.engines.vllm.settings import settings

MODEL_FOLDER = str(ROOT / "src/reasonalloc/reasoner/model")

# ---- Python ----

# Where a page names a model of the hub, the tests take the built-in reasoner; texts are short, and there is no GPU.
STAND_INS = [
    (r"\"(?:deepseek-ai|Qwen|HuggingFaceTB|meta-llama)/[\w.-]+\"", f'"{MODEL_FOLDER}"'),
    (r"max_new_tokens=\d[\d_]*", "max_new_tokens=24"),
    (r"\"OWNER/reasonalloc\"", '"hub"'),
    (r", device_map=\"cuda\"", ""),
]
if Version(transformers.__version__) < Version("5.24"):
    STAND_INS.append((r"\bcache=cache\b", "past_key_values=cache"))

# Blocks that cannot run here: a piece of their text, and why.
NOT_RUN = {
    "llm.collective_rpc": "needs a served model: tests/serving/run_offline.py calls it",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Like a user's checkout: some of its files, and a profile of the reasoner with all that can be measured."""
    folder = tmp_path_factory.mktemp("documents")
    for name in ("profiles", "studies", "docs", "examples", "hub"):  # copies: pages write into them
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name)
    profile = ra.DemandProfile.load(ROOT / "profiles/reasoner-loss.json")
    other = {found.hash: found for found in ra.DemandProfile.load(Path(MODEL_FOLDER) / "demand_profile.json").prompts}
    prompts = tuple(replace(found, sensitivity=other[found.hash].sensitivity) for found in profile.prompts)
    for name in ("wave.json", "profile.json"):
        (folder / name).write_bytes(replace(profile, prompts=prompts).to_json())
    return folder


@pytest.fixture
def user(workplace, tmp_path, monkeypatch):
    """A folder of one page's own, and what it registers is forgotten afterwards."""
    for entry in workplace.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    for registry in (ra.SCORERS, ra.LAYER_ALLOCATORS, ra.HEAD_ALLOCATORS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    return tmp_path


def programs(page):
    return [block for block in blocks(page) if block.language in ("python", "py")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if programs(page)])
def test_python_runs_as_written(page, user):
    shared = {"__name__": "a_page"}
    for block in programs(page):
        code = block.code
        if any(piece in code for piece in NOT_RUN):
            continue
        for written, taken in STAND_INS:
            code = re.sub(written, taken, code)
        exec(compile("\n" * (block.line - 1) + code, str(ROOT / page), "exec"), shared)


def test_what_is_not_run_is_still_there():
    everything = "".join(block.code for page in PAGES for block in programs(page))
    assert [piece for piece in NOT_RUN if piece not in everything] == []


# ---- the command line ----

COMMANDS = get_command(app)
CALLS = [(page, line, words) for page in PAGES for line, words in commands(page)]


def resolve(words):
    """The command that the first words name, and the words after it."""
    command, rest = COMMANDS, list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    return command, rest


def complaint(words):
    """What is wrong with a call, "" if nothing."""
    command, rest = resolve(words)
    if command.context_settings.get("ignore_unknown_options"):
        return ""  # it hands them on to a tool of others
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    arguments = [option for option in command.params if option.param_type_name == "argument"]
    if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        return f"there is no command {rest[0]}"
    free = 0
    while rest:
        name, *value = rest.pop(0).split("=", 1)
        if not name.startswith("-") or name == "-":
            free += name != "..."
        elif name == "--help":
            continue
        elif name not in options:
            return f"{command.name} has no option {name}"
        elif not getattr(options[name], "is_flag", False):
            if not value and not rest:
                return f"{name} has no value"
            if not value:
                rest.pop(0)
    most = sum(10**6 if option.nargs < 0 else option.nargs for option in arguments)
    return f"{command.name} takes {most} words beside its options, not {free}" if free > most else ""


def test_calls_are_found():
    assert len(CALLS) > 20
    assert complaint(["generate", "--modell", "x"]) == "generate has no option --modell"
    assert complaint(["profiel", "show"]) == "there is no command profiel"
    assert complaint(["methods", "rkv"]) == "methods takes 0 words beside its options, not 1"


@pytest.mark.parametrize("page", sorted({page for page, _, _ in CALLS}))
def test_commands_and_options_exist(page):
    wrong = [f"{page}:{line}: {said}" for at, line, words in CALLS if at == page and (said := complaint(words))]
    assert wrong == []


@pytest.mark.parametrize("page", sorted({page for page, _, _ in CALLS}))
def test_files_that_commands_name_exist(page):
    named = [
        (line, word)
        for at, line, words in CALLS
        for before, word in zip(["", *words], words, strict=False)
        if at == page and before not in ("-o", "--output") and re.match(r"(studies|profiles|results)/[\w./-]+$", word)
    ]
    assert [f"{page}:{line}: {word}" for line, word in named if not (ROOT / word).exists()] == []


QUICK = ("methods", "problems", "profile show", "generate")
PLACES = {"PATH_OR_HUB_ID", "MODEL", "M", "PATH"}
SERVED = [page for page in PAGES if "REASONALLOC='" in text(page)]
MADE = {"my-model"}  # by a page's own blocks


def cheap():
    """Calls that take a second: each once, on the built-in reasoner, with a few new tokens."""
    for page, line, words in CALLS:
        command = next((name for name in QUICK if words[: len(name.split())] == name.split()), "")
        size = len(command.split())
        if not command or not words[size:] or {"...", "FILE"} & set(words[size : size + 1]) or MADE & set(words):
            continue
        words = [MODEL_FOLDER if word in PLACES else word for word in words]
        if command == "generate":
            words += ["--max-new-tokens", "8"]
        yield pytest.param([str(word) for word in words], id=f"{page}:{line}")


def test_pages_have_what_is_run():
    """Else the tests beside this one would be skipped without a word."""
    assert len(list(cheap())) > 5
    assert SERVED


@pytest.mark.parametrize("words", cheap())
def test_cheap_commands_run(words, user):
    done = CliRunner().invoke(app, words, input="x1 end . a x1")
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_calibrations_run(user):
    """Those of the pages, on the built-in reasoner and one short question."""
    calls = [words for page, _, words in CALLS if words[:1] == ["calibrate"] and "MODEL" not in words and "-o" in words]
    assert calls
    for words in calls:
        words = [str(MODEL_FOLDER) if word in PLACES else word for word in words]
        words[words.index("-o") + 1] = "calibrated.json"
        done = CliRunner().invoke(app, [*words, "--limit", "1", "--max-new-tokens", "96"])
        assert done.exit_code == 0, (words, done.output)
        Path("calibrated.json").unlink()


@pytest.mark.parametrize("page", SERVED)
def test_served_settings_are_read(page, user, monkeypatch):
    for value in re.findall(r"REASONALLOC='([^']*)'", text(page)):
        monkeypatch.setenv("REASONALLOC", value)
        assert settings() is not None


# ---- links ----


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    dead = []
    for line, link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists():
            dead.append(f"{page}:{line}: {link}: no such file")
        elif anchor and anchor not in anchors(os.path.relpath(target.resolve(), ROOT)):
            dead.append(f"{page}:{line}: {link}: no such heading")
    assert dead == []


def test_pages_link_to_files_not_to_folders():
    """The site brings the files along that pages link to (docs/site_hooks.py); a folder it cannot show."""
    folders = [
        f"{page}:{line}: {link}"
        for page in PAGES
        for line, link in links(page)
        if (path := link.partition("#")[0]) and (ROOT / page).parent.joinpath(path).is_dir()
    ]
    assert folders == []


# ---- the API ----

SHOWN = [name for page in PAGES if page.startswith("docs/api/") for name in re.findall(r"^::: (\S+)", text(page), re.M)]


def test_every_public_name_is_shown_once():
    public = [name.removeprefix("reasonalloc.") for name in SHOWN if re.fullmatch(r"reasonalloc\.\w+", name)]
    assert sorted(public) == sorted(ra.__all__)
    assert [name for name, times in Counter(SHOWN).items() if times > 1] == []


def test_what_is_shown_exists_and_says_what_it_is():
    for name in SHOWN:
        home, _, attribute = name.rpartition(".")
        found = getattr(import_module(home), attribute)
        if isinstance(found, type) or callable(found):
            assert found.__doc__, name


def described(found):
    """What the docstrings of a class or function say of its parameters, those that it refers to included."""
    said = f"{found.__doc__}\n{found.__init__.__doc__ if isinstance(found, type) else ''}"
    other = re.search(r"settings and errors are those of ``(\w+)``", said)
    return said + (described(getattr(ra, other[1])) if other else "")


@pytest.mark.parametrize("name", [name for name in ra.__all__ if name not in ("UnsupportedModelError", "METHODS")])
def test_every_setting_is_described(name):
    found = getattr(ra, name)
    if not (isinstance(found, type) or inspect.isfunction(found)):
        return
    written = described(found)
    parameters = inspect.signature(found).parameters.values()
    named = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    told = [one for one in named if isinstance(getattr(found, one, None), property)]  # each by itself
    told += [one for one in named if re.search(rf"^ +(\w+, )*{one}(, \w+)*:", written, re.M)]
    assert sorted(set(named) - set(told)) == []


def test_the_site_needs_no_other_server():
    """No font, script or picture from elsewhere; what a page says of the web are links."""
    assert not re.search(r"^ *(extra_javascript|analytics)", text_of("mkdocs.yml"), re.M)
    assert "font: false" in text_of("mkdocs.yml")
    assert [page for page in PAGES if re.search(r"!\[[^]]*\]\(https?:|src=\"https?:", text(page))] == []


def text_of(name):
    return (ROOT / name).read_text("utf-8")
