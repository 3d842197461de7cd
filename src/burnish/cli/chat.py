"""`burnish chat`: talk to a model, before or after training.

Answers go to stdout and nothing else does, unless `--compare` labels them; prompts, notices and errors go to stderr. So
`burnish chat runs/quickstart -p "Who are you?"` can stand in a script.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import typer

from burnish.cli.screen import Screen
from burnish.config.load import load_run
from burnish.core.errors import BurnishError, ConfigError, ModelError, did_you_mean, nearest
from burnish.core.log import console, info, print_error
from burnish.data.render import Renderer
from burnish.data.types import Message
from burnish.engine.backend import Backend
from burnish.generate.engine import Generator, Options, Stream
from burnish.models.inference import Loaded, load_for_inference

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "give a system prompt (/system TEXT) or take it away (/system), and start over",
    "/help": "show this",
    "/quit": "leave (also Ctrl-D; Ctrl-C stops an answer)",
}
INTERRUPTED = 130  # what shells report for Ctrl-C


def main(
    target: str,
    *,
    prompts: Sequence[str],
    compare: bool,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Answers `prompts` one by one, each in a conversation of its own; without any, talks."""
    options = Options(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    _accept_any_bytes()
    try:
        with console.status(f"loading {target}"):
            speakers = open_speakers(target, compare=compare, trust_remote_code=trust_remote_code)
        chat = Chat(speakers, options, system)
        if prompts:
            answer_all(chat, prompts)
        else:
            info(f"{target}: /help lists the commands")
            converse(chat)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader has gone (`| head -1`). Without a new stdout Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Who answers


@dataclass(slots=True)
class Speaker:
    """One who answers, and its side of the conversation.

    Base and tuned may share one model, whose adapter is switched off inside `speaking()`.
    """

    label: str
    generator: Generator
    speaking: Callable[[], AbstractContextManager[None]] = nullcontext
    history: list[Message] = field(default_factory=list[Message])


def open_speakers(target: str, *, compare: bool = False, trust_remote_code: bool = False) -> list[Speaker]:
    """Loads what `target` names; with `compare` the model before training too, which then comes first.

    Raises:
        ModelError: when it cannot be loaded. Where a folder of a similar name stands here, the hint says so.
        ConfigError: when there is nothing to compare.
    """
    backend = Backend()

    def load(path: str) -> Loaded:
        return load_for_inference(path, dtype=backend.compute_dtype, device=backend.device, trust_remote_code=trust_remote_code)

    with _suggesting(target):
        loaded = load(target)
    tuned = Speaker("tuned", _generator(loaded))
    if not compare:
        return [tuned]
    if loaded.tuned:
        return [Speaker("base", tuned.generator, loaded.as_base), tuned]
    return [Speaker("base", _generator(load(_base_of_run(target)))), tuned]


def _generator(loaded: Loaded) -> Generator:
    return Generator(loaded.model, loaded.tokenizer, Renderer(loaded.tokenizer))


def _base_of_run(target: str) -> str:
    """What the model of a run folder was before all its weights were trained."""
    run_file = Path(target).expanduser() / "run.yaml"
    if not run_file.is_file():
        raise ConfigError(
            f"'{target}' is a model, with no sign of what it was made from: there is nothing to compare it with",
            hint="--compare takes a run folder or an adapter.",
        )
    return load_run(run_file).config.model.path


@contextmanager
def _suggesting(target: str) -> Iterator[None]:
    """Adds the nearest name to the error when nothing of that name is here. It may be a hub id, so loading is tried first."""
    try:
        yield
    except ModelError as error:
        near = None if Path(target).expanduser().exists() else nearest(target, _names_near(target))
        if near:
            raise ModelError(error.message, where=error.where, hint=f"Did you mean '{near}'?") from error
        raise


def _names_near(target: str) -> list[str]:
    folders = {Path(target).expanduser().parent, Path("runs")}
    return [str(place) for folder in folders if folder.is_dir() for place in folder.iterdir() if place.is_dir() or place.suffix == ".gguf"]


# The conversation


class Chat:
    """A conversation with one speaker, or with two that get the same questions."""

    def __init__(self, speakers: Sequence[Speaker], options: Options, system: str | None = None) -> None:
        self.speakers = speakers
        self.options = options
        self.system = system
        self.screen = Screen(sys.stdout)

    def reset(self) -> None:
        """Forgets what was said."""
        for speaker in self.speakers:
            speaker.history.clear()

    def ask(self, question: str) -> None:
        """Prints every speaker's answer while it comes, and remembers it.

        An interrupted answer stays as far as it came; a question that got none is forgotten.
        """
        width = max(len(speaker.label) for speaker in self.speakers)
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                self.screen.label(speaker.label, width)
            self._answer(speaker, Message("user", question))

    def _answer(self, speaker: Speaker, question: Message) -> None:
        setting = [Message("system", self.system)] if self.system else []
        with speaker.speaking():
            stream = speaker.generator.stream([*setting, *speaker.history, question], self.options)
            try:
                with _interrupts_between() as check:
                    for piece in stream:
                        check()
                        self.screen.write(piece)
            finally:
                self.screen.end()
                if stream.text:
                    speaker.history += [question, Message("assistant", stream.text)]
        _report_cut(stream, self.options)


@contextmanager
def _interrupts_between() -> Iterator[Callable[[], None]]:
    """Ctrl-C is noted, and raised by the function that is yielded; a second one before that is raised at once.

    So an answer ends between two pieces, never in the middle of a computation, also in a process that was started with Ctrl-C ignored.
    """
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            signal.default_int_handler(number, frame)
        noted = True

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield check
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, before)


def _report_cut(stream: Stream, options: Options) -> None:
    if stream.finish == "length":
        full = len(stream.ids) < options.max_tokens
        info("(cut off: the model's context is full)" if full else f"(cut off after {options.max_tokens} tokens, see --max-tokens)")


def answer_all(chat: Chat, questions: Sequence[str]) -> None:
    """Answers each question in a conversation of its own, with an empty line between them."""
    for number, question in enumerate(questions):
        if number:
            chat.screen.end()
        if len(chat.speakers) > 1:
            chat.screen.heading(question)
        chat.reset()
        chat.ask(question)


def converse(chat: Chat) -> None:
    """Reads questions and commands until the input ends, or Ctrl-C at the prompt."""
    for line in _lines():
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if re.fullmatch(r"/[a-z]+", command):
            _obey(chat, command, rest.strip())
        elif command:
            _ask_or_explain(chat, line.strip())


def _ask_or_explain(chat: Chat, question: str) -> None:
    try:
        chat.ask(question)
    except KeyboardInterrupt:
        info("(stopped; once more to leave)")
    except BurnishError as error:
        print_error(error)


def _obey(chat: Chat, command: str, rest: str) -> None:
    if command == "/reset":
        chat.reset()
        info("(starting over)")
    elif command == "/system":
        chat.system = rest or None
        chat.reset()
        info("(starting over with this system prompt)" if rest else "(starting over without a system prompt)")
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            info(f"{name:<8} {meaning}")
    else:
        info(f"there is no command {command}: {did_you_mean(command, COMMANDS)}")


# Terminal input


def _lines() -> Iterator[str]:
    """What the user types, line by line. Ends with the input, or with Ctrl-C."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):  # arrow keys and history, where the platform has it
            import readline  # noqa: F401
        read: Callable[[], str] = lambda: input("> ")  # noqa: E731
    else:
        read = _read_plainly
    while True:
        try:
            yield read()
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                info("")
            return


def _read_plainly() -> str:
    """A line of piped input; the prompt, where somebody types, stays out of stdout."""
    if sys.stdin.isatty():
        console.print("> ", end="")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _accept_any_bytes() -> None:
    """Bytes that are no text in the terminal's encoding become replacement marks instead of a crash."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
