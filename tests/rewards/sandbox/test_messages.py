"""Messages between the worker and the sandbox that end early or are too long, and descriptors that stay open."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from mdrl_jax.rewards.sandbox import lockdown, server


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def ends():
    here, there = socket.socketpair()
    here.settimeout(5)
    with here, there:
        yield here, there


@pytest.mark.parametrize("sent", [b"", b"\0\0\0", b"\0" * 7 + b"\x05", b"\0" * 7 + b"\x05[1,"])
def test_a_message_that_ends_early_is_an_end(ends, sent: bytes) -> None:
    here, there = ends
    there.sendall(sent)
    there.close()
    with pytest.raises(EOFError):
        server.receive(here)


def test_a_message_over_the_limit_is_refused_before_it_is_read(ends, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = ends
    monkeypatch.setattr(server, "_MESSAGE_BYTES", 10)
    there.sendall((11).to_bytes(8, "big"))  # none of its bytes comes
    with pytest.raises(EOFError):
        server.receive(here)


def test_descriptors_of_a_refused_message_are_closed_and_those_of_a_good_one_come(ends) -> None:
    here, there = ends
    with open(os.devnull) as null:
        server.send(there, {"a": 1}, [null.fileno()])
        message, (fd,) = server.receive(here)
        os.close(fd)
        assert message == {"a": 1}
        before = open_files()
        socket.send_fds(there, [(1 << 40).to_bytes(8, "big")], [null.fileno()])
        with pytest.raises(EOFError):
            server.receive(here)
    assert open_files() == before - 1  # `null` alone was closed


def test_a_rule_that_fails_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def syscall(number: int, *rest) -> int:
        if number == 444:
            return 3 if rest[0] is None else os.open(os.devnull, os.O_RDONLY)
        return -1

    fake = SimpleNamespace(syscall=syscall, prctl=lambda *_: 0)
    monkeypatch.setattr(lockdown.ctypes, "CDLL", lambda *_, **__: fake)
    monkeypatch.setattr(lockdown, "supported", lambda: True)
    before = open_files()
    assert not lockdown.confine_files([str(tmp_path)], [], str(tmp_path))
    assert open_files() == before
