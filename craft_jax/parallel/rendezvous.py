"""The rendezvous of the processes of a run, before JAX starts; a missing process is named.

`jax.distributed.initialize` aborts with SIGABRT if a process is missing, with SIGSEGV if the port
is taken, and does not notice different process counts. So the processes first meet here, at the
address that JAX's coordinator uses afterwards: process 0 listens until each other process has sent
its index, and then answers all of them.
"""

import contextlib
import errno
import json
import socket
import time
from typing import Any

from craft_jax.errors import LostPeerError

SECONDS = 60.0
"""Time limit of the rendezvous."""

_POLL_SECONDS = 0.25
_HELLO_SECONDS = 5.0
_LONGEST_LINE = 4096


def meet(address: str, count: int, index: int, seconds: float = SECONDS) -> None:
    """Returns when all processes of a run have connected.

    Args:
      address: `HOST:PORT` of process 0.
      count: the number of processes.
      index: the number of this one, from 0.
      seconds: time limit.

    Raises:
      LostPeerError: a process is missing, two disagree, or the port is taken.
    """
    host, port = split(address)
    deadline = time.monotonic() + seconds
    if index == 0:
        _listen(host, port, count, deadline, seconds)
    else:
        _call(host, port, count, index, deadline, seconds)


def split(address: str) -> tuple[str, int]:
    """Returns the host and the port of `HOST:PORT`; the host of `[::1]:80` without its brackets.

    Raises:
      ValueError: it is none.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _listen(host: str, port: int, count: int, deadline: float, seconds: float) -> None:
    with contextlib.ExitStack() as context:
        listener = context.enter_context(_bound(host, port))
        listener.settimeout(_POLL_SECONDS)
        there: dict[int, socket.socket] = {}
        problem = ""
        while len(there) < count - 1 and not problem:
            if time.monotonic() > deadline:
                missing = [str(n) for n in range(1, count) if n not in there]
                problem = (
                    f"process {', '.join(missing[:8])}{' ...' * (len(missing) > 8)} of {count} did "
                    f"not come to {host}:{port} within {seconds:.0f} s"
                )
                break
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                continue
            context.enter_context(peer)
            peer.settimeout(_HELLO_SECONDS)
            hello = _read(peer)
            match hello:
                case {"process": int(other), "of": int(others)} if others != count:
                    problem = (
                        f"process {other} says `num_processes={others}`, and process 0 says {count}"
                    )
                case {"process": int(other), "of": _} if other in there or not 0 < other < count:
                    problem = f"two processes say `process_id={other}`"
                case {"process": int(other), "of": _}:
                    there[other] = peer
                    continue
                case _:  # Not a process of this run.
                    continue
            _write(peer, {"problem": problem})
        for peer in there.values():
            _write(peer, {"problem": problem})
        for peer in there.values():  # The side that closes first keeps the port busy for a while.
            _read(peer)
        if problem:
            raise LostPeerError(_with_remedy(problem))


def _bound(host: str, port: int) -> socket.socket:
    """Returns a listening socket, on the host's address if this machine has it, else on all."""
    for own in (host, ""):
        try:
            family = socket.getaddrinfo(own or None, port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((own, port), family=family)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise LostPeerError(
                    f"port {port} of `coordinator={host}:{port}` is in use on this machine; choose "
                    "another one, in all processes"
                ) from error
            reason = error
    raise LostPeerError(f"`coordinator={host}:{port}`: cannot listen there: {reason}")


def _call(host: str, port: int, count: int, index: int, deadline: float, seconds: float) -> None:
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=_HELLO_SECONDS) as peer:
                _write(peer, {"process": index, "of": count})
                peer.settimeout(max(0.1, deadline + _HELLO_SECONDS - time.monotonic()))
                match _read(peer):
                    case {"problem": ""}:
                        return
                    case {"problem": str(problem)}:
                        raise LostPeerError(_with_remedy(problem))
                reason = "what listens there is not process 0 of a run"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(_POLL_SECONDS)
    raise LostPeerError(
        _with_remedy(f"process 0 was not found at {host}:{port} within {seconds:.0f} s ({reason})")
    )


def _read(peer: socket.socket) -> Any:
    """Returns the next line of JSON; None where there is none."""
    try:
        with peer.makefile("rb") as file:
            return json.loads(file.readline(_LONGEST_LINE))
    except (OSError, ValueError):
        return None


def _write(peer: socket.socket, value: Any) -> None:
    with contextlib.suppress(OSError):
        peer.sendall(json.dumps(value).encode() + b"\n")


def _with_remedy(problem: str) -> str:
    return (
        f"{problem}; start every process with the same `coordinator` and `num_processes`, and each "
        "with a `process_id` of its own"
    )
