"""The meeting itself, in threads; what processes make of it is in tests/faults/peers.py."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from craft_jax.errors import LostPeerError
from craft_jax.parallel import rendezvous


@pytest.fixture
def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def meet(address: str, *who: tuple[int, int], seconds: float = 20.0) -> list[str]:
    """Lets processes meet, given as (index, count); returns what each of them complains of."""

    def come(index: int, count: int) -> str:
        try:
            rendezvous.meet(address, count, index, seconds)
        except LostPeerError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(who)) as pool:
        return list(pool.map(lambda one: come(*one), who))


def test_all_come(address):
    for _ in range(3):  # The same port at once again.
        assert meet(address, (0, 4), (1, 4), (2, 4), (3, 4)) == [""] * 4


def test_one_alone_waits_for_nobody(address):
    assert meet(address, (0, 1)) == [""]


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ([(0, 2), (1, 3)], "process 1 says `num_processes=3`, and process 0 says 2"),
        ([(0, 3), (1, 3), (1, 3)], "two processes say `process_id=1`"),
    ],
)
def test_those_who_disagree_all_hear_it(address, who, words):
    assert all(words in said for said in meet(address, *who))


def test_who_is_missing_is_named(address):
    first, second = meet(address, (0, 4), (2, 4), seconds=1.0)
    assert "process 1, 3 of 4 did not come" in first
    assert first == second


def test_nobody_there(address):
    (said,) = meet(address, (1, 2), seconds=0.6)
    assert f"process 0 was not found at {address}" in said and "start every process" in said


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (said,) = meet(address, (0, 2))
    assert "is in use on this machine" in said


def test_strangers_are_passed_over(address):
    host, port = rendezvous.split(address)

    def disturb() -> None:
        for line in (
            b"GET / HTTP/1.0\r\n\r\n",
            b"\xff\xfe\n",
            b"[1]\n",
            b'{"process": "a"}\n',
            b"",
        ):
            for _ in range(200):
                try:
                    with socket.create_connection((host, port), timeout=5) as stranger:
                        stranger.sendall(line)
                    break
                except OSError:
                    pass

    thread = threading.Thread(target=disturb)
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, address, (0, 2))
        thread.join()
        assert meet(address, (1, 2)) == [""]
        assert first.result() == [""]


def test_a_stranger_in_the_place_of_process_0():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(100)
                peer.sendall(json.dumps({"hello": 1}).encode() + b"\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (said,) = meet(address, (1, 2), seconds=0.5)
        thread.join()
    assert "what listens there is not process 0" in said


@pytest.mark.parametrize("address", ["here", ":80", "here:", "here:0", "here:99999", "here:a"])
def test_addresses_that_are_none(address):
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        rendezvous.split(address)


def test_addresses_of_version_6():
    assert rendezvous.split("[::1]:80") == ("::1", 80)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
    assert meet(f"[::1]:{port}", (0, 2), (1, 2)) == ["", ""]
