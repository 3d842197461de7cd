"""The hub as messages see it. The libraries themselves are in tests/unit/models/test_hub.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from burnish.core import hub as module


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which nobody has asked for the hub yet, and which may."""
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(module.urllib.request, "getproxies", dict)
    module.silence.cache_clear()
    module.note_silence.cache_clear()
    yield
    module.silence.cache_clear()
    module.note_silence.cache_clear()


def test_a_hub_that_answers_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(module.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert module.silence() is None
    assert module.silence() is None
    assert not module.constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_is_left_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    monkeypatch.setattr(module.constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    assert module.silence() == "'127.0.0.1' cannot be reached"
    assert module.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    module.note_silence()
    module.note_silence()
    assert capsys.readouterr().err == "warning: '127.0.0.1' cannot be reached: what was downloaded before is used as it is\n"


def test_the_offline_mode_that_the_user_chose_is_not_remarked_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", True)
    assert module.silence() == "the hub's offline mode is on"
    module.note_silence()
    assert capsys.readouterr().err == ""


def test_behind_a_proxy_the_hub_is_taken_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(module.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128", "no": "localhost"})
    monkeypatch.setattr(module.urllib.request, "proxy_bypass", lambda host: host == "localhost")
    assert module.silence() is None
    module.silence.cache_clear()
    monkeypatch.setattr(module.constants, "ENDPOINT", "https://localhost:1")
    assert module.silence() == "'localhost' cannot be reached"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RepositoryNotFoundError, "neither a folder 'a/b' here nor a model"),
        (GatedRepoError, "is gated"),
        (RevisionNotFoundError, "has no such revision"),
    ],
)
def test_refusals_are_found_behind_what_libraries_make_of_them(kind: type[Exception], words: str) -> None:
    response = SimpleNamespace(headers={}, request=None)
    try:
        try:
            raise kind("no", response=response)
        except kind as cause:
            raise OSError("cannot load") from cause
    except OSError as error:
        refused = module.refusal(error, "a/b", "model")
    assert refused is not None and words in refused[0]
    assert module.refusal(OSError("disk full"), "a/b", "model") is None
