"""The page at the end of a run."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from burnish.engine.loop import Job, train
from burnish.engine.report import write_report

ACCOUNT = {
    "rows": {
        "read": 100,
        "kept": 80,
        "eval": 10,
        "duplicate": 0,
        "empty": 1,
        "malformed": 2,
        "overlong": 3,
        "dropped": 0,
        "fully_masked": 7,
    },
    "tokens": {"total": 900, "trained": 600, "masked": 300, "eval": 90, "truncated": 10, "dropped": 0, "fully_masked": 0, "duplicate": 0},
    "lengths": {"min": 1, "mean": 9.0, "median": 9.0, "p95": 12.0, "max": 16, "histogram": [[1, 8, 30], [9, 16, 50]]},
    "malformed": [{"file": "<script>alert(1)</script>.json", "row": 3, "reason": "no answer"}],
    "eval_rows_also_in_train": 4,
}


class Page(HTMLParser):
    """Collects what matters: text, tags and where things are fetched from."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.links = "", [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(make_job: Callable[..., Job]) -> Page:
    job = make_job(steps=6, evaluation={"every": "2st"})
    train(job)
    (job.folder / "data.json").write_text(json.dumps(ACCOUNT))
    (job.folder / "run.yaml").write_text("model: <img src=x onerror=alert(1)>\n")
    found = write_report(job.folder)
    assert found == job.folder / "report.html"
    assert sorted(path.name for path in (job.folder / "curves").iterdir()) == [
        *("grad_norm.png", "learning_rate.png", "loss.png", "tokens_per_second.png")
    ]
    return Page(found.read_text())


def test_the_page_stands_alone(page: Page):
    assert "script" not in page.tags and "link" not in page.tags
    assert len(page.links) == 4
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)


def test_texts_of_the_user_are_shown_not_run(page: Page):
    assert page.tags.count("img") == 4
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "<script>alert(1)</script>.json, row 3: no answer" in page.text


def test_it_tells_how_it_went_and_on_what(page: Page):
    for text in ("Training loss", "Held-out loss", "best at step", "6 steps", "80.0%", "3 rows are longer", "also trained on", "torch"):
        assert text in page.text, text


def test_a_folder_with_metrics_alone(make_job: Callable[..., Job]):
    job = make_job(steps=2, held_out=False)
    train(job)
    assert "What it was trained on" not in Page(write_report(job.folder).read_text()).text


def test_an_empty_folder(tmp_path: Path):
    assert "nothing was trained" in Page(write_report(tmp_path).read_text()).text
