"""Connections: who may connect, what comes through, and how the end of a process is told from the end of a network."""

import json
import socket
import struct
import threading
import time

import pytest

from jaxpipe.processes.channel import Address, Client, Ended, Server

LIMIT = 600


OPEN = []


@pytest.fixture
def server():
    OPEN.append(Server(3, "127.0.0.1"))
    yield OPEN[0]
    while OPEN:
        OPEN.pop().close()


def until(poll, enough):
    """Polls until there is enough, or no hope."""
    found, deadline = [], time.monotonic() + LIMIT
    while not enough(found) and time.monotonic() < deadline:
        found += poll(0.01)
    return found


def connected(server, number, address=None):
    """A client; the server has to answer while it connects."""
    made = []
    thread = threading.Thread(target=lambda: made.append(Client(address or server.address, number)))
    thread.start()
    until(server.poll, lambda _: not thread.is_alive())
    OPEN.append(made[0])
    return made[0]


def raw(server, data):
    """A connection that sends what a client would not."""
    made = socket.create_connection((server.address.hosts[0], server.address.port), LIMIT)
    OPEN.append(made)
    made.sendall(data)
    return made


def test_messages_go_both_ways(server):
    clients = {number: connected(server, number) for number in (1, 2)}
    for number, client in clients.items():
        client.send({"a": number, "text": "x" * 100_000})
    found = until(server.poll, lambda found: len(found) == 2)
    assert {number: message["a"] for number, message in found} == {1: 1, 2: 2}
    server.send(["to all", None])
    for client in clients.values():
        assert until(client.poll, bool) == [(0, ["to all", None])]


def test_a_process_that_ends_is_noticed_after_its_last_message(server):
    client = connected(server, 1)
    client.send("last")
    client.close()
    assert until(server.poll, lambda found: len(found) == 2) == [(1, "last"), (1, Ended(True))]
    assert not server.wires
    # Its place is free again.
    connected(server, 1).close()


def test_the_end_of_process_0_is_noticed(server):
    client = connected(server, 1)
    server.send("last")
    server.close()
    assert until(client.poll, lambda found: len(found) == 2) == [(0, "last"), (0, Ended(True))]


def test_a_reset_is_the_end_of_a_process(server):
    client = connected(server, 2)
    wire = client._wire.socket
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert until(server.poll, bool) == [(2, Ended(True))]


@pytest.mark.parametrize(
    "hello",
    [
        {"token": "wrong", "number": 1},
        {"token": None, "number": 1},
        {"number": 1},
        {"token": "TOKEN", "number": 0},
        {"token": "TOKEN", "number": 3},
        {"token": "TOKEN", "number": "1"},
        {"status": {}},
        [],
    ],
)
def test_strangers_are_sent_away(server, hello):
    stranger = raw(server, json.dumps(hello).replace("TOKEN", server.address.token).encode() + b"\n")
    until(server.poll, lambda _: not server._strangers and _closed(stranger))
    assert not server.wires


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b""])
def test_what_is_no_message_ends_a_connection(server, data):
    stranger = raw(server, data)
    if not data:
        stranger.shutdown(socket.SHUT_WR)
    until(server.poll, lambda _: not server._strangers and _closed(stranger))
    assert not server.wires


def _closed(connection):
    connection.settimeout(0.05)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_a_number_is_taken_once(server):
    first = connected(server, 1)
    second = raw(server, json.dumps({"token": server.address.token, "number": 1}).encode() + b"\n")
    until(server.poll, lambda _: _closed(second))
    first.send("still there")
    assert until(server.poll, bool) == [(1, "still there")]


def test_the_right_host_is_found_among_wrong_ones(server):
    connected(server, 1, server.address._replace(hosts=("no-such-host.invalid", *server.address.hosts))).close()


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(OSError, match="127.0.0.1"):
        Client(Address(("127.0.0.1",), port, "token"), 1)


def test_where_others_find_process_0():
    local, wide = Server(2, "localhost"), Server(2, "node-7")
    assert local.address.hosts == ("localhost",), "nobody else may connect"
    assert wide.address.hosts[0] == "node-7" and len(wide.address.hosts) > 1
    assert len(set(wide.address.hosts)) == len(wide.address.hosts)
    assert local.address.token != wide.address.token
    for one in (local, wide):
        one.close()
