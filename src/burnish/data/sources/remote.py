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


def path_of(path: str) -> str:
    """The part of a URL that names folders and files (for other paths the whole): no scheme, no query."""
    if not is_url(path):
        return path
    parts = urlsplit(path)
    return parts.netloc + parts.path


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
        if _says_not_found(error.__cause__):
            return SourceError("there is no such file or folder", where=where)
        error = cast(Exception, error.__cause__)  # over http whatever fails is reported as a file that is not there
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return SourceError(f"addresses of this kind are unknown: {error}", where=where)
    return SourceError(f"cannot be read: {type(error).__name__}: {_without_secrets(str(error), url)}".rstrip(": "), where=where)


def _says_not_found(cause: BaseException | None) -> bool:
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404


def _without_secrets(message: str, url: str) -> str:
    """Backends put the whole address into their messages."""
    parts = urlsplit(url)
    for secret in (parts.query, parts.netloc.rpartition("@")[0]):
        message = message.replace(secret, "...") if secret else message
    return message
