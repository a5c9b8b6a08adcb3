"""What a release is made of: one version, and archives that hold what the package needs and nothing else."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import reasonalloc as ra

ROOT = Path(__file__).parents[1]
LARGEST = 5_000_000  # bytes of an archive
BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml", ".gitignore"}  # in the sdist


def tracked():
    """The package's files as git knows them, those included that are not committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "src/reasonalloc"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name.removeprefix("src/") for name in listed if name and (ROOT / name).is_file()}


def chosen(builder):
    return {file.distribution_path for file in builder(str(ROOT)).recurse_included_files()}


def test_the_version_is_the_same_wherever_it_is_told():
    assert WheelBuilder(str(ROOT)).metadata.version == ra.__version__
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == ra.__version__
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(line for line in headings if line != "Unreleased").startswith(f"{ra.__version__} ")


def test_a_wheel_holds_every_file_of_the_package_and_no_other():
    files = chosen(WheelBuilder)
    assert files == tracked()
    assert {"reasonalloc/reasoner/model/model.safetensors", "reasonalloc/py.typed"} < files


def test_an_sdist_holds_what_a_wheel_is_made_of():
    assert chosen(SdistBuilder) | BESIDE == {f"src/{name}" for name in tracked()} | BESIDE


def output_of(*arguments, **options):
    """A program's output; what is importable here is not for it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The sdist and the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    output_of(*build, folder, "--sdist", "--wheel", ROOT)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_archives_are_small_and_the_sdist_builds_the_same_wheel(archives, tmp_path):
    sdist, wheel = archives
    assert all(archive.stat().st_size < LARGEST for archive in archives)
    with tarfile.open(sdist) as archive:
        top = sdist.name.removesuffix(".tar.gz")
        members = {member.name.removeprefix(f"{top}/") for member in archive.getmembers() if member.isfile()}
        assert members == {f"src/{name}" for name in tracked()} | BESIDE | {"PKG-INFO"}
        archive.extractall(tmp_path / "unpacked", filter="data")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    output_of(*build, tmp_path, "--wheel", tmp_path / "unpacked" / top)
    assert names(tmp_path / wheel.name) == names(wheel)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(archives, tmp_path):
    """Installs torch and transformers: without a local build of torch for the CPU, that downloads gigabytes."""
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    install = (programs / "python", "-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt")
    output_of(*install, archives[1])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*arguments):
        return output_of(programs / "reasonalloc", *arguments, cwd=elsewhere)

    assert run("--version") == f"reasonalloc {ra.__version__}\n"
    assert "\nreasonalloc " in run("methods")
    ask = ("generate", "-m", "reasonalloc/reasoner", "-p", "What?", "-b", 32, "--max-new-tokens", 4)
    assert run(*ask).strip()
    where = output_of(programs / "python", "-c", "import reasonalloc; print(reasonalloc.__file__)", cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(tmp_path / "env")
