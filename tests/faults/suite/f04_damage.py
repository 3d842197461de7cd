"""F4 and F5: checkpoints that were whole once. F18: checkpoints that lack a part."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.suite.project import Project, resumed_from
from tests.faults.suite.tries import Lab, Survived, Try

FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors", "trainer.json", "manifest.json")
NEWEST, BEFORE = 9, 8

Spoil = Callable[[Path], object]


def tries(seed: int = 0, *, short: bool = False) -> Iterator[Try]:
    """A bit flipped in every file at several places; every file torn, empty, missing; folders that are none."""
    draw = random.Random(seed)
    for name in draw.sample(FILES, 3) if short else FILES:
        places = [draw.random() for _ in range(1 if short else 4)]
        for place in places:
            bit = draw.randrange(8)
            yield Try(
                "F4", f"a bit flipped in {name} at {place:.0%}", lambda lab, n=name, p=place, b=bit: spoiled(lab, _named(n), flip(n, p, b))
            )
    yield Try("F4", "bits of every byte of manifest.json, one at a time", every_bit)
    yield Try("F4", "the step in manifest.json changed", lambda lab: spoiled(lab, "", _other_step))
    yield Try("F4", "a bit flipped in the best checkpoint, which is exported at the end", best)
    kinds: dict[str, Callable[[Path], object]] = {
        "torn": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3]),
        "empty": lambda file: file.write_bytes(b""),
        "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
        "missing": lambda file: file.unlink(),
        "a folder": _folder,
    }
    for name in draw.sample(FILES, 3) if short else FILES:
        for kind, spoil in [draw.choice(list(kinds.items()))] if short else kinds.items():
            yield Try("F5", f"{name} is {kind}", lambda lab, n=name, s=spoil: spoiled(lab, _named(n), lambda folder: s(folder / n)))
    for kind, change in (
        ("of the checkpoint before", _manifest_before),
        ("without an entry", _shorter_manifest),
        ("of another format", _other_format),
    ):
        yield Try("F5", f"a manifest {kind}", lambda lab, c=change: spoiled(lab, "", c))
    yield Try("F5", "an empty folder in its place", lambda lab: spoiled(lab, "", _emptied))
    for kind, change in (
        ("file", _extra),
        ("file under the name of a checkpoint", _file_as_folder),
        ("half-written checkpoint", _unfinished),
    ):
        yield Try("F5", f"an extra {kind}", lambda lab, c=change: harmless(lab, c))
    yield Try("F5", "every checkpoint is damaged", all_of_them)
    yield Try("F18", "no optimiser state in the newest checkpoint", lambda lab: spoiled(lab, "optimizer", _without_optimizer))
    yield Try("F18", "no optimiser state in any checkpoint", no_optimizer)


def flip(name: str, place: float, bit: int) -> Spoil:
    """Changes one bit of a file, at a share of its length."""

    def change(folder: Path) -> None:
        file = folder / name
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        file.write_bytes(content)

    return change


def every_bit(lab: Lab) -> Survived:
    """None of them goes unnoticed, and none is anything else than an error of the checkpoint."""
    from burnish.core.errors import CheckpointError
    from burnish.engine.checkpoint import verify

    newest = lab.half("lora").checkpoints[-1]
    file = newest / "manifest.json"
    content = file.read_bytes()
    verify(newest)
    for place in range(len(content)):
        for bit in (0, 3, 5):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                verify(newest)
            except CheckpointError:
                continue
            except Exception as error:
                raise AssertionError(f"bit {bit} of byte {place} ({content[max(0, place - 9) : place + 9]!r}): {error!r}") from None
            raise AssertionError(f"bit {bit} of byte {place} ({content[max(0, place - 9) : place + 9]!r}) is not noticed")
    return Survived(count=3 * len(content))


def _named(file: str) -> str:
    """The file that a message must name; what is wrong with a manifest shows as something else, too."""
    return "" if file == "manifest.json" else file


def spoiled(lab: Lab, named: str, spoil: Spoil) -> Survived:
    """Found before a weight is used: the file is named, the checkpoint before is taken, the result is as ever."""
    reference = lab.reference("lora")
    project = lab.half("lora")
    newest, before = project.checkpoints[-1], project.checkpoints[-2]
    assert (newest.name, before.name) == (f"step-{NEWEST:06d}", f"step-{BEFORE:06d}"), project.checkpoints
    spoil(newest)
    ended = project.train().expect(0)
    ended.expect_said("warning", newest.name, *([named] if named else []))
    assert resumed_from(ended.said) == BEFORE, f"it went on from {resumed_from(ended.said)}, expected {BEFORE}: {ended.said[-1200:]}"
    project.finished().assert_equal(reference)
    project.assert_tidy()
    return Survived(lost=NEWEST - BEFORE, equal=True)


def harmless(lab: Lab, change: Spoil) -> Survived:
    """What is no part of a checkpoint does not disturb it."""
    reference = lab.reference("lora")
    project = lab.half("lora")
    change(project.checkpoints[-1])
    ended = project.train().expect(0)
    assert resumed_from(ended.said) in (NEWEST, BEFORE), ended.said[-1200:]
    project.finished().assert_equal(reference)
    return Survived(lost=NEWEST - (resumed_from(ended.said) or 0), equal=True)


def all_of_them(lab: Lab) -> Survived:
    """Refused, with every file named; nothing is overwritten."""
    project = lab.half("lora")
    for number, folder in enumerate(project.checkpoints):
        flip(FILES[number], 0.7, 3)(folder)
    return _refused(project, "whole", *(FILES[number] for number in range(len(project.checkpoints))))


def no_optimizer(lab: Lab) -> Survived:
    """Refused, and the message says what is missing."""
    project = lab.half("lora")
    for folder in project.checkpoints:
        _without_optimizer(folder)
    return _refused(project, "optimizer")


def best(lab: Lab) -> Survived:
    """The run is done but for its export: it says what is damaged, and there is a model all the same: that of the last step."""
    project = lab.half("dpo-full", fault={"at": "export"})
    last, chosen = project.checkpoints[-1], project.checkpoints[0]
    assert int(chosen.name[5:]) < 12, f"the best checkpoint is not an old one: {project.checkpoints}"
    flip("model.safetensors", 0.6, 2)(chosen)
    project.train().expect(0).expect_said("warning", chosen.name, "model.safetensors")
    found = project.finished().weights
    exported = {key.split(":")[1]: value for key, value in found.items() if key.startswith("model/")}
    trained = {key.split(":")[1]: value for key, value in found.items() if key.startswith(f"{last.name}/model.safetensors")}
    assert exported and all(trained.get(name) == value for name, value in exported.items() if name in trained)
    return Survived()


_OF_THE_COMMAND = ("run.yaml", ".owner")
"""What every start writes: the settings it was given, and whose folder it is."""


def _refused(project: Project, *words: str) -> Survived:
    picture = project.picture(*_OF_THE_COMMAND)
    project.train().expect(2).expect_said(*words)
    assert project.picture(*_OF_THE_COMMAND) == picture, "the refused run changed the run folder"
    return Survived()


def _edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def _other_step(folder: Path) -> None:
    _edit(folder, lambda manifest: manifest.update(step=NEWEST - 2))


def _other_format(folder: Path) -> None:
    _edit(folder, lambda manifest: manifest.update(format=99))


def _shorter_manifest(folder: Path) -> None:
    _edit(folder, lambda manifest: manifest["files"].pop("rng.safetensors"))  # type: ignore[attr-defined]


def _without_optimizer(folder: Path) -> None:
    for name in ("optimizer.safetensors", "optimizer.json"):
        (folder / name).unlink()


def _manifest_before(folder: Path) -> None:
    shutil.copy(folder.with_name(f"step-{BEFORE:06d}") / "manifest.json", folder / "manifest.json")


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _extra(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")


def _file_as_folder(folder: Path) -> None:
    folder.with_name("step-000013").write_text("no folder")


def _unfinished(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name(".unfinished-step-000010"))
