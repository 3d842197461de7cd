"""Files behind URLs: the one door to fsspec."""

# fsspec has no type stubs:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import re
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec

from burnish.core.errors import BurnishError, DependencyError, SourceError, Where

GLOB = re.compile(r"[*?\[]")


def is_url(path: str) -> bool:
    """Whether a path goes through fsspec (`s3://...`) instead of the local disk."""
    return "://" in path


def shown_name(path: str) -> str:
    """A path as messages and reports may show it: without the user, password and signature that a URL may carry."""
    if not is_url(path):
        return path
    parts = urlsplit(path)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def open_url(url: str) -> BinaryIO:
    """The bytes at a URL.

    Raises:
        SourceError, DependencyError: when they cannot be had.
    """
    try:
        system, inner = cast("tuple[Any, str]", fsspec.url_to_fs(url))
        return system.open(inner, "rb")
    except Exception as error:  # every fsspec backend raises exceptions of its own
        raise remote_fault(error, url) from None


def list_url(url: str) -> list[str]:
    """The files below a URL that is a folder, or that match it as a pattern.

    Raises:
        SourceError, DependencyError: when they cannot be listed.
    """
    try:
        system, inner = cast("tuple[Any, str]", fsspec.url_to_fs(url))
        names = system.glob(inner) if GLOB.search(inner) else system.find(inner)
        return sorted(str(system.unstrip_protocol(name)) for name in names)
    except Exception as error:  # as above
        raise remote_fault(error, url) from None


def remote_fault(error: Exception, url: str) -> BurnishError:
    """What a failed access to a URL means to the user."""
    where = Where(shown_name(url))
    if isinstance(error, ImportError):
        return DependencyError(
            f"this address needs a package that is not installed ({error})",
            where=where,
            hint="pip install 'burnish[cloud]' brings s3:// and gs://.",
        )
    if isinstance(error, FileNotFoundError):
        return SourceError("there is no such file or folder", where=where)
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return SourceError(f"addresses of this kind are unknown: {error}", where=where)
    # Backends put the whole address, with its secrets, into their messages
    reason = str(error).replace(url, shown_name(url))
    return SourceError(f"cannot be read: {type(error).__name__}: {reason}".rstrip(": "), where=where)
