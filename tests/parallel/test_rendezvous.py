"""Processes that look for each other before JAX does: each failure is one line that says who is missing."""

import socket
import threading
import time

import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.parallel import rendezvous


def meet(where: str, members: list[tuple[int, int]], timeout: float) -> list[str]:
    """What each (index, number of processes) is told; "" if it met the others."""
    told = [""] * len(members)

    def one(i: int, index: int, processes: int) -> None:
        try:
            rendezvous.meet(where, processes, index, timeout)
        except UserError as e:
            told[i] = str(e)

    threads = [threading.Thread(target=one, args=(i, *member)) for i, member in enumerate(members)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout + 5)
    return told


@pytest.fixture
def where() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def test_processes_meet_in_any_order_and_the_port_is_free_again(where: str):
    assert meet(where, [(2, 3), (0, 3), (1, 3)], 5) == ["", "", ""]
    assert meet(where, [(0, 2), (1, 2)], 5) == ["", ""]


def test_who_is_missing_is_named(where: str):
    assert meet(where, [(1, 2)], 0.3)[0].startswith(f"process 0 was not found at {where} within 0 s (")
    alone, other = meet(where, [(0, 4), (2, 4)], 0.5)
    assert alone.startswith(f"process 1, 3 did not come to {where} within 0 s; start the command on every host")
    assert "process 0 was not found" in other
    twice = meet(where, [(0, 3), (1, 3), (1, 3)], 0.5)[0]
    assert twice == "two processes were started with --process_id=1; each host has its own"
    assert meet(where, [(0, 3), (1, 2)], 0.5)[0] == "process 1 was started with --processes=2, process 0 with 3"


def test_a_port_of_another_program_is_named(where: str):
    with socket.create_server(("", int(where.rpartition(":")[2]))):
        assert "cannot be opened (Address already in use" in meet(where, [(0, 2)], 0.3)[0]
