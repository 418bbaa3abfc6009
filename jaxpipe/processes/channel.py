"""Plain TCP connections between process 0 and each of the others, for what must be said when the devices are stuck.

Messages are JSON, one a line. `Server` is in process 0, and a `Client` in each of the others. They carry messages, and
decide nothing: see `guard`. A client has to show a token, which the processes have agreed upon before.
"""

import contextlib
import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

# Seconds. Messages are short, so a peer that does not take one in this time has stopped, or its machine is gone.
SEND_TIMEOUT = 2.0
CONNECT_TIMEOUT = 3.0
HELLO_TIMEOUT = 10.0
LONGEST_LINE = 1 << 20
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Address(NamedTuple):
    """Where process 0 listens.

    Attributes:
      hosts: names and addresses of its machine; at least one of them should be right for each of the others.
      port: of all of them.
      token: what a client has to show.
    """

    hosts: tuple[str, ...]
    port: int
    token: str


class Ended(NamedTuple):
    """Comes in the place of a message: a connection is over.

    Attributes:
      closed: whether the other side has closed it, as the system does for a process that ends in whatever way. If not, the
        network has failed, and the process may be fine.
    """

    closed: bool


Event = tuple[int, Any]  # the number of the process, and its message or `Ended`


class Wire:
    """One connection. One thread receives; any thread sends."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(SEND_TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._pending, self._lock = connection, b"", threading.Lock()
        self.number: int | None = None  # of the process on the other side, once that is known

    def send(self, message: Any) -> None:
        """Sends a message; if that is not possible, whoever receives will notice."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any]:
        """The messages that have come; the last one is `Ended` if there will be no more. It waits for the first bytes.

        Raises:
          ValueError: the other side does not speak as we do.
        """
        try:
            found = self.socket.recv(1 << 16)
        except OSError as error:
            return [Ended(isinstance(error, ConnectionResetError))]
        *lines, self._pending = (self._pending + found).split(b"\n")
        if len(self._pending) > LONGEST_LINE:
            raise ValueError("a line without an end")
        messages = [json.loads(line) for line in lines]
        return messages if found else [*messages, Ended(True)]

    def close(self) -> None:
        """Closes this side."""
        self.socket.close()


class Server:
    """The side of process 0.

    Args:
      count: how many processes there are.
      host: where the others find process 0, as far as that is known. If it is this machine only, nobody else can connect.

    Raises:
      OSError: this process may not listen.
    """

    def __init__(self, count: int, host: str | None):
        only_here = host in LOOPBACK
        if only_here:
            self._listener = socket.create_server((str(host), 0), family=_family(str(host)))
        elif socket.has_dualstack_ipv6():
            self._listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self._listener = socket.create_server(("", 0))
        self._listener.settimeout(SEND_TIMEOUT)
        hosts = [] if host is None else [host]
        self.address = Address(
            tuple(hosts if only_here else [*hosts, *_own_hosts(hosts)]),
            self._listener.getsockname()[1],
            secrets.token_hex(16),
        )
        self.wires: dict[int, Wire] = {}
        self._count = count
        self._strangers: dict[Wire, float] = {}  # those who have not shown the token, and until when they may
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def poll(self, seconds: float) -> list[Event]:
        """What has come; it waits up to so many seconds for it."""
        events: list[Event] = []
        for ready, _ in self._selector.select(seconds):
            if ready.data is None:
                self._accept()
            elif (number := ready.data.number) is None:
                self._greet(ready.data)
            else:
                messages = _received(ready.data)
                events += [(number, message) for message in messages]
                if messages and isinstance(messages[-1], Ended):
                    self._drop(self.wires.pop(number))
        for wire, deadline in list(self._strangers.items()):
            if time.monotonic() > deadline:
                self._drop(wire)
        return events

    def send(self, message: Any) -> None:
        """Sends a message to all who are connected."""
        for wire in list(self.wires.values()):
            wire.send(message)

    def close(self) -> None:
        """Ends all connections."""
        for wire in [*self.wires.values(), *self._strangers]:
            wire.close()
        self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            wire = Wire(connection)
            self._strangers[wire] = time.monotonic() + HELLO_TIMEOUT
            self._selector.register(connection, selectors.EVENT_READ, wire)

    def _greet(self, wire: Wire) -> None:
        """Takes a stranger for a process of this program if the first message says so."""
        messages = _received(wire)
        if not messages:
            return
        match messages[0]:
            case {"token": str(token), "number": int(number)} if (
                secrets.compare_digest(token.encode(), self.address.token.encode())
                and 0 < number < self._count
                and number not in self.wires
            ):
                del self._strangers[wire]
                wire.number, self.wires[number] = number, wire
                wire.send({"welcome": number})
            case _:
                self._drop(wire)

    def _drop(self, wire: Wire) -> None:
        self._strangers.pop(wire, None)
        self._selector.unregister(wire.socket)
        wire.close()


class Client:
    """The side of every other process.

    Args:
      address: of the server.
      number: of this process.

    Raises:
      OSError: none of its hosts can be reached, or it does not know the token.
    """

    def __init__(self, address: Address, number: int):
        failed: list[str] = []
        for host in address.hosts:
            try:
                self._wire = Wire(socket.create_connection((host, address.port), CONNECT_TIMEOUT))
            except OSError as error:
                failed.append(f"{host}: {error}")
                continue
            self._wire.send({"token": address.token, "number": number})
            if _received(self._wire)[:1] == [{"welcome": number}]:
                return
            failed.append(f"{host}: another program answers there")
            self._wire.close()
        raise OSError(f"port {address.port}: {'; '.join(failed)}")

    def poll(self, seconds: float) -> list[Event]:
        """What has come; it waits up to so many seconds for it."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wire.socket, selectors.EVENT_READ)
            if not selector.select(seconds):
                return []
        return [(0, message) for message in _received(self._wire)]

    def send(self, message: Any) -> None:
        """Sends a message to process 0."""
        self._wire.send(message)

    def close(self) -> None:
        """Ends the connection."""
        self._wire.close()


def _received(wire: Wire) -> list[Any]:
    try:
        return wire.receive()
    except (ValueError, RecursionError):  # not one of us
        return [Ended(False)]


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _own_hosts(known: Sequence[str]) -> list[str]:
    """Names and addresses of this machine, the likeliest first."""
    found: dict[str, None] = {}
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; it only chooses the way that leads out
        found[probe.getsockname()[0]] = None
    name = socket.gethostname()
    found[name] = None
    with contextlib.suppress(OSError):
        found |= dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(name, None))
    return [host for host in found if host not in known and not host.startswith(("127.", "::1", "fe80:"))]
