"""Every type of transformers is served rightly or refused: no third thing."""

import re

import pytest
from model_sweep import DOCUMENT, TYPES, outcome


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_equals_stock_or_is_refused(model_type):
    found = outcome(model_type)
    assert found.kind != "wrong", found.why
    if found.kind == "not tried":
        pytest.skip(found.why)


def test_the_document_holds_no_wrong_type():
    rows = re.findall(r"^\| (\S+) \| (equal|refused|not tried|wrong) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) > 200
    assert [name for name, kind in rows if kind == "wrong"] == []
