"""Notes on a board that outlives the processes which leave them."""

from __future__ import annotations

import socket

from burnish.engine.rendezvous import VERDICT, connect, serve, verdict


def test_processes_that_are_started_again_find_no_notes_of_those_before() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        host, port = listening.getsockname()
        first = serve(listening)  # as torchrun does, once for all attempts
        place = {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        before, after = (connect({**place, "TORCHELASTIC_RESTART_COUNT": attempt}, timeout=20) for attempt in ("0", "1"))
        before.set("prepare the data/failed", "rank 1 was out of memory")
        before.set(VERDICT, "rank 1 does not answer")
        assert before.check(["prepare the data/failed"]) and not after.check(["prepare the data/failed"])
        assert after.add("prepare the data/ready", 1) == 1 and verdict(after) is None
        assert verdict(first) == "rank 1 does not answer"


def test_the_launcher_reads_the_notes_of_its_attempt() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        host, port = listening.getsockname()
        board = serve(listening, attempt=2)
        rank = connect({"MASTER_ADDR": host, "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "2"}, timeout=20)
        rank.set(VERDICT, "rank 0 does not answer")
        assert verdict(board) == "rank 0 does not answer"
