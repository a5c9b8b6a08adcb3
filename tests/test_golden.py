"""What the cache keeps is what was recorded; ``python tests/golden/record.py`` records it anew."""

from functools import cache

import pytest
from golden.scenarios import FILES, Variant
from golden.store import FOLDER, difference, load, outcome

recorded = cache(load)
CASES = [(file, scenario) for file, scenarios in FILES.items() for scenario in scenarios]


@pytest.mark.parametrize(("file", "scenario"), CASES, ids=[scenario.name for _, scenario in CASES])
def test_kept_positions_are_the_recorded_ones(file, scenario):
    expected = recorded(FOLDER / f"{file}.npz")[scenario.name]
    text = difference(expected, outcome(scenario.play(Variant())))
    if text is not None:
        pytest.fail(f"{scenario.name}: {text}", pytrace=False)


@pytest.mark.parametrize("file", FILES)
def test_the_file_holds_these_scenarios_and_no_others(file):
    assert list(recorded(FOLDER / f"{file}.npz")) == [scenario.name for scenario in FILES[file]]
