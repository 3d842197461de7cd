"""The Hugging Face hub, as far as messages about it go: whether it can be asked at all, and what its refusals mean.

Its own libraries try again for minutes where there is no network, even for what they have on disk. So whoever needs the hub asks `silence`
first: a machine without a way to it is put into the libraries' offline mode, in which they take what was downloaded before, at once.
"""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from functools import cache
from typing import Final
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from burnish.core.log import warn

_OFFLINE: Final = "the hub's offline mode is on"
_PATIENCE = 5.0
"""Seconds to wait for a connection."""


@cache
def silence() -> str | None:
    """Why the hub will not answer in this process, or None where it should. Asked once."""
    if constants.HF_HUB_OFFLINE:
        return _OFFLINE
    address = urlsplit(constants.ENDPOINT)
    host = address.hostname or ""
    if _proxied(address.scheme, host) or _answers(host, address.port or {"http": 80}.get(address.scheme, 443)):
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"  # for worker processes, and for libraries that are still to be imported
    for module in (constants, sys.modules.get("datasets.config")):
        if module is not None:
            setattr(module, "HF_HUB_OFFLINE", True)  # noqa: B010  # a constant, for the type checker
    return f"'{host}' cannot be reached"


@cache
def note_silence() -> None:
    """Says, once, that the disk answers in the hub's place. A user who asked for the offline mode knows it."""
    reason = silence()
    if reason not in (None, _OFFLINE):
        warn(f"{reason}: what was downloaded before is used as it is")


def refusal(error: BaseException, name: str, kind: str) -> tuple[str, str] | None:
    """What the hub refused, and what to do about it; None where the error is about something else.

    Args:
        error: What a library raised, perhaps because of what the hub's own library raised.
        name: The repository.
        kind: `model` or `data set`.
    """
    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            place = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{name}"
            return f"the {kind} '{name}' is gated: its owners decide who may download it", f"Ask at {place}, then run 'hf auth login'."
        if isinstance(cause, RepositoryNotFoundError):
            hint = f"Check the name; for a private {kind} run 'hf auth login'."
            return f"there is neither a folder '{name}' here nor a {kind} of that name on the hub", hint
        if isinstance(cause, RevisionNotFoundError):
            return f"the {kind} '{name}' has no such revision on the hub", "Name a branch, a tag or a commit; left out, it is 'main'."
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, however deep."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _proxied(scheme: str, host: str) -> bool:
    """Whether a proxy stands between: then only a real request would tell."""
    proxies = urllib.request.getproxies()
    return not proxies.keys().isdisjoint((scheme, "all")) and not urllib.request.proxy_bypass(host)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True
