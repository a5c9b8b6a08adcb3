"""All that is checked and measured on one NVIDIA GPU, in at most six minutes: ``make gpu``.

    PYTHONPATH=src python3 benchmarks/gpu.py [--only tests,attention,steps,decode,vllm]
    PYTHONPATH=src python3 benchmarks/gpu.py --rehearse      # the same on a CPU, with tiny sizes

Each part is a process of its own with a time limit. One that fails or runs over says so in one line, what it found
until then counts, and the next one runs. At the end there is one table, and ``results/gpu.json``, which is written
anew after each part. Nothing is installed or downloaded. Bars are an H200's; other GPUs are held to them, too.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpu_report import FAILURE, FIGURE, NOTE, Clock

from reasonalloc.files import write_atomically

HERE = Path(__file__).resolve().parent
TOTAL = 355.0  # seconds of all parts together
LEAST = 10.0  # seconds without which a part is not begun
GRACE = 3.0  # seconds between asking a part to end, and ending it
TAIL = 30  # last lines of a part's output that are kept
MACHINE = """
import json, sys
missing = []
for name in ("torch", "triton", "transformers", "pytest", "jaxtyping", "numpy"):
    try:
        __import__(name)
    except ImportError:
        missing.append(name)
import torch
found = {"python": sys.version.split()[0], "torch": torch.__version__, "missing": missing, "gpu": None}
for name in {"triton", "transformers"} - set(missing):
    found[name] = sys.modules[name].__version__
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
              "memory_gib": round(total / 2**30, 1), "free_gib": round(free / 2**30, 1),
              "capability": list(torch.cuda.get_device_capability())}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """A script that prints figures and notes.

    Attributes:
        name: of the part.
        limit: seconds that it may take.
        script: beside this file.
        takes_options: whether it is told how long it may take, to leave out what it has no time for, and whether this
            is a rehearsal.
    """

    name: str
    limit: float
    script: str
    takes_options: bool = True

    def command(self, seconds: float, rehearse: bool) -> list[str]:
        """What to run."""
        options = ["--seconds", f"{seconds:.0f}", *["--rehearse"] * rehearse] if self.takes_options else []
        return [sys.executable, str(HERE / self.script), *options]


PARTS = (
    Part("tests", 90, "gpu_tests.py"),
    Part("attention", 60, "gpu_attention.py"),
    Part("steps", 100, "gpu_steps.py"),
    Part("decode", 110, "gpu_decode.py"),
    Part("vllm", TOTAL, "gpu_vllm.py", takes_options=False),
)


class Ended(Exception):
    """A part has not ended well; the message is one line."""


def lines_of(process: "subprocess.Popen[str]", seconds: float) -> Any:
    """Its output, line by line.

    Raises:
        TimeoutError: the time is over.
    """
    arrived: queue.Queue[str | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for line in stream:
            arrived.put(line)
        arrived.put(None)

    assert process.stdout is not None
    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    clock = Clock(seconds)
    while True:
        try:
            line = arrived.get(timeout=max(0.0, clock.left()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        yield line


def uninterpreted() -> dict[str, str]:
    """The environment of a part: its kernels are compiled, whatever was set here."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def end(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it has started."""
    for how, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, how)
            process.wait(wait)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def parsed(line: str) -> dict[str, Any] | None:
    """A line's JSON object, if it is one."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def run(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """One part: figures, notes, failures, how it ended (``problem``, empty if well), and the end of its output."""
    began = time.monotonic()
    figures: list[dict[str, Any]] = []
    said: dict[str, list[str]] = {NOTE: [], FAILURE: []}
    tail: list[str] = []
    problem, last = "", None
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env=uninterpreted(),
    )  # fmt: skip
    try:
        for line in lines_of(process, seconds):
            last = parsed(line)
            if last is not None and FIGURE in last:
                figures.append(last)
                print(f"  {shown(last)}", flush=True)
            elif kind := next((kind for kind in said if kind in (last or ())), None):
                assert last is not None
                said[kind].append(str(last[kind]))
                print(f"  {last[kind]}", flush=True)
            elif line.strip():
                tail = [*tail[-TAIL + 1 :], line.rstrip()]
        code = process.wait(GRACE)
        if code:
            why = next((line for line in reversed(tail) if parsed(line) is None), "it said nothing")
            problem = f"failed ({'signal' if code < 0 else 'exit'} {abs(code)}): {why.strip()[:200]}"
    except (TimeoutError, subprocess.TimeoutExpired):
        problem = f"ran over its {seconds:.0f} seconds, and was ended"
    finally:
        end(process)
    figures += all_at_once(last)
    seconds = round(time.monotonic() - began, 1)
    result = {**left_out(*said[NOTE]), "problem": problem, "seconds": seconds, "figures": figures}
    result["failures"] = said[FAILURE]
    if last is not None and not {FIGURE, *said} & last.keys():
        result["result"] = last
    return {**result, "tail": tail} if problem or said[FAILURE] else result


def all_at_once(last: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What a part says in its last line: its ``figures``, or all that is a number there."""
    if last is None or {FIGURE, NOTE, FAILURE} & last.keys():
        return []
    if isinstance(last.get("figures"), list):
        return [x for x in last["figures"] if isinstance(x, dict) and {FIGURE, "value"} <= x.keys()]
    numbers = {name: x for name, x in last.items() if isinstance(x, int | float) and not isinstance(x, bool)}
    return [{FIGURE: name, "value": x} for name, x in numbers.items()]


def shown(found: dict[str, Any]) -> str:
    """A figure in one line of the table."""
    value = f"{found['value']:.5g} {found.get('unit', '')}".strip()
    met = {True: "met", False: "NOT MET", None: ""}[found.get("met")]
    return f"{found[FIGURE]:58s} {value:>18s}   {found.get('bar', ''):12s} {met}".rstrip()


def table(results: dict[str, dict[str, Any]], machine: dict[str, Any]) -> str:
    """All figures, and one line for whatever was left out or has failed."""
    gpu = machine.get("gpu") or "no GPU"
    lines = ["", f"{gpu}, torch {machine.get('torch')}, transformers {machine.get('transformers')}"]
    for name, result in results.items():
        lines += ["", f"{name} ({result['seconds']} s)" + (f": {result['problem']}" if result["problem"] else "")]
        lines += [f"  {shown(found)}" for found in result["figures"]]
        lines += [f"  {text}" for text in (*result["notes"], *result["failures"])]
    met = [found["met"] for result in results.values() for found in result["figures"] if found.get("met") is not None]
    failed = [name for name, result in results.items() if not is_well(result)]
    lines += ["", f"bars met: {sum(met)} of {len(met)}; failures in: {', '.join(failed) or 'no part'}"]
    return "\n".join(lines)


def left_out(*notes: str) -> dict[str, Any]:
    """The result of a part that has not run."""
    return {"problem": "", "seconds": 0.0, "figures": [], "notes": list(notes), "failures": []}


def is_well(result: dict[str, Any]) -> bool:
    """Whether a part has ended well, and none of its cells failed."""
    return not result["problem"] and not result["failures"]


def look(seconds: float) -> dict[str, Any]:
    """What machine this is.

    Raises:
        Ended: Python cannot even import torch.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", MACHINE], capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise Ended(f"importing torch takes more than {seconds:.0f} seconds") from None
    found = parsed(done.stdout.splitlines()[-1]) if done.stdout.strip() else None
    if done.returncode or found is None:
        raise Ended(f"{sys.executable} cannot import torch: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return found


def conduct(parts: Sequence[Part], output: Path, machine: dict[str, Any], rehearse: bool, total: float) -> bool:
    """Run the parts one after the other, write ``output`` after each, print the table. Whether none failed."""
    clock = Clock(total)
    results: dict[str, dict[str, Any]] = {}

    def write() -> None:
        found = {"machine": machine, "rehearsal": rehearse, "parts": results}
        write_atomically(output, json.dumps(found, indent=1).encode())

    for part in parts:
        seconds = min(part.limit, clock.left())
        print(f"\n{part.name}, at most {max(seconds, 0):.0f} s", flush=True)
        if not (HERE / part.script).exists():
            results[part.name] = left_out(f"there is no {part.script}")
        elif rehearse and not part.takes_options:
            results[part.name] = left_out("not rehearsed")
        elif seconds < LEAST:
            results[part.name] = {**left_out(), "problem": "has not run: no time was left"}
        else:
            results[part.name] = run(part.command(seconds, rehearse), seconds)
        if results[part.name]["problem"]:
            print(f"  {part.name} {results[part.name]['problem']}", flush=True)
        write()
    print(table(results, machine))
    print(f"wrote {output}")
    return all(is_well(result) for result in results.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--only", default="", help=f"some of {','.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--output", type=Path, help="default: results/gpu.json; of a rehearsal a temporary file")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    if set(wanted) - set(names):
        parser.error(f"--only takes some of {','.join(names)}, got {options.only}")
    began = time.monotonic()
    try:
        machine = look(60)
    except Ended as problem:
        print(problem)
        return 2
    if machine["missing"]:
        print(f"{sys.executable} has no {', '.join(machine['missing'])}")
        return 2
    if machine["gpu"] is None and not options.rehearse:
        print("there is no GPU that torch can use; --rehearse runs all parts on a CPU, with tiny sizes")
        return 2
    parts = [part for part in PARTS if not wanted or part.name in wanted]
    folder = Path(tempfile.mkdtemp()) if options.rehearse else HERE / "results"
    output = options.output or folder / "gpu.json"
    well = conduct(parts, output, machine, options.rehearse, TOTAL - (time.monotonic() - began))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
