"""Grading mathematics: what the answer is, and what it equals."""

import json
from pathlib import Path

import pytest

from reasonalloc.evaluation.grading import grade_math, grader_version
from reasonalloc.mathematics.finding import last_box
from reasonalloc.mathematics.judging import JUDGE, LIMIT

pytest.importorskip("math_verify")
DATA = Path(__file__).parents[2] / "shared" / "data"

# Reference and what stands in the box, in forms that MATH uses itself.
USUAL_RIGHT = [
    (r"\frac{14}{3}", r"\dfrac{14}{3}"),
    (r"\frac43", "4/3"),
    (r"\frac{1}{2}", "0.5"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    (r"11\sqrt2", r"11 \sqrt{2}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("6 - 5i", "-5i+6"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("1,-2", "-2, 1"),
    ("3, 5, 7", r"7, 5 \text{ and } 3"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty) \cup (-\infty,2)"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}"),
    (r"(a+5)(b+2)", "(b+2)(a+5)"),
    ("5x - 7y + 11z + 4 = 0", "10x - 14y + 22z + 8 = 0"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    (r"10,\!080", "10080"),
    (r"\$32,\!348", "32,348"),
    (r"5.4 \text{ cents}", "5.4"),
    ("4210_{5}", "4210_5"),
]
USUAL_WRONG = [
    (r"\frac{14}{3}", r"\frac{3}{14}"),
    (r"\frac{1}{3}", "0.33"),
    (r"1\frac{4}{5}", r"\frac{4}{5}"),
    (r"3\sqrt{13}", r"3\sqrt{15}"),
    ("6 - 5i", "6+5i"),
    ("5", "x=-5"),
    ("1,-2", "1, 2"),
    ("3, 5, 7", "3, 5"),
    ("3, 5, 7", "3, 5, 7, 9"),
    (r"(15,-29)", "(8,-2)"),
    ("(-2,1)", "(1,-2)"),
    ("(3,4]", "[3,4]"),
    (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}"),
    (r"(2,\infty)", r"[2,\infty)"),
    (r"(0,9) \cup (9,36)", "(0,36)"),
    (r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}", r"\begin{pmatrix} -14 \\ -2 \end{pmatrix}"),
    ("x^3+3x-6", "x^3-3x-6"),
    ("y = 2x + 3", "y = 2x - 3"),
    (r"\text{Evelyn}", r"\text{Briana}"),
    (r"\text{(C)}", "D"),
    ("52_8", "52_7"),
    ("204_5", "402_5"),
    (".0000672", "0.0000671"),
    (r"864 \mbox{ inches}^2", r"864 \text{ feet}^2"),
    (r"145^\circ", r"154^\circ"),
]
# ... and in others.
OTHER_RIGHT = [
    ("52_8", "52_{8}"),
    ("52_8", r"52_{\text{eight}}"),
    ("52_8", r"52 \text{ (base 8)}"),
    (r"90^\circ", "90°"),
    ("90", "90°"),
    (r"90^\circ", "90 degrees"),
    (r"\sqrt{3}", "√3"),
    (r"2\sqrt{3}", "2√(3)"),
    (r"[0,\infty)", "[0,∞)"),
    (r"[0,\infty)", r"x \ge 0"),
    (r"(-\infty, 2) \cup (3, \infty)", r"x < 2 \text{ or } x > 3"),
    ("1000000", r"1\,000\,000"),
    ("1000000", "1 000 000"),
    ("1000000", "1\u2009000\u202f000"),
    ("1000000", r"1 \text{ million}"),
    ("1.5", "1{,}5"),
    (r"1.5 \times 10^{-3}", "1.5e-3"),
    (r"137 \frac{1}{2}", "137 1/2"),
    (r"\frac14", "¼"),
    (r"\frac{1}{6}", r"0.1\overline{6}"),
    ("12.5", r"12.5\%"),
    (r"\$36", "36 dollars"),
    ("15", r"\text{15 people}"),
    ("15", r"15 \frac{\text{m}}{\text{s}}"),
    (r"\text{10:30 a.m.}", "10:30 AM"),
]
OTHER_WRONG = [
    ("52", "52_8"),
    ("52_8", "25_8"),
    ("5", r"5 \text{ million}"),
    ("7", r"7 \text{ or more}"),
    ("3", r"3 \text{ hours } 20 \text{ minutes}"),
    (r"\$5.40", "5.40¢"),
    (r"60 \text{ mph}", r"60 \text{ km/h}"),
    (r"3 \text{ h}", r"3 \text{ min}"),
    (r"\text{10:30 AM}", r"\text{10:30 PM}"),
    ("10:30", "11:30"),
    (r"\text{March 5}", "March 6"),
    (r"\{1,2\}", "(2,1)"),
    (r"[0,\infty)", "x > 0"),
    ("[-2,7]", r"-2 < x \le 7"),
    ("1000000", "1 000 00"),
    ("1234", "1.234"),
    ("58,500", "58.5"),
    ("0.0000001", "0.0000002"),
    ("10^{100}", "10^{101}"),
    (r"0.1\overline{6}", "0.16"),
    (r"10\%", "1"),
    (r"\pm 3", "3"),
    ("3:4", "4:3"),
    (r"\text{(B)}", r"\textbf{(D)}\ 12"),
    (r"\sqrt{3}", "∛3"),
]
USUAL = [*((*pair, True) for pair in USUAL_RIGHT), *((*pair, False) for pair in USUAL_WRONG)]
OTHER = [*((*pair, True) for pair in OTHER_RIGHT), *((*pair, False) for pair in OTHER_WRONG)]


def test_the_table_is_half_right_and_half_unusual():
    assert [len(set(pairs)) for pairs in (USUAL_RIGHT, USUAL_WRONG, OTHER_RIGHT, OTHER_WRONG)] == [25] * 4


@pytest.mark.parametrize(("reference", "answer", "right"), [*USUAL, *OTHER])
def test_answers_as_a_careful_reader_judges_them(reference, answer, right):
    grade = grade_math(reference, f"So we have $x$ = 1, and the answer is $\\boxed{{{answer}}}$.")
    assert grade.gradable
    assert grade.correct is right, grade


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"no box, 7", None),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{3}, \boxed{7}", "7"),
        (r"\boxed{3} \fbox{7}", "7"),
        (r"\boxed{7} and \boxed{}", ""),
        (r"\boxed{7} and \boxed{ }", ""),
        (r"\boxed{7} and \boxed{\frac{1}{2", ""),
        (r"\boxed{\text{is } \boxed{5}}", "5"),
        (r"\boxed{\frac{1}{2}} {so} it goes}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{[0,1\}} x}", r"[0,1\}"),
        (r"\boxed 12, then \boxed is no box", "12"),
        (r"\boxed {12}", "12"),
    ],
)
def test_the_last_box_counts_alone(text, held):
    assert last_box(text) == held


@pytest.mark.parametrize(
    ("reference", "text", "right"),
    [
        ("7", r"The answer is \fbox{7}.", True),
        ("3,7", r"Either \boxed{3}, \boxed{7}", False),
        ("7", r"Either \boxed{3}, \boxed{7}", True),
        ("3", r"Either \boxed{3}, \boxed{7}", False),
        ("7", r"It is 7. $\boxed{}$", False),
        ("7", r"It is $7$. Final answer: \boxed{7", False),
        ("52_8", "The answer is $52_8$.", True),
        ("52_8", "The answer is 52_7.", False),
        ("90", "The answer is 90°.", True),
        (r"\sqrt{3}", "The answer is $√3$.", True),
        ("5", "<think>5</think> I do not know", False),
    ],
)
def test_texts(reference, text, right):
    grade = grade_math(reference, text)
    assert grade.correct is right, grade


@pytest.mark.parametrize(
    "box", ["", r"\text{}", "?", r"\ldots", r"\frac{1}{0}", r"\text{nan}", r"\infty", "{", "}{", "_8"]
)
def test_what_says_nothing_is_wrong(box):
    grade = grade_math("5", f"It is 5. \\boxed{{{box}}}")
    assert grade.gradable
    assert grade.score == 0.0


@pytest.mark.skipif(not DATA.is_dir(), reason="no data for evaluation on this machine")
def test_references_equal_themselves():
    references = [json.loads(line)["answer"] for line in (DATA / "math500.jsonl").read_text().splitlines()]
    assert len(references) == 500
    assert [ref for ref in references if not grade_math(ref, f"Thus \\boxed{{{ref}}}.").correct] == []
    assert [ref for ref in references if grade_math(ref, r"Thus \boxed{31415}.").correct] == []


def test_a_grade_says_that_time_ran_out(monkeypatch):
    assert LIMIT == 10
    ask, endless = JUDGE.ask, r"2^{10^9} + 3^{10^9}"
    monkeypatch.setattr(JUDGE, "ask", lambda reference, text: ask(reference, text, 0.3))
    grade = grade_math("5", f"\\boxed{{{endless}}}")
    assert (grade.extracted, grade.score, grade.gradable) == (None, 0.0, True)
    assert grade.fault == "the answer was not judged in 10 seconds or the memory there is"
    grade = grade_math(endless, r"\boxed{5}")
    assert (grade.gradable, grade.fault) == (False, "the reference was not judged in 10 seconds or the memory there is")
    assert grade_math("5", r"\boxed{5}").fault is None


def test_graders_of_other_versions_grade_anew():
    assert grader_version("math").startswith("reasonalloc 3, math-verify ")
    assert grader_version("maps") == "reasonalloc 3"
