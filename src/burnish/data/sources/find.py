"""From a path in the run file to the files behind it: one file, a folder, a glob, a URL; sorted into splits.

Only names on the disk are followed. The manifests that data sets carry (`dataset_info.json`, `state.json` ...) are never read as lists of
files, so none of them can point out of its folder.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from burnish.core.errors import SourceError, Where, nearest
from burnish.data.sources.file import KINDS, File, suffixes
from burnish.data.sources.remote import GLOB, is_url, list_url, path_of, shown_name
from burnish.data.sources.splits import split_of

_MANIFESTS = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "readme.md", "license.md", "license.txt"}
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


@dataclass(frozen=True, slots=True)
class Found:
    """The files of each split, and those that belong to none of them."""

    splits: dict[str, tuple[File, ...]]
    left_out: tuple[str, ...] = ()
    one_file: bool = False


def find(path: str, *, split_given: bool = False) -> Found | None:
    """The files at a path, or None where the path is no local one and reads like the id of a hub data set.

    A file is the split that its name announces, else `train`. In a folder, `train`, `val`, `test` and their spellings sort files into
    splits, as names of files or of folders; where no name says anything, all of them are `train`. A glob means all files that it
    matches, unless a split is asked for.

    Raises:
        SourceError: when nothing is there, with the nearest name; when a split mixes kinds of files.
    """
    if is_url(path):
        return _at_url(path, split_given)
    local = os.path.expanduser(path)
    if os.path.isfile(local):
        return Found({split_of(os.path.basename(local)) or "train": (File.at(local),)}, one_file=True)
    if os.path.isdir(local):
        names = _walk(local)
        if os.path.isfile(os.path.join(local, "config.json")) and glob.glob(os.path.join(glob.escape(local), "*.safetensors")):
            raise SourceError("this is the folder of a model, expected data", where=Where(path))
        if not names:
            raise SourceError(f"the folder holds no data file ({', '.join(KINDS)})", where=Where(path))
        return _sorted_into_splits(local, names, split_given=True)
    if GLOB.search(local):
        names = sorted(name for name in glob.glob(local, recursive=True) if os.path.isfile(name) and _is_data(name))
        if not names:
            raise SourceError("no data file matches this pattern", where=Where(path))
        return _sorted_into_splits(os.path.dirname(GLOB.split(local)[0]), names, split_given)
    if _HUB_ID.match(path) and not _meant_as_local(path):
        return None
    raise missing(path)


def missing(path: str) -> SourceError:
    """The error for a path where nothing is, with the nearest name in its folder."""
    folder = Path(path).expanduser().parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    lost = Path(path).expanduser().relative_to(folder).parts[0]
    near = nearest(lost, os.listdir(folder)) if os.access(folder, os.R_OK) else None
    suggestion = f"; did you mean '{folder / near}'?" if near else f" (looked in '{folder.absolute()}')"
    return SourceError(f"there is no such file or folder{suggestion}", where=Where(path))


def _meant_as_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a file: its suffix is a data suffix or nearly one, or its folder exists."""
    return nearest(suffixes(path)[0] or "-", KINDS) is not None or ("/" in path and Path(path).parent.is_dir())


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    return suffixes(name)[0] in KINDS and path.name.lower() not in _MANIFESTS and not path.name.startswith(".")


def _walk(folder: str) -> list[str]:
    names: list[str] = []
    for root, folders, files in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names += [os.path.join(root, name) for name in sorted(files) if _is_data(name)]
    return names


def _at_url(path: str, split_given: bool) -> Found:
    where = Where(shown_name(path))
    if suffixes(path)[0] in KINDS and not GLOB.search(path_of(path)):
        return Found({split_of(PurePosixPath(shown_name(path)).name) or "train": (File.at(path),)}, one_file=True)
    globbed = bool(GLOB.search(path_of(path)))
    names = list_url(path)
    data = [name for name in names if _is_data(name)]
    if not data:
        raise SourceError(f"there is no data file here ({', '.join(KINDS)})", where=where)
    root = GLOB.split(path)[0] if globbed else path
    return _sorted_into_splits(root, data, split_given or not globbed)


def _sorted_into_splits(root: str, names: Iterable[str], split_given: bool) -> Found:
    """Sorts files by the split that their name, below `root`, announces."""
    marked: dict[str, list[str]] = {}
    unmarked: list[str] = []
    for name in names:
        parts = PurePosixPath(name[len(root) :] if name.startswith(root) else name).parts
        split = next((found for part in parts if (found := split_of(part))), None)
        (marked.setdefault(split, []) if split else unmarked).append(name)
    if not split_given or not marked:
        return Found({"train": _one_kind([*(n for group in marked.values() for n in group), *unmarked], root)})
    if "train" not in marked and unmarked:
        marked["train"], unmarked = unmarked, []
    return Found({split: _one_kind(group, root) for split, group in marked.items()}, tuple(map(shown_name, unmarked)))


def _one_kind(names: list[str], root: str) -> tuple[File, ...]:
    files = tuple(File.at(name) for name in sorted(names))
    first: dict[str, str] = {}
    for file in files:
        first.setdefault(file.kind, os.path.basename(file.shown))
    if len(first) > 1:
        raise SourceError(
            f"files of several kinds stand side by side ({', '.join(first.values())}), perhaps the same rows twice",
            where=Where(shown_name(root)),
            hint="Name the ones that you mean, by a pattern like 'data/*.jsonl' or one by one.",
        )
    return files
