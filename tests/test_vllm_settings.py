"""What REASONALLOC may say to the vLLM plugin; vLLM itself is not needed for that."""

import pytest

from reasonalloc.engines.vllm.settings import settings


def test_nothing_set_changes_nothing(monkeypatch):
    monkeypatch.delenv("REASONALLOC", raising=False)
    assert settings() is None


def test_fields_of_a_compression(monkeypatch):
    monkeypatch.setenv("REASONALLOC", '{"method": "rkv", "budget": 64, "interval": 32, "routing": "global"}')
    found = settings()
    assert found.routing == "global"
    assert (found.compression.budget, found.compression.interval) == (64, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget=64", "must be JSON"),
        ("[64]", "must be a JSON object"),
        ('{"method": "rvk", "budget": 64}', "rkv"),
        ('{"method": "rkv"}', "needs a budget"),
        ('{"method": "rkv", "budget": 64, "windows": 3}', "windows"),
        ('{"method": "full"}', "leave it unset"),
        ('{"budget": 64}', "reasonalloc-head"),
        ('{"method": "rkv", "budget": 64, "prompt": "protect"}', "has no bound"),
        ('{"method": "rkv", "budget": 64, "profile": "auto"}', "reasonalloc calibrate"),
        ('{"method": "rkv", "budget": 64, "routing": "local"}', "'local'"),
    ],
)
def test_what_is_wrong_is_said(monkeypatch, text, message):
    monkeypatch.setenv("REASONALLOC", text)
    with pytest.raises(ValueError, match=message):
        settings()
