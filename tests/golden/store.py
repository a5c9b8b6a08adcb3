"""Outcomes of scenarios as one file of plain arrays, and what differs between two outcomes."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from golden.rounds import Round

FOLDER = Path(__file__).parent
Outcome = dict[tuple[int, int, int, int], np.ndarray]  # (forward passes, layer, row, head) -> positions


def outcome(rounds: Iterable[Round]) -> Outcome:
    """A scenario's rounds, head by head. Raises ``ValueError`` where a round has a row twice."""
    found: Outcome = {}
    for moment in rounds:
        for layer, rows in enumerate(moment.kept):
            for row, heads in zip(moment.rows, rows, strict=True):
                for head, positions in enumerate(heads):
                    key = (moment.step, layer, row, head)
                    if key in found:
                        raise ValueError(f"step, layer, row and head {key} come twice")
                    found[key] = positions.astype(np.uint16)
    return found


def save(path: Path, outcomes: dict[str, Outcome]) -> None:
    """``names``; ``heads``: one line of scenario, step, layer, row, head and count; ``positions``: differences."""
    heads = [(i, *key, len(positions)) for i, found in enumerate(outcomes.values()) for key, positions in found.items()]
    flat = np.concatenate([positions for found in outcomes.values() for positions in found.values()])
    np.savez_compressed(
        path,
        names=np.array(list(outcomes)),
        heads=np.diff(np.array(heads, dtype=np.int32), axis=0, prepend=0),
        positions=np.diff(flat, prepend=np.uint16(0)),  # modulo 2^16: small numbers that compress well
    )


def load(path: Path) -> dict[str, Outcome]:
    """What ``save`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        names, heads = file["names"].tolist(), file["heads"].cumsum(0, dtype=np.int32)
        positions = file["positions"].cumsum(dtype=np.uint16)
    outcomes: dict[str, Outcome] = {name: {} for name in names}
    ends = heads[:, -1].cumsum()
    for (scenario, *key, count), end in zip(heads.tolist(), ends.tolist(), strict=True):
        outcomes[names[scenario]][tuple(key)] = positions[end - count : end]
    return outcomes


def difference(expected: Outcome, got: Outcome) -> str | None:
    """The first difference, in words; None if there is none."""
    steps, found = (list(dict.fromkeys(key[0] for key in x)) for x in (expected, got))
    for number, step in enumerate(steps):
        if step not in found[number : number + 1]:
            instead = found[number] if number < len(found) else "never"
            return f"round {number} was after forward pass {step}, and now is after {instead}"
        wanted = {key: positions for key, positions in expected.items() if key[0] == step}
        present = {key for key in got if key[0] == step}
        if present != set(wanted):
            return f"round {number} (forward pass {step}) has other layers, rows or heads: {present ^ set(wanted)}"
        for key, positions in wanted.items():
            if not np.array_equal(positions, got[key]):
                place = "layer {}, row {}, head {}".format(*key[1:])
                return f"round {number} (forward pass {step}), {place}: {_first(positions, got[key])}"
    if len(found) > len(steps):
        return f"there is a round more, after forward pass {found[len(steps)]}"
    return None


def _first(expected: np.ndarray, got: np.ndarray) -> str:
    both = min(len(expected), len(got))
    unequal = np.flatnonzero(expected[:both] != got[:both])
    at = int(unequal[0]) if len(unequal) else both
    return (
        f"{len(expected)} positions before and {len(got)} now; from place {at} on "
        f"{expected[at : at + 8].tolist()} before and {got[at : at + 8].tolist()} now"
    )
