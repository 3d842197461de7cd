"""Models and data sets that come over the network: the real command, the real libraries, and a hub on this machine that they talk to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?P<rest>/.*)?")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
REVISION = re.compile(r"/(?:revision|tree|paths-info)/(?P<revision>[^/]+)")


@dataclass
class Hub:
    """What it holds (`models/owner/name` and `datasets/owner/name` -> folder), and what it was asked for."""

    folder: Path
    url: str = ""
    commit: str = COMMIT
    asked: list[str] = field(default_factory=list)

    def files(self, kind: str | None, name: str) -> dict[str, Path]:
        home = self.folder / (kind or "models") / name
        return {str(file.relative_to(home)): file for file in sorted(home.rglob("*")) if file.is_file()}


class Handler(BaseHTTPRequestHandler):
    """Answers what huggingface_hub and datasets ask of a hub."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def answer(self, body: bytes = b"") -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        found = FILE.fullmatch(path) or API.fullmatch(path)
        assert found is not None, path
        files = self.hub.files(found["kind"] and found["kind"].strip("/"), found["name"])
        revision = REVISION.match(path, found.end("name")) if found.re is API else found
        if found["name"].startswith("locked/"):
            return self.refuse(403, "GatedRepo")
        if not files:
            return self.refuse(401, "RepoNotFound")  # the hub tells nobody what is private and what is not there
        if revision and revision["revision"] not in ("main", self.hub.commit):
            return self.refuse(404, "RevisionNotFound")
        if found.re is API:
            return self.send(json.dumps(self.about(found["name"], found["rest"] or "", files, body)).encode())
        if found["file"] not in files:
            return self.refuse(404, "EntryNotFound")
        return self.send(files[found["file"]].read_bytes())

    def about(self, name: str, rest: str, files: dict[str, Path], body: bytes) -> Any:
        if not rest.startswith(("/tree/", "/paths-info/")):
            return {"id": name, "sha": self.hub.commit, "private": False, "tags": [], "siblings": [{"rfilename": file} for file in files]}
        wanted = re.findall(rb"[\w./-]+", body.replace(b"%2F", b"/")) if rest.startswith("/paths-info/") else None
        return [
            {"type": "file", "path": path, "oid": etag(file.read_bytes()), "size": file.stat().st_size}
            for path, file in files.items()
            if wanted is None or path.encode() in wanted
        ]

    def send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{etag(content)}"')
        self.finish_with(content)

    def refuse(self, status: int, why: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", why)
        self.finish_with(b"")

    def finish_with(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty hub on a port of its own."""
    hub = Hub(tmp_path / "hub")

    with ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def python(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder of its own, with `hub` as the hub: its libraries read the environment when they are imported."""
    hidden = ("HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    environment = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run([sys.executable, *arguments], cwd=home, env=environment, capture_output=True, text=True, check=False)


def burnish(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(hub, home, "-m", "burnish", *arguments)


def run_file(hub: Hub, tiny_model: Path, home: Path) -> None:
    """A run whose model and data set are on the hub."""
    shutil.copytree(tiny_model, hub.folder / "models/someone/tiny")
    rows = hub.folder / "datasets/someone/rows"
    rows.mkdir(parents=True)
    pairs = [{"prompt": f"the user asks {n} ", "completion": f"the assistant answers {n}"} for n in range(8)]
    (rows / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (home / "run.yaml").write_text(
        "model: someone/tiny\nadapter: {kind: lora, rank: 4}\ndata: {train: someone/rows, max_length: 64, cache: ./cache, workers: 1}\n"
        "train: {steps: 2, batch_size: 4, precision: float32}\noutput: runs/one\n"
    )


def test_a_model_and_a_data_set_are_downloaded_once_and_then_need_no_hub(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    run_file(hub, tiny_model, tmp_path)
    done = burnish(hub, tmp_path, "train", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert f"GET /someone/tiny/resolve/{COMMIT}/model.safetensors" in hub.asked
    assert f"GET /datasets/someone/rows/resolve/{COMMIT}/train.jsonl" in hub.asked
    assert "step 2/2" in done.stderr and "Loading weights" not in done.stderr

    hub.asked.clear()
    hub.url = "http://127.0.0.1:9"  # nobody listens there
    again = burnish(hub, tmp_path, "train", "run.yaml", "output=runs/two")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("warning: '127.0.0.1' cannot be reached: what was downloaded before is used as it is") == 1
    assert "Retrying in" not in again.stderr and "latest cached" not in again.stderr
    metrics = [(tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    first, second = ([json.loads(line)["loss"] for line in lines] for lines in metrics)
    assert first == second


def test_a_run_knows_the_commit_that_its_base_model_is_of(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    run_file(hub, tiny_model, tmp_path)
    first = burnish(hub, tmp_path, "train", "run.yaml")
    assert first.returncode == 0, first.stderr
    longer = burnish(hub, tmp_path, "train", "run.yaml", "train.steps=3")  # the first run began with nothing downloaded
    assert longer.returncode == 0 and "step 3/3" in longer.stderr, longer.stderr
    url, hub.url = hub.url, "http://127.0.0.1:9"  # nobody listens there
    without = burnish(hub, tmp_path, "train", "run.yaml", "train.steps=3")
    assert without.returncode == 0 and "already finished after 3 steps" in without.stderr, without.stderr

    hub.url, hub.commit = url, "89abcdef" * 5
    weights = hub.folder / "models/someone/tiny/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    before = {file: file.read_bytes() for file in (tmp_path / "runs/one").rglob("*") if file.is_file()}
    other = burnish(hub, tmp_path, "train", "run.yaml", "train.steps=4")
    assert other.returncode == 2 and "the weights of the base model have changed" in other.stderr, other.stderr
    assert {file: file.read_bytes() for file in (tmp_path / "runs/one").rglob("*") if file.is_file()} == before
    forced = burnish(hub, tmp_path, "train", "run.yaml", "train.steps=4", "resume=force")
    assert forced.returncode == 0 and "step 4/4" in forced.stderr, forced.stderr


REFUSALS = """
import json
from burnish.config.sections import Model
from burnish.core.errors import BurnishError
from burnish.data.sources.hub import hub_splits
from burnish.models.load import load_model
from burnish.models.tokenizer import load_tokenizer
import torch

def outcome(call):
    try:
        return repr(call())
    except BurnishError as error:
        return f"{error} | {error.hint}"

def model(name, revision=None):
    settings = Model(path=name, revision=revision)
    said = {outcome(lambda: load_tokenizer(settings)), outcome(lambda: load_model(settings, compute_dtype=torch.float32))}
    return " AND ".join(sorted(said))

print(json.dumps([
    model("someone/tinny"), model("locked/model"), model("someone/tiny", "v2"),
    outcome(lambda: hub_splits("someone/rovs", None, None, streaming=False)),
    outcome(lambda: hub_splits("locked/rows", None, None, streaming=False)),
    outcome(lambda: hub_splits("someone/rows", None, "v2", streaming=False)),
]))
"""


def test_what_the_hub_refuses_is_said_in_our_words(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    run_file(hub, tiny_model, tmp_path)
    done = python(hub, tmp_path, "-c", REFUSALS)
    assert done.returncode == 0, done.stderr
    missing, locked, revision, missing_rows, locked_rows, rows_revision = json.loads(done.stdout)
    assert missing == (
        "there is neither a folder 'someone/tinny' here nor a model of that name on the hub | "
        "Check the name; for a private model run 'hf auth login'."
    )
    assert locked == (
        "the model 'locked/model' is gated: its owners decide who may download it | "
        f"Ask at {hub.url}/locked/model, then run 'hf auth login'."
    )
    assert revision.startswith("the model 'someone/tiny' has no such revision on the hub | ")
    assert "someone/rovs: is neither a file here nor a data set that the hub hands out" in missing_rows
    assert "is a gated dataset on the Hub" in locked_rows and "hf auth login" in locked_rows
    assert rows_revision.startswith("the data set 'someone/rows' has no such revision on the hub | ")
