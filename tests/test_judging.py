"""The process that judges mathematics: answers that take for ever, threads, other processes, interrupts."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from reasonalloc.mathematics.judging import JUDGE, Judge

pytest.importorskip("math_verify")

ENDLESS = [r"2^{10^9} + 3^{10^9}", r"9^{9^{9^{9}}}", r"\binom{10^{9}}{5 \cdot 10^{8}}", "(10^{9})!"]


@pytest.fixture
def own():
    judge = Judge()
    yield judge
    judge.close()


def test_an_answer_has_so_much_time(own):
    for answer in ENDLESS:
        own.ask("1", r"\boxed{1}")
        began = time.perf_counter()
        found = own.ask("5", f"\\boxed{{{answer}}}", limit=0.5)
        assert time.perf_counter() - began < 3
        assert found is None or found["score"] == 0.0
    assert own.ask("5", f"\\boxed{{{ENDLESS[0]}}}", limit=0.3) is None
    assert own.ask("5", r"\boxed{5}")["score"] == 1.0, "the next answer is judged by a new process"
    own.close()
    psutil = pytest.importorskip("psutil")
    assert psutil.STATUS_ZOMBIE not in [child.status() for child in psutil.Process().children()]


def test_any_thread_may_grade():
    def work(number):
        for answer in (number, number + 1):
            grades.append((answer == number, JUDGE.ask(str(number), f"\\boxed{{{answer}}}")["score"] == 1.0))

    grades = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(grades) == 16
    assert all(expected == found for expected, found in grades)


def graded_in_child(number, connection):
    connection.send(JUDGE.ask(str(number), f"\\boxed{{{number}}}")["score"])


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_other_processes_grade_with_their_own(method):
    JUDGE.ask("1", r"\boxed{1}")
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    child = context.Process(target=graded_in_child, args=(3, there))
    child.start()
    there.close()
    assert JUDGE.ask("2", r"\boxed{2}")["score"] == 1.0, "at the same time"
    assert here.poll(60)
    assert here.recv() == 1.0
    child.join(60)
    assert child.exitcode == 0
    assert JUDGE.ask("4", r"\boxed{4}")["score"] == 1.0


SCRIPT = r"""
from reasonalloc.mathematics.judging import JUDGE
print(JUDGE.ask("5", "\\boxed{5}")["score"], JUDGE._process.pid, flush=True)
input()
"""


def test_a_script_without_a_main_guard_leaves_no_process_behind(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "json.py").write_text("raise RuntimeError('not the real one')")  # beside what is run, not before it
    for how in ("end", "kill"):
        paths = [path for path in sys.path if path]
        code = f"import sys; sys.path[:] = {paths!r}; exec(open('script.py').read())"
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        score, pid = process.stdout.readline().split()
        assert score == "1.0"
        os.kill(int(pid), 0)
        if how == "kill":
            process.kill()
        else:
            process.stdin.write("\n")
        process.stdin.close()
        process.wait(30)
        process.stdout.close()
        for _ in range(100):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"the grader's process is still there after {how}")


def test_an_interrupted_question_is_not_answered_later(own, monkeypatch):
    own.ask("1", r"\boxed{1}")

    class Interrupted:
        def __init__(self, file):
            self.file = file

        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            self.file.close()

    monkeypatch.setattr(own._process, "stdout", Interrupted(own._process.stdout))
    with pytest.raises(KeyboardInterrupt):
        own.ask("2", r"\boxed{2}")
    assert own.ask("3", r"\boxed{4}")["score"] == 0.0
    assert own.ask("3", r"\boxed{3}")["score"] == 1.0


def test_a_process_that_was_killed_is_replaced(own):
    own.ask("1", r"\boxed{1}")
    own._process.kill()
    own._process.wait()
    assert own.ask("3", r"\boxed{3}")["score"] == 1.0
