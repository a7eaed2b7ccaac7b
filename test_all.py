"""Tests for the six echo servers and their client. With --benchmark, measure the servers.

    python test_all.py                                       all, in a minute
    python test_all.py EpollServer.test_echo_and_quit        one test
    python test_all.py --benchmark                           a table instead of tests

Each server has the tests of EveryServer. Most of them start its script as a process and play its
clients with plain sockets. Where a fault must be injected or calls are counted, serve() runs in a
thread of this process (class Inside), with spies for sockets (class Spy). A prelude is Python code
that a process runs before the script. The tools are at the end.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import atexit
import contextlib
import errno
import functools
import gc
import importlib.util
import io
import itertools
import logging
import os
import platform
import random
import re
import select
import selectors
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out
import client

resource: Any = importlib.import_module("resource") if os.name == "posix" else None
HERE = Path(__file__).resolve().parent
NAMES = ("blocking", "nonblocking", "select", "epoll", "selectors", "async")
SCRIPTS = {name: HERE / f"{name}_server.py" for name in NAMES}
CLIENT = HERE / "client.py"
PORT = 8088
DEADLINE = float(os.environ.get("TEST_DEADLINE", "5"))  # seconds to wait before giving up
LINUX = unittest.skipUnless(sys.platform == "linux", "needs Linux")
POSIX = unittest.skipUnless(os.name == "posix", "needs signals")
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
EMFILE = f"[Errno {errno.EMFILE}] {os.strerror(errno.EMFILE)}"
TRIES_AGAIN = "trying again in a second"
# Bytes to send where the echo is not what a test is about. No letter of the lower case: so there is
# no q line in them, and a server that an exercise has changed to answer in upper case passes.
NOISE = re.sub(rb"[a-z]", b"-", random.Random(1).randbytes(1 << 20))


class Case(unittest.TestCase):
    """What tests of servers and of the client share."""

    def tearDown(self) -> None:
        for process in list(RUNNING):
            process.kill()

    def connect(self, server: Server | Inside) -> socket.socket:
        """Return a client: a plain socket. Its timeout makes a silent server fail the test."""
        sock = connect(server.address)
        self.addCleanup(sock.close)
        return sock

    def hello(self, server: Server | Inside) -> socket.socket:
        """Return a client that has been served."""
        sock = self.connect(server)
        self.assert_echo(sock, b"HELLO\n")
        return sock

    def assert_echo(self, sock: socket.socket, data: bytes) -> None:
        """Send data, and compare what comes back."""
        sender = send_in_thread(sock, data)
        self.assert_same(receive(sock, len(data)), data)
        sender.join(DEADLINE)

    def assert_same(self, echo: bytes, data: bytes) -> None:
        """Compare, without printing megabytes."""
        self.assertEqual((len(echo), echo[-20:]), (len(data), data[-20:]))
        self.assertTrue(echo == data, "other bytes")


# ---- Every server: SelectServer.test_reset and the like are written here, and inherited

class EveryServer(Case):
    name = ""  # of the script, without _server.py
    banner = ""  # what the line "listening on ..." says of the model
    calls = ""  # what serve() calls for one client: see test_calls
    iterative = False  # serves one client at a time
    concurrent: tuple[str, ...] = ()  # options to serve several clients at the same time
    full = "new clients will have to wait"  # what it says when it is out of resources
    refused: tuple[str, ...] = ("--port=many",)  # options that are an error
    accepted: tuple[tuple[str, str], ...] = ()  # options, and the banner then
    crowd = 300  # silent clients in test_idle

    def start(self, *options: str, **settings: Any) -> Server:
        """Start the script as a process; on a free port, unless the options say another."""
        return Server(SCRIPTS[self.name], *options, **settings)

    # -- The card: it echoes, and a q ends the conversation

    def test_echo_and_quit(self) -> None:
        """The script as a process, and its clients are plain sockets."""
        server = self.start()
        self.assertEqual(server.line, f"listening on 127.0.0.1:{server.port} ({self.banner})\n")
        self.assertNotEqual(server.port, PORT, "a free port")

        # Every byte comes back, also those of a large message.
        first = self.connect(server)
        self.assert_echo(first, bytes(range(256)))
        self.assert_echo(first, bytes(range(256)) * 4000)

        # Several clients: at the same time, or the next one when the first has left.
        second = self.connect(server)
        second.sendall(b"second client\n")
        if not self.iterative:
            self.assertEqual(receive(second, 14), b"second client\n")
            self.assert_echo(first, b"first client\n")
        first.shutdown(socket.SHUT_WR)  # the end of the stream
        self.assertEqual(receive(first), b"")
        first.close()
        if self.iterative:
            self.assertEqual(receive(second, 14), b"second client\n")
        second.close()

        # A q ends the conversation: as a line, with CRLF, alone, or split by TCP.
        # What precedes it is echoed, and what follows it is ignored.
        for pieces, last_reply in (
            ([b"q\n"], b""), ([b"q\r\n"], b""), ([b"one\nq\n"], b"one\n"),
            ([b"one\nq\nq\nmore\n"], b"one\n"), ([b"one\n", b"q"], b""),
            ([b"one\nq", b"\n"], b""), ([b"one\nq\r", b"\n"], b""),
        ):
            sock = self.connect(server)
            for piece in pieces[:-1]:
                self.assert_echo(sock, piece)  # so the next piece is received on its own
            sock.sendall(pieces[-1])
            self.assertEqual(receive(sock), last_reply, pieces)  # up to the end of the stream
            sock.close()

        # The log of one client, from first to last.
        sock = self.connect(server)
        name = "{}:{}".format(*sock.getsockname())
        data = b"HELLO\x1b\xff" + b"." * 93 + b"\n"
        self.assert_echo(sock, data)
        sock.sendall(b"q\n")
        self.assertEqual(receive(sock), b"")
        sock.close()
        server.wait_for_log(f"{name}: closed")
        server.kill()
        self.assertEqual(re.findall(rf"(?m)^\d\d:\d\d:\d\d\.\d{{3}} {name}: (.*)$", server.log()), [
            "connected", f"received 101 bytes: {data[:50]!r}",
            r"received 2 bytes: b'q\n'", "closed (quit)"])
        ends = re.findall(r": closed \((.+)\)\n", server.log())
        self.assertEqual(sorted(ends), ["end of stream"] * 2 + ["quit"] * 8, "one for each client")

    def test_client_script(self) -> None:
        """client.py through a pipe gets its input back, and so do ten clients at the same time."""
        server = self.start()
        data = NOISE[:200_000] + b"\n"
        pipe = Process(CLIENT, f"--port={server.port}")
        echo, errors, status = pipe.result(data + b"q\n")
        self.assert_same(echo, data)
        self.assertEqual((errors, status), (b"", 0))
        crowd = "--clients=10", "--messages=20", "--size=1"
        shown, errors, status = Process(CLIENT, f"--port={server.port}", *crowd).result()
        self.assertIn(b"\n200 messages in ", shown)
        self.assertEqual((errors, status), (b"", 0))
        server.wait_for_log("closed (quit)", 11)

    @POSIX
    def test_ctrl_c(self) -> None:
        """It ends a server that has clients, one that never had any, and one at work."""
        server = self.start()
        for _ in range(1 if self.iterative else 5):
            self.hello(server)
        send_in_thread(self.connect(server), NOISE)  # and nobody reads the echo
        server.wait_until_idle()  # Python notices a signal just before that too late
        self.press_ctrl_c(server)
        server = self.start("--quiet", f"--port={server.port}")  # the port is free again
        server.wait_until_idle()
        self.press_ctrl_c(server)
        if self.name != "async" or sys.version_info >= (3, 11):  # see README: Where it runs
            for _ in range(3 if self.concurrent else 1):  # threads may log while Python exits
                server = self.start(*self.concurrent)
                crowd = "--clients=50", "--messages=99999", "--size=1"
                Process(CLIENT, f"--port={server.port}", *crowd)
                server.wait_for_log("received", 500)
                self.press_ctrl_c(server)

    def press_ctrl_c(self, server: Server) -> None:
        """Press Ctrl-C: status 0, and "stopped" is the last line, soon."""
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        output, _, status = server.result()
        self.assertLess(time.monotonic() - start, DEADLINE / 2, "seconds: others may be busy")
        self.assertRegex(server.log()[-500:], r"(\A|\n)\d\d:\d\d:\d\d\.\d{3} stopped\n\Z")
        self.assertEqual(server.log().count("stopped"), 1)
        self.assertNotRegex(server.log(), r"Traceback|full \(")  # what woken threads could say
        self.assertEqual((output.decode(), status), (server.line, 0))

    # -- The command line

    def test_options(self) -> None:
        shown = Process(SCRIPTS[self.name], "--help").result()[0].decode()
        docstring = ast.get_docstring(ast.parse(SCRIPTS[self.name].read_text("utf-8-sig")))
        self.assertIn(" ".join(str(docstring).split()), " ".join(shown.split()))
        defaults = options_of(SCRIPTS[self.name])
        self.assertEqual((defaults.host, defaults.port), ("127.0.0.1", PORT))
        for option in self.refused:
            output, errors, status = Process(SCRIPTS[self.name], option).result()
            self.assertEqual((output, status), (b"", 2), option)
            self.assertRegex(errors.decode(), rf"error: .*{option.partition('=')[0]}\b.*\n\Z")
        for option, banner in (("--quiet", self.banner), *self.accepted):
            self.assertIn(f" ({banner})\n", self.start(option).line)

    def test_cannot_listen(self) -> None:
        """What prevents it from listening is told in one line."""
        cases = [("127.0.0.1", self.start().port, "Errno"), ("127.0.0.1", 65536, "0-65535")]
        if os.name == "posix":
            cases.append((os.fsdecode(b"\xff"), 0, "encod"))  # cannot be a name
        for host, port, reason in cases:
            process = Process(SCRIPTS[self.name], f"--host={host}", f"--port={port}")
            output, errors, status = process.result()
            self.assertEqual((output, status), (b"", 1))
            host = host.encode(errors="backslashreplace").decode()
            line = rf"cannot serve on {re.escape(host)}:{port}: .*{reason}.*\n"
            self.assertRegex(errors.decode(), rf"\A{line}\Z")

    def test_sockets(self) -> None:
        """The address to listen at, the length of the backlog, and no delay for small packets."""
        prelude = """
import socket, sys
class Told(socket.socket):
    def bind(self, address):
        print("bind", *address, file=sys.stderr)
        super().bind(("127.0.0.1", 0))
    def listen(self, *backlog):
        print("backlog", *backlog, file=sys.stderr)
        super().listen(*backlog)
    def shutdown(self, how):
        delay = not self.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        print("delay", delay, file=sys.stderr, flush=True)
        super().shutdown(how)
socket.socket = Told
"""
        server = self.start("--quiet", "--host=a.b", "--port=7", prelude=prelude)
        sock = self.connect(server)
        sock.sendall(b"q\n")
        self.assertEqual(receive(sock), b"")
        server.wait_for_log("delay")
        server.kill()
        self.assertEqual(server.log(), "bind a.b 7\nbacklog 1024\ndelay False\n")

    def test_mistake_is_shown(self) -> None:
        """An exception that is no OSError is a mistake of the program, and has a traceback."""
        faults = [FAULT.format(f"socket.socket.{call}", "TypeError('a mistake')")
                  for call in ("recv", "recv_into")]
        server = self.start(prelude="".join(faults))
        self.connect(server).sendall(b"HELLO\n")
        server.wait_for_log("\nTypeError: a mistake\n")  # and no other client has to come
        self.assertIn("\nTraceback", "\n" + server.log())
        self.assertNotIn("cannot serve", server.log())
        self.assertNotIn("(a mistake)", server.log())

    @POSIX
    def test_time_in_the_log(self) -> None:
        """It is the local time, with hours from 0 to 23: here it is past 3 in the afternoon."""
        now = time.time()
        west = time.gmtime(now).tm_hour - 15  # hours
        server = self.start(env={**ENVIRONMENT, "TZ": f"TEST{west:+}"})
        self.connect(server)
        server.wait_for_log("connected")
        possible = [time.strftime("15:%M:", time.gmtime(now + late)) for late in (0, DEADLINE)]
        self.assertRegex(server.log(), rf"\A({'|'.join(possible)})[0-5]\d\.\d{{3}} ")

    # -- Clients that misbehave

    def test_half_close(self) -> None:
        """A client that ends its direction gets all that is not sent yet."""
        self.check_late_readers(b"", "end of stream")

    def test_q_after_much(self) -> None:
        """Every byte before the q comes back, even if the client sends more."""
        self.check_late_readers(b"q\n" + NOISE, "quit")

    def check_late_readers(self, more: bytes, reason: str) -> None:
        """Let clients send data and more, end their direction, and read late; expect the data."""
        server = self.start(prelude=SMALL_BUFFERS)
        sizes = (1_000_000, *range(60_000, 200_000, 20_000))  # some just do not fit into buffers
        for size in sizes:
            data = NOISE[:size] + b"\n"
            with self.connect(server) as sock:
                sender = send_in_thread(sock, data + more, last=True)
                server.wait_until_idle()
                self.assert_same(receive(sock), data)
                sender.join(DEADLINE)
        server.wait_for_log(f"closed ({reason})", len(sizes))

    def test_never_reads(self) -> None:
        """It costs no CPU time, and delays no other client. Then it reads, late."""
        server = self.start(prelude=SMALL_BUFFERS)
        sock = self.hello(server)
        echo = flood(sock)
        self.assertLess(len(echo), 1_000_000, "backpressure: it has to stop")
        server.wait_until_idle()
        if not self.iterative:
            self.hello(server)
        self.assert_same(receive(sock, len(echo)), echo)
        self.assert_echo(sock, b"HELLO\n")
        server.wait_until_idle()

    @POSIX
    def test_reset(self) -> None:
        """A reset ends one client only: in a transfer, or before it is accepted."""
        server = self.start(prelude=SMALL_BUFFERS)
        greedy = self.hello(server)
        flood(greedy)
        server.process.send_signal(vars(signal)["SIGSTOP"])  # holds it (Windows has no such name)
        reset(greedy)
        reset(self.connect(server))
        server.process.send_signal(vars(signal)["SIGCONT"])
        self.hello(server).close()
        server.wait_for_log("closed (end of stream)")
        if sys.platform == "linux":  # elsewhere accept() can tell it, and then there is no line
            server.wait_for_log(": closed (", 3)
            broken = [os.strerror(number) for number in (errno.ECONNRESET, errno.EPIPE)]
            ends = re.findall(r": closed \(\[.+\] (.+)\)", server.log())
            self.assertEqual([end in broken for end in ends], [True, True], ends)

    # -- Many clients

    @LINUX
    def test_idle(self) -> None:
        """A crowd of silent clients costs no CPU time, and each is served when it speaks."""
        server = self.start("--quiet", *self.concurrent)
        socks = self.crowd_of(self.crowd, server)
        for sock in socks:
            sock.sendall(b"AGAIN\n")
        for sock in socks:
            self.assertEqual(receive(sock, 12), b"HELLO\nAGAIN\n")

    def crowd_of(self, number: int, server: Server) -> list[socket.socket]:
        """Connect so many clients, each of which says hello; wait until the server is idle."""
        need_files(self, number + 100)
        socks = []
        for i in range(number):
            socks.append(self.connect(server))
            socks[-1].sendall(b"HELLO\n")
            if i % 900 == 899:  # its backlog has room for 1,024
                server.wait_until_idle()
        server.wait_until_idle()
        return socks

    @LINUX
    def test_no_descriptor_left(self) -> None:
        """With 64 file descriptors, it serves some, idle; and the next one as one leaves."""
        self.check_room(self.start(*self.concurrent, files=64), 100, range(50, 64))

    def check_room(self, server: Server, clients: int, room: range, reason: str = EMFILE) -> None:
        """Connect clients; fail if the server has not room for so many, or for the next ones."""
        socks = self.crowd_of(clients, server)
        served = server.log().count(": connected")
        self.assertIn(served, room)
        lines = re.findall(r" full \((.+)\)(: .+)\n", server.log())
        self.assertLessEqual(set(lines), {(reason, f": {self.full}")})
        if self.full != TRIES_AGAIN:
            self.assertEqual(len(lines), 1, "said once")
        # One leaves, and the next one is served, and so on.
        for sock in (socks[served - 1], *socks[served:], *socks[: served - 1]):
            self.assertEqual(receive(sock, 6), b"HELLO\n")
            sock.close()
        self.assertNotIn("Traceback", server.log())

    # -- What serve() calls, and what it does if a call fails: inside this process

    def arguments(self) -> list[Any]:
        """Return what serve() takes beside the listener."""
        return []

    def inside(self, *accept_errors: OSError | None, arguments: Any = None) -> Inside:
        """Return a server in a thread. Its accept() raises these errors, one in each call."""
        inside = Inside(self.name, arguments or self.arguments(), list(accept_errors))
        self.addCleanup(inside.stop)
        return inside

    def test_calls(self) -> None:
        """It receives before it sends, once per turn, and only the right call blocks."""
        self.check_calls(self.inside())

    def check_calls(self, inside: Inside) -> None:
        sock = self.hello(inside)
        sock.sendall(b"q\n")
        self.assertEqual(receive(sock), b"")
        sock.sendall(b"MORE\n")  # is received: otherwise close() would cause a reset
        inside.wait_until_idle()
        sock.close()
        inside.wait_for_log("closed (quit)")
        inside.wait_until_idle()
        self.assertEqual(" ".join(inside.work()).replace(" 1", ""), self.calls)

    def test_large_message(self) -> None:
        """All of it comes back, even if nothing new arrives, or send() takes only a part."""
        inside = self.inside()
        sock = self.hello(inside)
        spy = inside.sockets[0]
        spy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # room for all
        with inside.hold:  # the server has to wait until all is in its receive buffer
            data = flood(sock)
        self.assertGreater(len(data), 2 * 65536)
        self.assert_same(receive(sock, len(data)), data)
        self.assertLess(inside.calls.count("recv 1"), 12, "up to 65,536 bytes in a call")
        if not self.iterative:  # a blocking send() waits for room instead
            spy.send_limit = 0
            self.assert_echo(sock, b"HELLO\n")
        spy.send_limit = 5000
        self.assert_echo(sock, NOISE[:300_000] + b"\n")  # more than one recv() returns
        sock.sendall(NOISE[:30_000] + b"\nq\n")
        self.assert_same(receive(sock), NOISE[:30_000] + b"\n")

    def test_errors(self) -> None:
        """Any OSError, a reset or not, ends one client, and the log says which."""
        inside = self.inside()
        others = [] if self.iterative else [self.hello(inside)]
        for number in (errno.ECONNRESET, errno.ETIMEDOUT, errno.ENOBUFS):
            for call, data in (("recv", b"HELLO\n"), ("send", b"HELLO\n"), ("shutdown", b"q\n")):
                sock = self.hello(inside)
                error = OSError(number, "a fault of the test")
                inside.sockets[-1].errors[call] = error
                sock.sendall(data)
                inside.wait_for_log("{}:{}: closed ({})".format(*sock.getsockname(), error))
                for other in others:
                    self.assert_echo(other, b"STILL THERE?\n")

    def test_accept_fails(self) -> None:
        """Nobody inside, or another error: told, and tried again after a second, each time.

        If the client is gone, nothing is wrong with the server: no pause, and no line.
        """
        others = (errno.EPERM, errno.EPROTO, errno.EHOSTUNREACH, errno.ENETDOWN)
        gone = [errno.ECONNABORTED, errno.ECONNRESET]
        if not self.iterative:
            gone.append(errno.EAGAIN)  # "ready" was only a hint
        for number in (*OUT_OF_RESOURCES, *others, *gone):
            error = OSError(number, "a fault of the test")
            inside = self.inside(error, None, error, error)
            inside.no_address = number in gone  # so does macOS
            with self.hello(inside) as first:
                if number in OUT_OF_RESOURCES or self.iterative:
                    first.close()
                    inside.wait_for_log("closed")
                self.hello(inside)  # which is accepted, whoever stays
            times = 0 if number in gone else 3
            self.assertEqual(inside.pauses, [1] * times, error)
            said = re.findall(r".*a fault of the test.*", inside.log())
            self.assertEqual(len(said), times, error)
            for line in said:
                self.assertIn(f"({error}): {TRIES_AGAIN}", line)
            self.assertEqual(inside.log().count("?:?: connected"), 2 if number in gone else 0)
            inside.stop()

    def test_memory(self) -> None:
        """Little memory for each client, even for one that never reads."""
        inside = self.inside()
        self.hello(inside).close()  # what is loaded or made only once
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for _ in range(20):
            sock = self.connect(inside)
            self.assert_echo(sock, NOISE[:60_000])
            self.assert_echo(sock, b"HELLO\n")  # a coroutine keeps the last message only
            if self.iterative:
                sock.close()
        for_twenty = self.memory_of(inside)
        self.assertLess(for_twenty / 20, 16_384, "bytes for each client")
        flood(self.connect(inside))
        for_one = self.memory_of(inside) - for_twenty
        self.assertLess(for_one, 65536 + 40_000, "bytes for a client that never reads")

    def memory_of(self, inside: Inside) -> int:
        """Return how many bytes this process has allocated, without the calls that it noted."""
        inside.wait_until_idle()
        gc.collect()
        with inside.hold:
            inside.calls.clear()
            return tracemalloc.get_traced_memory()[0]

    def test_no_leak(self) -> None:
        """Sockets are closed and conversations forgotten, however they end."""
        inside = self.inside()
        for data in (b"q\n", b"NOBODY READS THE ECHO\n") * 20:
            with connect(inside.address) as sock:
                sock.sendall(data)
            self.hello(inside).close()
        eventually(lambda: all(spy.fileno() < 0 for spy in inside.sockets), "closed sockets")
        inside.wait_until_idle()
        gc.collect()
        kinds = (inside.module.Conversation, asyncio.Task)
        alive = [thing for thing in gc.get_objects() if isinstance(thing, kinds)]
        self.assertLess(len(alive), 5)
        self.assertEqual(inside.log().count(": closed ("), len(inside.sockets))


class ConcurrentServer(EveryServer):
    """Tests for servers that serve several clients in one thread."""

    def test_turns(self) -> None:
        """However much a client sends, and however many arrive, another one has its turn."""
        for text in (b"HELLO\n", b"q\n"):  # also if it sends on after its q
            inside = self.inside()
            busy, other = self.hello(inside), self.hello(inside)
            busy.sendall(text)
            receive(busy, 6)
            inside.sockets[0].endless = True
            inside.sockets[1].send_limit = 3  # bytes, so that a message needs three turns
            busy.sendall(b"MORE\n")
            with inside.hold:  # the server has to wait until all are there
                start = len(inside.calls)
                crowd = [self.connect(inside) for _ in range(8)]
                other.sendall(b"MY TURN\n")
            self.assertEqual(receive(other, 8), b"MY TURN\n")
            self.assert_echo(crowd[-1], b"HELLO\n")
            calls = inside.calls[start:]
            self.assertLess(calls[: calls.index("recv 2")].count("recv 1"), 4)
            self.assertNotIn("accept accept accept", " ".join(calls))
            inside.stop()

    def test_out_of_resources_with_clients_inside(self) -> None:
        """It serves them; and the next client as soon as one leaves, or after a second."""
        for number, clients in itertools.product(OUT_OF_RESOURCES, (1, 3)):
            error = OSError(number, "a fault of the test")
            inside = self.inside(*[None] * clients, error)
            socks = [self.hello(inside) for _ in range(clients)]
            waits = self.connect(inside)
            waits.sendall(b"WAITS\n")
            inside.wait_until_idle()
            for sock in socks:
                self.assert_echo(sock, b"STILL INSIDE\n")
            if self.full != TRIES_AGAIN:
                self.assertEqual(len(inside.sockets), clients)
                socks[0].close()
            self.assertEqual(receive(waits, 6), b"WAITS\n")
            self.assertEqual(inside.calls.count("accept fails"), 1)
            self.assertEqual(inside.pauses, [] if self.full != TRIES_AGAIN else [1])
            self.assertEqual(re.findall("full.*", inside.log()), [f"full ({error}): {self.full}"])
            inside.stop()


class ScalableServer(ConcurrentServer):
    """Tests for servers where silent clients cost nothing."""

    def test_cost_of_a_message(self) -> None:
        """It takes as many lines of the script beside 60 silent clients as beside three."""
        lines = []
        for silent in (3, 60):
            inside = self.inside()
            socks = [self.hello(inside) for _ in range(silent + 1)]
            inside.wait_until_idle()
            executed, calls = inside.executed, len(inside.calls)
            self.assert_echo(socks[0], b"HELLO\n")
            inside.wait_until_idle()
            self.assertNotIn("modify", inside.calls[calls:], "nothing to tell the kernel")
            inside.stop()
            lines.append(inside.executed - executed)
        self.assertGreater(lines[0], 10)
        self.assertLess(lines[1], lines[0] * 1.2)


class BlockingServer(EveryServer):
    name = "blocking"
    banner = "blocking, threads: 1"
    calls = "accept recv send recv shutdown recv recv close"
    iterative = True
    concurrent = ("--threads=100",)
    full = TRIES_AGAIN
    refused = ("--port=many", "--threads=0", "--threads=1001", "--threads=many")
    accepted = (("--threads=1000", "blocking, threads: 1000"),)
    crowd = 50

    def test_threads(self) -> None:
        """Three threads serve three clients at the same time, and the fourth one waits."""
        server = self.start("--threads=3")
        socks = [self.hello(server) for _ in range(3)]
        waits = self.connect(server)
        waits.sendall(b"WAITS\n")
        for sock in socks:
            self.assert_echo(sock, b"STILL INSIDE\n")
        self.assertEqual(select.select([waits], [], [], 0.1)[0], [])
        socks[1].close()
        self.assertEqual(receive(waits, 6), b"WAITS\n")

    def test_no_thread_can_be_started(self) -> None:
        fault = FAULT.format("threading.Thread.start", "RuntimeError('no thread')")
        process = Process(SCRIPTS["blocking"], "--port=0", "--threads=2", prelude=fault)
        line = b"cannot serve on 127.0.0.1:0: no thread\n"
        self.assertEqual(process.result(), (b"", line, 1))

    def test_silent_after_q(self) -> None:
        """A client that stays after its q holds up the next one for a second only."""
        server = self.start()
        stays, waits = self.connect(server), self.connect(server)
        stays.sendall(b"HELLO\nq\n")
        waits.sendall(b"WAITS\n")
        self.assertEqual(receive(waits, 6), b"WAITS\n")
        self.assertEqual(receive(stays), b"HELLO\n")
        server.wait_for_log("closed (timed out)")

    @POSIX
    def test_again_in_the_same_process(self) -> None:
        """Where the process lives on (python -i), the port is free, and the next start logs."""
        run_once = """
import runpy, sys
command = sys.argv
sys.argv = command[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.argv = command
"""
        server = self.start("--threads=3", prelude=run_once)
        self.hello(server)
        server.process.send_signal(signal.SIGINT)
        server.wait_for_log("stopped")
        with self.assertRaises(ConnectionRefusedError):
            self.connect(server)
        eventually(lambda: server.output().count(b"\n") == 2, "a second start", server.said)
        port = re.findall(rb"127\.0\.0\.1:(\d+)", server.output())[1]
        server.address = ("127.0.0.1", int(port))
        for _ in range(3):  # one for each thread, as any of them could be unable to log
            self.hello(server)
        server.wait_for_log(": connected", 4)


class NonblockingServer(ConcurrentServer):
    name = "nonblocking"
    banner = "non-blocking, every 0.01 s"
    calls = BlockingServer.calls
    refused = ("--port=many", "--interval=-0.001", "--interval=3600.1", "--interval=nan")
    accepted = (("--interval=0", "non-blocking, every 0.0 s"),
                ("--interval=3600", "non-blocking, every 3600.0 s"))

    def arguments(self) -> list[Any]:
        return [0.001]

    def test_no_sleep_at_work(self) -> None:
        """It sleeps exactly the interval, and only after a round in which nothing was done."""
        for interval in (0.001, 0):
            inside = self.inside(arguments=[interval])
            sock = self.connect(inside)
            inside.wait_until_idle()
            self.assert_echo(sock, NOISE[:300_000])
            inside.stop()
            rounds = re.split(r"\n(?=accept)", "\n".join(inside.calls))
            self.assertGreater(len(rounds), 5)
            for calls in rounds[:-1]:
                tried, *sleeps = calls.split("\nsleep ")
                idle = tried.startswith("accept would block") and tried.endswith("would block")
                self.assertEqual(sleeps, [str(interval)] if idle and interval else [])


class SelectServer(ConcurrentServer):
    name = banner = "select"
    calls = "wait accept wait recv send wait recv shutdown wait recv wait recv close"

    @LINUX
    def test_1300_clients(self) -> None:
        """It has 1,024 descriptors, not one above: those that it did not open count, too."""
        longest_backlog = int(Path("/proc/sys/net/core/somaxconn").read_text())
        need_files(self, 1500)
        with contextlib.ExitStack() as stack:
            inherited = [stack.enter_context(open(os.devnull, "rb")).fileno() for _ in range(50)]
            server = self.start(files=1400, pass_fds=inherited)
            waiting = min(300, longest_backlog // 2)  # so that all of them fit into the backlog
            self.check_room(server, 1000 + waiting, range(960, 973))

    @LINUX
    def test_512_sockets_on_windows(self) -> None:
        """Windows counts sockets: 511 clients and the listener."""
        server = self.start(prelude="import logging, select, shutil, signal, socket, sys, time\n"
                                    "sys.platform = 'win32'")
        self.check_room(server, 530, range(511, 512), "select: 512 sockets")


@unittest.skipUnless(hasattr(select, "epoll"), "this platform has no epoll")
class EpollServer(ScalableServer):
    name = banner = "epoll"
    calls = SelectServer.calls
    crowd = 10_000

    def test_without_epoll_it_names_another_script(self) -> None:
        process = Process(SCRIPTS["epoll"], prelude="import select; del select.epoll")
        line = b"this platform has no epoll: use selectors_server.py\n"
        self.assertEqual(process.result(), (b"", line, 1))


class SelectorsServer(ScalableServer):
    name = "selectors"
    banner = selectors.DefaultSelector.__name__
    calls = SelectServer.calls
    crowd = 2000
    refused = ("--port=many", "--selector=default", "--selector=best")

    def arguments(self) -> list[Any]:
        return [selectors.DefaultSelector()]

    def test_each_selector(self) -> None:
        for name in ("select", "poll", "epoll", "kqueue", "devpoll"):
            kind = getattr(selectors, f"{name.capitalize()}Selector", None)
            if kind:
                self.assertIn(f" ({kind.__name__})\n", self.start(f"--selector={name}").line)
                self.check_calls(self.inside(arguments=[kind()]))
            else:
                self.assertEqual(Process(SCRIPTS["selectors"], "--selector", name).result()[2], 2)

    @LINUX
    def test_500_clients_of_select(self) -> None:
        server = self.start("--selector=select")
        self.check_room(server, 530, range(500, 501), "500 clients for select")


class AsyncServer(ScalableServer):
    name = "async"
    banner = "asyncio"
    calls = BlockingServer.calls
    full = TRIES_AGAIN
    crowd = 2000


del EveryServer, ConcurrentServer, ScalableServer  # they are no tests themselves


class ConversationRule(Case):
    """The class Conversation of select_server.py: Pages.test_pages shows that all are the same."""

    def test_known(self) -> None:
        """What is received, piece by piece, and at last the reply to the last piece."""
        alike = b"quit\nqq\n q\nQ\nq q\nq \nxq\nq\0\nq\r\r\n\tq\n"  # no q lines
        full = b"x" * 65536  # what one recv() returns at most: then a q alone is not alone
        for pieces, last_reply in (
            ([bytes(range(256)), alike, b"Q"], b"Q"),
            ([b"one\nq\ntwo\n"], b"one\n"),
            ([b"one\nq\nq\ntwo\n"], b"one\n"),
            ([b"a\nq\r", b"\nb"], b""),
            ([b"q"], b""),
            ([b"Iraq", b"\n"], b"\n"),
            ([full, b"q"], b"q"),
            ([full, b"q", b"q"], b""),
            ([full[1:], b"q"], b""),
            ([full[1:] + b"\n", b"q\n"], b""),
        ):
            conversation = load(SCRIPTS["select"]).Conversation()
            replies = [conversation.reply(piece) for piece in pieces]
            self.assertTrue(replies[:-1] == pieces[:-1], pieces[-1])
            self.assertEqual(replies[-1], last_reply)
            self.assertEqual(conversation.finished, last_reply != pieces[-1])
            self.assertLess(len(repr(vars(conversation))), 100, "it keeps a few bytes")

    def test_all_cuts(self) -> None:
        """However a text is split, all comes back but a q line, or the rest of it at its end."""
        new_conversation = load(SCRIPTS["select"]).Conversation
        for text, quit_line in (
            (b"a\n", b"q\n"), (b"", b"q\r\n"), (b"\n\n", b"q\r\n"), (b"Iraq\nx\n", b"q\n"),
            # and those that do not end:
            (b"Iraq\nx", b""), (b"\nqu\n", b""), (b"a\nquit", b""), (b"q\rq\n", b""),
            (b"\rq\n", b""), (b"\r\nq q", b""), (b"qq\nq\t\n", b""),
        ):
            whole = text + quit_line
            for cuts in itertools.product((b"", b"|"), repeat=len(whole) - 1):
                cut = b"".join(bytes([byte]) + mark for byte, mark in zip(whole, [*cuts, b""]))
                pieces = cut.split(b"|")
                if b"q" in pieces:  # a q alone ends it: see test_known
                    continue
                conversation = new_conversation()
                echo = b"".join([conversation.reply(piece) for piece in pieces])
                # What an earlier piece had of the q line has come back.
                early = max(0, len(quit_line) - len(pieces[-1]))
                self.assertEqual(echo, text + quit_line[:early], pieces)
                self.assertEqual(conversation.finished, quit_line != b"", pieces)


# ---- The client

class ClientProcess(Case):
    """client.py as a process. The test plays its server, or starts another one."""

    def setUp(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.listener.close)
        self.listener.settimeout(DEADLINE)
        self.port = self.listener.getsockname()[1]

    def start(self, *options: str, **settings: Any) -> Process:
        return Process(CLIENT, f"--port={self.port}", *options, **settings)

    def start_server(self) -> None:
        self.port = Server(SCRIPTS["select"], "--quiet").port

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        self.addCleanup(sock.close)
        sock.settimeout(DEADLINE)
        return sock

    def serve_once(self, answer: bytes, typed: bytes, **more: Any) -> tuple[bytes, bytes, int]:
        """Answer a client that has sent typed, its stdin; return its result."""
        process = self.start(**more)
        with process.process.stdin as pipe:
            pipe.write(typed)
        sock = self.accept()
        self.received = receive(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(answer)):  # byte by byte, so that nearly each comes alone
            sock.sendall(answer[i : i + 1])
            time.sleep(0.001)
        sock.close()
        return process.result()

    def test_file(self) -> None:
        """Every byte up to a line that is just q comes back, and is written."""
        self.start_server()
        odd = bytes(range(256)) + b"\r\n quit\n q\nqq\nwithout a newline"
        long = b"x" * 70_000 + b"q\n" + b"y" * 65_536 + b"q\nz"  # lines longer than one recv()
        split = b"a" * 65_534 + b"\n"  # one recv() returns this and a q, the next one its newline
        for text, typed in (
            (b"", b""), (odd, odd), (long, long), (b"short\n" * 30_000, b"short\n" * 30_000),
            (split, split + b"q\n"), (b"a" + split, b"a" + split + b"q\n"),
        ):
            output, log, status = self.start().result(typed)
            self.assert_same(output, text)
            self.assertEqual((log, status), (b"", 0))

    def test_q_line(self) -> None:
        """A q line is sent, and not written if it comes back. Anything else is written."""
        for typed, sent, answer, written in (
            (b"one\nq", b"one\nq\n", b"", b""), (b"q\n", b"q\n", b"q\n", b""),
            (b"a\r\nq\r\ntwo", b"a\r\nq\n", b"q", b""), (b"q\n", b"q\n", b"xq\n", b"xq\n"),
            (b"a\nq\n", b"a\nq\n", b"q\n", b""), (b"a\nq\n", b"a\nq\n", b"q", b""),
            (b"a\nq\n", b"a\nq\n", b"q\nbye\n", b"bye\n"),
            (b"a\nq\n", b"a\nq\n", b"\nmore\n", b"\nmore\n"),
        ):
            echo = sent[:-2]
            result = self.serve_once(echo + answer, typed)
            self.assertEqual(result, (echo + written, b"", 0), answer)
            self.assertEqual(self.received, sent)
        for answer in (b"one\nq\n", b"one\nHTTP/1.1 400 Bad Request\r\n"):
            self.assertEqual(self.serve_once(answer, b"one\n"), (answer, b"", 0))

    def test_connection_lost(self) -> None:
        failed = f"conversation with 127.0.0.1:{self.port} failed: ".encode()
        for answer, typed in ((b"one\nt", b"one\ntwo\n"), (b"on", b"one\nq\n")):
            expected = (answer, failed + b"closed by the server\n", 1)
            self.assertEqual(self.serve_once(answer, typed), expected)
        for call, error, said in (
            ("socket.socket.sendall", "OSError('a fault')", failed + b"a fault\n"),
            ("socket.socket.sendall", "MemoryError", failed + b"out of memory\n"),
            ("threading.Thread.start", "MemoryError", failed + b"out of memory\n"),
            ("threading.Thread.start", "RuntimeError('no thread')", b"no thread\n"),
        ):
            result = self.serve_once(b"", b"one\n", prelude=FAULT.format(call, error))
            self.assertEqual(result[1:], (said, 1))
        process = self.start()
        sock = self.accept()
        process.send(b"one\n")
        sock.sendall(receive(sock, 4))
        eventually(lambda: process.output() == b"one\n", "an echo that is written immediately")
        process.send(b"two\n")
        receive(sock, 4)
        reset(sock)
        self.assertRegex(process.result()[1], re.escape(failed) + rb"\[\w+ \d+\] .+\n")

    def test_cannot_connect(self) -> None:
        """One line says why, and what helps; for a crowd, too. A mistake in it has a traceback."""
        self.listener.close()
        cases = [("--host=\udcff", "", r"cannot connect to .+: .+")]
        for host in ("127.0.0.1", "127.0.0.2", "localhost"):
            hint = rf"start one there: python select_server\.py --host {host} --port {self.port}"
            pattern = rf"cannot connect to {host}:{self.port}: \[.+\] .+; {hint}"
            cases.append((f"--host={host}", "", pattern))
        for error, pattern in (
            (f"OSError({errno.EADDRNOTAVAIL}, 'no port')",
             "cannot connect to .+ no port; perhaps no local port is free"),
            ("MemoryError", "cannot connect to .+: out of memory"),
            ("RuntimeError('a bug')", r"Traceback(.*\n)+RuntimeError: a bug"),
        ):
            prelude = FAULT.format("socket.socket.connect", error)
            cases.append(("--host=127.0.0.1", prelude, pattern))
        for (host, prelude, pattern), crowd in itertools.product(cases, ([], ["--clients=50"])):
            output, log, status = self.start(host, *crowd, prelude=prelude).result()
            self.assertRegex(os.fsdecode(log), rf"\A{pattern}\n\Z")
            self.assertEqual((output, status), (b"", 1))
        if os.name == "posix":
            log = self.start("--clients=70", files=64).result()[1]
            self.assertRegex(log, rb"\Acannot .+: \[Errno 24\] .+; first run: ulimit -n 120\n\Z")

    def test_options(self) -> None:
        """The limits of each option are accepted, and what is beyond them is refused."""
        most = 512 if sys.platform == "win32" else 10**6
        for name, low, high in (("port", 1, 65535), ("clients", 1, most), ("messages", 1, 10**9),
                                ("size", 1, 10**9), ("pause", 0, 3600)):
            for value in (low, high):
                self.assertTrue(self.accepts("--clients=2", f"--{name}={value}"), name)
            for wrong in (f"{low - 1}", f"{high + 1}", "nan"):
                self.assertFalse(self.accepts("--clients=2", f"--{name}={wrong}"), name)
        for option in ("--messages=100", "--size=64", "--pause=0"):  # even with its default
            self.assertFalse(self.accepts(option), "it needs --clients")
        shown, log, status = self.start("--help").result()
        self.assertEqual((log, status), (b"", 0))
        for example in ("", " < file", " --clients 100"):  # indented in every Python
            self.assertRegex(shown.decode(), rf"\n    python client\.py{example}  +\w")
        for default in ("127.0.0.1", PORT, 100, 64, 0):
            self.assertIn(f"({default})", shown.decode())

    def accepts(self, *options: str) -> bool:
        """Return whether client.py looks up its server then, or says that there is an error."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                options_of(CLIENT, *options)
            except SystemExit as error:
                self.assertEqual(error.code, 2)
                self.assertIn("error: ", said.getvalue())
                return False
        self.assertEqual(said.getvalue(), "")
        return True

    @LINUX
    def test_large_messages(self) -> None:
        """Messages that fill all buffers come back; the chart is as wide as the terminal."""
        self.start_server()
        options = "--clients=3", "--messages=2", "--size=9000000"
        terminal = self.start(*options, terminal=True, env={**ENVIRONMENT, "COLUMNS": "100"})
        self.assertRegex(terminal.result()[1], rb"\|(-{19}\|){4}\n(.*\n)+6 messages in .*\n"
                                               rb"round-.*\n.* \(3 of 3 clients\): .*\n\Z")

    @LINUX
    def test_not_finished(self) -> None:
        """Clients that end too early are counted. Ctrl-C and SIGTERM show what was seen.

        The progress is shown in a terminal only, and wiped however the run ends.
        """
        for terminal, number, expected in (
            (False, 0, 1), (True, 0, 1), (True, signal.SIGINT, 130), (True, signal.SIGTERM, 143),
        ):
            process = self.start("--clients=3", "--messages=2", terminal=terminal,
                                 stdout=subprocess.PIPE)
            first, second, third = self.accept(), self.accept(), self.accept()
            reset(first)
            third.sendall(receive(third, 64))
            receive(third, 64)
            receive(second, 64)
            if terminal:
                process.wait_for_log(" s: 1 messages")
            else:
                time.sleep(0.8)  # in a terminal, the progress would be shown by then
            if number:
                process.process.send_signal(number)
            else:
                second.close()
                third.close()
            output, log, status = process.result()
            *progress, told = log.decode().split("\r")
            screen = ""  # what a terminal shows before that
            for text in progress:
                screen = text + screen[len(text) :]
            self.assertEqual(screen.strip(), "")
            reason = "interrupted" if number else "closed by the server"
            pattern = rf"\A3 of 3 clients did not finish: .+ \(1\), {reason} \(2\)\n\Z"
            self.assertRegex(told, pattern)
            self.assertRegex(output, rb"\n( +[12]  \.+\n){2} +3  \.*#+\n\n1 messages in ")
            self.assertEqual(status, expected)
        process = self.start("--clients=1", prelude="import sys; sys.stderr = None")  # or 2>&-
        self.accept().close()
        output, log, status = process.result()
        self.assertNotIn(b"did not finish", output)
        self.assertEqual((log, status), (b"", 1))

    @LINUX
    def test_terminal(self) -> None:
        """It prompts and prints the echo; any byte can be typed; q, Ctrl-D or Ctrl-C ends it."""
        for codec, typed, shown, sent, ctrl_c in (
            ("utf-8", b"\x04", b"\n", b"", b""), ("latin-1", b"q\x04\x04", b"q", b"q\n", b""),
            ("utf-8", b"q\n", b"q\n", b"q\n", b""), ("utf-8", b"", b"", b"", b"\n"),
            ("utf-8", b"hi\n", b"hi\n", b"hi\n", b"\n"),
        ):
            environment = {**ENVIRONMENT, "PYTHONIOENCODING": codec}
            terminal = self.start(env=environment, terminal=True)
            sock = self.accept()
            terminal.expect(b">>> ")
            for line in b"hello\n", b"\n", b"gr\xc3\xbcn \xff\xe4\n", b"no newline":
                terminal.send(line if line.endswith(b"\n") else line + b"\x04\x04")
                terminal.expect(line)
                sock.sendall(receive(sock, len(line) - 1))
                terminal.wait_until_idle()  # for the last byte
                sock.sendall(receive(sock, 1))
                terminal.expect(line + b">>> ")
            terminal.send(typed)
            terminal.expect(shown)
            self.assertEqual(receive(sock, len(sent)), sent)
            if ctrl_c:
                terminal.wait_until_idle()
                terminal.process.send_signal(signal.SIGINT)
            result = terminal.result()
            self.assertEqual(result, (b"", terminal.expected + ctrl_c, 0))
            self.assertEqual(receive(sock), b"")
        terminal = self.start(terminal=True)
        terminal.send(b"hello\n")
        sock = self.accept()
        sock.sendall(receive(sock, 6)[:3])
        sock.close()
        self.assertRegex(terminal.result()[1], rb"conversation .+ failed: closed by the server\n")

    @LINUX
    def test_pipes(self) -> None:
        """Much passes in little memory, also if another program left the pipes non-blocking."""
        self.start_server()
        process = self.start(terminal=True, stdout=subprocess.PIPE)  # half a terminal is a pipe
        process.send(b"hello\nq\n")
        self.assertEqual(process.result()[0], b"hello\n")
        process = self.start(terminal=True, stdin=subprocess.PIPE)
        self.assertEqual(process.result(b"hello\nq\n")[1], b"hello\n")
        data = b"x" * (32 << 20) + b"\n"
        (source, fill), (sink, drain) = socket.socketpair(), socket.socketpair()
        with source, fill, sink, drain:
            for sock in (source, fill, sink, drain):
                sock.settimeout(DEADLINE)  # which makes it non-blocking
            process = self.start(stdin=source, stdout=sink)
            threading.Thread(target=fill.sendall, args=(data,)).start()
            self.assert_same(receive(drain, len(data)), data)
            status = Path(f"/proc/{process.process.pid}/status").read_text()
            self.assertRegex(status, r"VmHWM:\s+[12]?\d{4} kB")
            process.wait_until_idle()
            process.process.send_signal(signal.SIGINT)
            self.assertEqual(process.result(), (b"", b"\n", 130))

    @LINUX
    def test_streams(self) -> None:
        """What cannot be read, or written, is named; closed streams are like empty ones."""
        self.start_server()
        with open(os.devnull, "rb") as readable, open(os.devnull, "wb") as writable:
            for options, unreadable in (([], rb"cannot read stdin: .+\n"), (["--clients=2"], b"")):
                for more, pattern in (({"stdout": readable}, rb"cannot write to stdout: .+\n"),
                                      ({"stdin": writable}, unreadable),
                                      ({"prelude": "import sys; sys.stdin = None"}, b""),
                                      ({"prelude": "import sys; sys.stdout = None"}, b"")):
                    _, log, status = self.start(*options, **more).result(b"hello\n")
                    self.assertRegex(log, rb"\A" + pattern + rb"\Z")
                    self.assertEqual(status, 1 if pattern else 0)


class Clock(selectors.SelectSelector):
    """A clock, and a selector that moves it on to the next event: every time is exact."""

    now = 100.0
    selects = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.selects += 1
        if self.selects > 2000:
            raise AssertionError("select() is called again and again")
        events: list[tuple[Any, selectors.SelectorKey]] = [
            (key.fileobj, key) for key in self.get_map().values()]
        ready_at = [peer.ready_at(key.events) for peer, key in events]
        self.now = max(self.now, min(self.now + (timeout or 0), *ready_at))
        return [(key, key.events) for (_, key), time in zip(events, ready_at) if time <= self.now]


class Peer:
    """A socket of the client, with a server that answers each send() after 0.1 s."""

    connects_in = 0.0  # seconds
    connect_error = 0
    room = 1 << 30  # bytes that send() takes
    send_takes = 0.0  # seconds
    answer: Any = staticmethod(lambda part: [part])  # bytes, or an error for recv()
    end: Any = (b"",)  # what answers shutdown()
    errors: Any = None  # {1: error, ...} of the first, ... call of send() or shutdown()

    def __init__(self, clock: Clock, **faults: Any) -> None:
        vars(self).update(faults)
        self.clock = clock
        self.connected_at = clock.now + self.connects_in
        self.calls: list[tuple[float, Any]] = []
        self.inbox: list[tuple[float, Any]] = []
        self.buffers: list[object] = []  # that send() has got parts of
        self.setblocking = self.close = mock.Mock()
        self.connect = mock.Mock(side_effect=BlockingIOError)
        self.getsockopt = mock.Mock(return_value=self.connect_error)
        self.fileno = mock.Mock(return_value=id(self))

    def ready_at(self, events: int) -> float:
        if events & selectors.EVENT_WRITE:
            return self.connected_at
        return float(self.inbox[0][0]) if self.inbox else 1e9

    def note(self, argument: object) -> None:
        self.calls.append((round(self.clock.now, 6), argument))
        if self.errors and len(self.calls) in self.errors:
            raise self.errors[len(self.calls)]

    def send(self, data: bytes) -> int:
        part = bytes(data[: self.room])
        self.buffers.append(memoryview(data).obj)
        self.note(part)
        self.inbox += [(self.clock.now + 0.1, answer) for answer in self.answer(part)]
        self.clock.now += self.send_takes
        return len(part)

    def shutdown(self, how: int) -> None:
        self.inbox += [(self.clock.now + 0.1, answer) for answer in self.end]
        self.note(how)  # the end comes even if this fails

    def recv(self, size: int) -> Any:
        if not self.inbox or self.inbox[0][0] > self.clock.now:
            raise BlockingIOError
        _, answer = self.inbox.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


class ClientInside(Case):
    """A crowd inside the test, where every time and every error is exact."""

    def run_peers(self, *peers: dict[str, Any], messages: int = 2, size: int = 64,
                  pause: float = 0) -> Any:
        """Run a client for each of these peers; return the clients. Raise what run() raises."""
        clock = Clock()
        made = [Peer(clock, **peer) for peer in peers]
        with mock.patch("socket.socket", side_effect=made), \
             mock.patch("time.perf_counter", lambda: clock.now), \
             mock.patch("selectors.DefaultSelector", return_value=clock):
            module = load(CLIENT)
            numbers = range(1, len(made) + 1)
            clients = [module.Client(number, messages, size, pause) for number in numbers]
            module.run(clients, ("127.0.0.1", 8088), clock.now)
        for one, peer in zip(clients, made):
            peer.close.assert_called_with()
            self.assertTrue(one.problem or not peer.inbox, "it reads to the end of the stream")
        return clients

    def test_messages(self) -> None:
        """All messages differ, as far as their size allows, and have just this size."""
        for size, different in ((1, 1), (2, 9), (15, 24), (64, 24), (100_000, 24)):
            sent = []
            for one in self.run_peers({}, {}, messages=12, size=size):
                messages = [data for _, data in one.sock.calls]
                self.assertEqual(messages[12:], [b"q\n", socket.SHUT_WR])
                sent += messages[:12]
            self.assertEqual({(len(x), x.find(b"\n")) for x in sent}, {(size, size - 1)})
            self.assertEqual(len(set(sent)), different)
        [one] = self.run_peers({"room": 10}, messages=1)
        copies = {id(buffer) for buffer in one.sock.buffers}
        self.assertEqual(len(copies), 2, "the message and the q: no rest is copied")

    def test_times(self) -> None:
        """A round trip ends with the echo. Then comes the pause, except after the last one."""
        peer = {"connects_in": 1, "send_takes": 0.5}
        [one] = self.run_peers(peer, messages=3, pause=1.97)
        self.assertEqual([round(seconds, 6) for seconds in one.round_trips], [0.5] * 3)
        times = [when for when, _ in one.sock.calls]
        self.assertEqual(times, [101, 103.47, 105.94, 106.44, 106.94])
        self.assertEqual(round(one.first_echo_at, 6), 101.5)
        self.assertEqual(round(one.closed_at, 6), 107.04)
        many = self.run_peers({}, messages=500)[0].round_trips
        self.assertLess(sys.getsizeof(many), 500 * 12, "8 bytes each, and room to grow")
        self.assertFalse(any(isinstance(thing, float) for thing in gc.get_referents(many)))

    def test_problems(self) -> None:
        """Each client has the problem that it met, wherever it met it; the others go on."""
        closed, differs = "closed by the server", "the echo differs"
        for name in ("ETIMEDOUT", "EHOSTUNREACH", "ENOBUFS", "ECONNRESET", "EPIPE"):
            number = getattr(errno, name)
            error = OSError(number, os.strerror(number))
            table: list[tuple[str, dict[str, Any]]] = [
                ("", {}), ("", {"answer": lambda part: [part[:1], part[1:]]}),
                ("", {"room": 10, "errors": {4: BlockingIOError()}}),  # a full send buffer
                ("", {"end": (b"x" * 99, b"y", b"")}),  # after the q anything may come
                (closed, {"answer": lambda part: [part, b""]}),
                (differs, {"answer": lambda part: [part[:-1] + b"x"]}),
                (differs, {"answer": lambda part: [part + b"\n"]}),
                (differs, {"answer": lambda part: [part, b"x"]}),
                (differs, {"answer": lambda part: [part[:1], part[:1]]}),
                (str(error), {"answer": lambda part, error=error: [error]}),
                (str(error), {"answer": lambda part, error=error: [part, error]}),
                (str(error), {"end": (error,)}), (str(error), {"errors": {2: error}}),
                (str(error), {"errors": {3: error}}),  # of the q
                (str(error), {"errors": {4: OSError("shutdown")}, "end": (error,)}),
                (str(error), {"connects_in": 0.5, "connect_error": number}),
            ]
            clients = self.run_peers(*(faults for _, faults in table), pause=60)
            found = [str(one.problem or "") for one in clients]
            self.assertEqual(found, [problem for problem, _ in table])
            self.assertLess(clients[4].closed_at, 102, "the pause ends with the connection")

    def test_none_can_connect(self) -> None:
        """If all are refused, run() says so. One that is reset early does not end the others."""
        refused, reset_early = ({"connect_error": number} for number in (
            errno.ECONNREFUSED, errno.ECONNRESET))
        with self.assertRaises(ConnectionRefusedError):
            self.run_peers(refused, {**refused, "connects_in": 0.5})
        early, late = self.run_peers(reset_early, {"connects_in": 9})
        self.assertIsInstance(early.problem, ConnectionResetError)
        self.assertIsNone(late.problem)
        with mock.patch("sys.platform", "win32"), \
             mock.patch("ctypes.FormatError", {10061: "The words of Windows."}.get, create=True), \
             self.assertRaisesRegex(OSError, r"The words of Windows\Z"):
            self.run_peers({"connect_error": 10061})

    def test_chart(self) -> None:
        """A row for each client, never empty: dots until its first echo, then # until its end."""
        picture = """. waiting for its first echo   # being served

client  0            1            2            3            4 s
        |------------|------------|------------|------------|
     1  ........##################
     2  ...................................................#
     3  .......................................
     4  #
     5  ."""
        spans = [(0.6, 2.0), (4.0, 4.0), (0.0, 3.0), (0.001, 0.001), (0.0, 0.001)]
        self.assertEqual(client.chart(spans, 72), picture)
        for width, half in ((74, 26), (120, 50), (200, 50), (0, 20)):
            row = client.chart([(1800.0, 3600.0)], width).splitlines()[-1]
            self.assertEqual(row, "     1  " + "." * half + "#" * half)
        of_41 = [1, 3, 5, 7, 9, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 33, 35, 37, 39, 41]
        for number, expected in ((41, of_41), (20, [*range(1, 21)]), (3, [1, 2, 3]), (1, [1])):
            picture = client.chart([(1.0, 2.0)] * number, 72)
            self.assertEqual([int(row) for row in re.findall(r"(?m)^ +(\d+)  ", picture)], expected)
            told = f"\n20 of the {number} clients, evenly spaced\n" in picture
            self.assertEqual(told, number > 20)

    def test_figures(self) -> None:
        times = [2.5] + [0.05] * 9 + [0.003] + [0.002] * 399 + [0.001] * 600
        spans = [(0.3, 0.5), (0.0, 1.0), (1.2, 2.0), (0.1, 1.5)]
        expected = """1,010 messages in 2 s: 505 per second
round-trip time: median 1.00 ms, 99th percentile 3.00 ms, maximum 2,500.00 ms
first echo after the start (3 of 4 clients): median 300.00 ms, maximum 1,200.00 ms"""
        self.assertEqual(client.figures(times, spans), expected)
        self.assertEqual(client.figures([], [(0, 0.5)]), "0 messages in 0.5 s: 0 per second")
        for number, percentile in ((1, 1), (99, 99), (100, 99), (101, 100), (200, 198)):
            text = client.figures([i / 1000 for i in range(number, 0, -1)], [(1, 1)])
            self.assertIn(f"99th percentile {percentile:.2f} ms", text)


# ---- The pages

class Pages(Case):
    def test_pages(self) -> None:
        """Each stands alone, with its model in front; sections "the same in ..." are the same."""
        waits = {"blocking": "listener.accept()", "nonblocking": "connection.handle()",
                 "select": "select.select(readers, writers", "epoll": "in epoll.poll()",
                 "selectors": "in selector.select()", "async": "loop.sock_accept(listener"}
        pages = {name: SCRIPTS[name].read_text("utf-8-sig") for name in NAMES}
        shared: dict[str, dict[str, str]] = {}  # the texts by title and by server
        for name, page in pages.items():
            _, *parts = re.split(r"(?m)^# ---- (.+)\n", page)  # titles and texts, by turns
            self.assertEqual(parts[0], "The model", name)
            self.assertLess(page.index(waits[name]), len(page) / 2, name)
            self.assertIn(f"\n    python {name}_server.py  ", page)
            self.assertEqual(re.findall(r"(?m)^RECV_SIZE = (\w+)", page), ["65536"], name)
            modules = set(re.findall(r"(?m)^ *(?:import|from) (\w+)", page))
            self.assertLessEqual(modules, getattr(sys, "stdlib_module_names", modules), name)
            for title, text in zip(parts[::2], parts[1::2]):
                if ": the same in " in title:
                    shared.setdefault(title, {})[name] = text
        for title, texts in shared.items():
            servers = title.partition(": the same in ")[2]
            named = NAMES if servers == "all servers" else re.findall(r"\b(?!and\b)\w+", servers)
            self.assertEqual(list(texts), list(named), title)
            for name, text in texts.items():
                self.assertEqual(text, texts["select"], f"{title}: {name} and select differ")
        self.assertEqual(len(shared), 2, "A client, and The conversation")
        self.assertEqual(re.findall(r"Read next: (\w+)_server", "".join(pages.values())),
                         list(NAMES[1:]))


# ---- README.md

class Readme(Case):
    # A prelude: the program listens on a free port, and says which.
    free_port = """
import socket
listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
print("listening on {}:{} (README)".format(*listener.getsockname()), flush=True)
socket.create_server = lambda address: listener
"""

    def setUp(self) -> None:
        self.text = (HERE / "README.md").read_text("utf-8-sig")
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.programs = {}  # by their names, which are the last ones before them
        for before, program in re.findall(r"(?s)(.*?)```python\n(.*?)```", self.text):
            name = re.findall(r"\w+\.py", before)[-1]
            self.programs[name] = self.folder / name
            self.programs[name].write_text(program, "utf-8")

    def start(self, name: str, prelude: str = "", files: int = 0) -> Server:
        """Start a program of the README."""
        prelude = SMALL_BUFFERS + self.free_port + prelude
        return Server(self.programs[name], prelude=prelude, files=files)

    def test_programs(self) -> None:
        """Each program serves client.py and, unless it blocks, several clients at a time."""
        self.assertEqual(self.text.count(f'("127.0.0.1", {PORT})'), len(self.programs))
        for name in self.programs:
            if name in ("bare_epoll.py", "signal_server.py") and not hasattr(signal, "sigwaitinfo"):
                continue  # they need CPython on Linux
            with self.subTest(name):
                prelude = ""
                if name == "signal_server.py":  # and the queue of signals is soon full
                    prelude = "from resource import *\nsetrlimit(RLIMIT_SIGPENDING, (2, 2))\n"
                server = self.start(name, prelude)
                crowd = Process(CLIENT, f"--port={server.port}", "--clients=10", "--messages=20")
                self.assertEqual(crowd.result()[1:], (b"", 0), server.log()[-500:])
                with connect(server.address) as first, connect(server.address) as second:
                    first.sendall(b"first\n")
                    self.assertEqual(receive(first, 6), b"first\n")
                    second.sendall(b"second\n")
                    patience = 0.1 if name == "bare_blocking.py" else DEADLINE
                    echoes = select.select([second], [], [], patience)[0]
                    self.assertEqual(echoes, [] if name == "bare_blocking.py" else [second])
                    if name == "loop_by_hand.py":  # the client reads late
                        data = flood(first)
                        self.assert_same(receive(first, len(data)), data)
                    if name in ("loop_by_hand.py", "signal_server.py"):
                        reset(second)  # which the others do not survive
                    first.sendall(b"x" * 1000)
                    self.assertEqual(receive(first, 1000), b"x" * 1000)

    @LINUX
    def test_misbehaving_clients(self) -> None:
        """They break bare_select.py as the README says, and select_server.py survives them."""
        need_files(self, 1300)
        shown = re.findall(r'(?m)^    python -c "(.+)"$', self.text)
        resets = next(code for code in shown if "s.recv(1)" in code)
        never_reads = next(code for code in shown if "10**8" in code)
        errors = dict(re.findall(r"(?m)^\| (\d)\. `(.+?)`", self.text))
        self.assertEqual(sorted(errors), ["1", "3", "4"], "the second one makes it block")
        for number, code, files, clients in (("1", resets, 0, 0), ("2", never_reads, 0, 0),
                                             ("3", "pass", 64, 100), ("4", "pass", 2000, 1100)):
            for bare in (True, False):
                with self.subTest(number, bare=bare), contextlib.ExitStack() as stack:
                    server = self.start("bare_select.py", files=files) if bare else \
                        Server(SCRIPTS["select"], files=files)
                    sock = stack.enter_context(connect(server.address))
                    self.assertFalse(is_silent(sock))
                    other = Process(Path("-c"), code.replace(str(PORT), str(server.port)))
                    if "input()" not in code:
                        other.result()
                    with contextlib.suppress(ConnectionError):  # the server may have ended
                        for _ in range(clients):
                            stack.enter_context(connect(server.address)).sendall(b"HELLO\n")
                    if not bare:
                        server.wait_until_idle()
                        self.assertFalse(is_silent(sock))
                        self.assertNotIn("Traceback", server.log())
                    elif number in errors:
                        self.assertIn(errors[number].encode(), server.result()[1])
                    else:
                        eventually(functools.partial(is_silent, sock), "a server that blocks")
                    server.kill()

    def test_commands(self) -> None:
        """Each script exists, or is made by cp, and knows its options; some numbers matter."""
        copies = {new: old for old, new in re.findall(r"cp (\w+\.py) (\w+\.py)", self.text)}
        commands = re.findall(r"python3? (\w+\.py)((?: +-?[\w.=/-]+)*)", self.text)
        self.assertGreater(len(commands), 30)
        for script, options in commands:
            script = copies.get(script, script)
            with self.subTest(f"{script}{options}"):
                if script in self.programs:
                    self.assertEqual(options, "")
                elif script != "test_all.py":
                    args = options_of(HERE / script, *options.split())
                    if "--size" in options:
                        self.assertGreater(args.size, 4 * 65536, "bytes: more than a recv() takes")
                    if script == "client.py" and (args.clients or 0) > 1000:
                        self.assertGreater(args.clients, 1024, "more than select() can watch")
                        seconds = args.pause * (args.messages or 100)
                        self.assertGreater(seconds, 3, "they stay")
                elif options.strip() != "--benchmark":
                    unittest.defaultTestLoader.loadTestsFromNames(
                        options.split(), sys.modules[__name__])
        silent = re.findall(r"create_connection.* for _ in range\((\d+)\)\]; input\(\)", self.text)
        self.assertEqual(silent, ["900"])

    def test_ports_agree(self) -> None:
        for path in [*SCRIPTS.values(), CLIENT, HERE / "README.md"]:
            # But the port of a client: "127.0.0.1:44658: connected", or in the output of ss.
            text = re.sub(r".*ESTAB.*|127\.0\.0\.1:\d+: [cr]", "", path.read_text("utf-8-sig"))
            ports = re.findall(r"(?:127\.0\.0\.1['\"]?[:, ] ?|port |port = )(\d\d+)", text)
            self.assertLessEqual(set(ports), {str(PORT)}, path.name)

    def test_break_it(self) -> None:
        """Each test of the table fails in a copy with the change, and passes without it."""
        row = r"(?m)^\| `(\w+\.py)` \| `(.+?)` \| `(.+?)` \| .+ \| (none: )?`(.+)` \|$"
        rows = re.findall(row, self.text)
        all_rows = re.findall(r"(?m)^\| `(\w+_server\.py)` \|", self.text)
        self.assertEqual([script for script, *_ in rows], all_rows, "rows of this form")
        self.assertGreater(len(rows), 10)
        unchanged = ("select_server.py", "log", "log", "none", " ".join({row[4] for row in rows}))
        with ThreadPoolExecutor(3) as pool:
            changes = [unchanged, *rows]
            for (*change, passes, _), log in zip(changes, pool.map(self.log_of_copy, changes)):
                with self.subTest(change):
                    self.assertNotIn("SyntaxError", log)
                    if "OK (skipped" not in log:
                        self.assertRegex(log, r"\nOK\n\Z" if passes else r"\nFAILED \(.+\n\Z")

    def log_of_copy(self, row: tuple[str, ...]) -> str:
        """Run the tests of a row in a copy of this folder, with its change; return their log."""
        script, old, new, _, tests = row
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for path in (*HERE.glob("*.py"), HERE / "README.md"):
            shutil.copy(path, folder)
        text = (folder / script).read_text("utf-8-sig")
        if old != new:
            self.assertEqual(text.count(old), 1, f"{old} in {script}")
        (folder / script).write_text(text.replace(old, new), "utf-8")
        deadline = str(DEADLINE if old == new else 2)
        run = Process(folder / "test_all.py", *tests.split(),
                      env={**ENVIRONMENT, "TEST_DEADLINE": deadline})
        run.process.wait(60)
        return run.log()


def is_silent(sock: socket.socket) -> bool:
    """Return whether the server has no echo within 0.3 seconds."""
    sock.sendall(b"HELLO\n")
    return not select.select([sock], [], [], 0.3)[0] or receive(sock, 6) != b"HELLO\n"


def options_of(script: Path, *options: str) -> Any:
    """Run a script until it uses the network; return the options that it has read."""
    parsed: list[Any] = []
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_keep(parser: argparse.ArgumentParser) -> Any:
        parsed.append(parse_args(parser))
        return parsed[0]

    with mock.patch.object(sys, "argv", [script.name, *options]), \
         mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_keep), \
         mock.patch("socket.gethostbyname", side_effect=StopIteration), \
         mock.patch("socket.socket", side_effect=StopIteration), \
         mock.patch("logging.basicConfig"), mock.patch("signal.signal"), \
         contextlib.suppress(StopIteration):
        load(script).main()
    return parsed[0]


# ---- The measurement

CLIENTS, MESSAGES, SIZE = 100, 200, 64
FEW, FEW_MESSAGES, SILENT = 10, 2000, 900
RUNS = 3
MEASURED = ("blocking", "blocking --threads 1000", "nonblocking", "select", "epoll", "selectors",
            "selectors --selector poll", "async")
HEAD = f"""\
{CLIENTS} clients send {MESSAGES} messages of {SIZE} bytes each, the next one after the echo
(99%: the 99th percentile). CPU idle: while {CLIENTS} clients are silent. Last column: the server's
CPU time per message; {FEW} clients send {FEW_MESSAGES} messages each, beside {SILENT} silent ones.
All but CPU idle: medians of {RUNS} runs.
                            messages  round-trip  longest wait   CPU per    CPU     CPU per
                          per second  time (99%)  (first echo)   message   idle     message"""


class Figures(NamedTuple):
    """What one run, or the medians of some, have shown."""

    rate: float  # messages per second
    slow: float  # seconds: the 99th percentile of the round-trip times
    first: float  # seconds: the longest wait for a first echo
    cpu: float  # seconds of the server's CPU time per message


def measure(server: Server, clients: int, messages: int) -> Figures:
    """Return the medians of some runs. Raise OSError if a client fails."""
    runs = []
    for _ in range(RUNS):
        crowd = [client.Client(number, messages, SIZE, 0) for number in range(1, clients + 1)]
        cpu, start = server.cpu(), time.perf_counter()
        client.run(crowd, server.address, start)
        cpu = server.cpu() - cpu
        if problems := [one.problem for one in crowd if one.problem]:
            raise OSError(f"{len(problems)} of {clients} clients failed: {problems[0]}")
        times = sorted(seconds for one in crowd for seconds in one.round_trips)
        runs.append(Figures(
            rate=len(times) / (max(one.closed_at for one in crowd) - start),
            slow=times[(len(times) * 99 - 1) // 100],
            first=max(one.first_echo_at for one in crowd) - start,
            cpu=cpu / len(times)))
    return Figures(*[statistics.median(figures) for figures in zip(*runs)])


@contextlib.contextmanager
def running(name: str, silent: int) -> Iterator[Server]:
    """Start a server, a name with options, and silent clients; then end both. Raise OSError."""
    script, *options = name.split()
    server = Server(SCRIPTS[script], "--quiet", *options)
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        for number in range(1, silent + 1):
            sock = stack.enter_context(connect(server.address))
            if number % 100 == 0 and name != "blocking":  # wait until all so far are accepted
                sock.sendall(b"HELLO\n")
                receive(sock, 6)
        yield server
        connect(server.address).close()  # it is still there


def table_row(name: str) -> str:
    """Measure a server, a name with its options; return its figures as a row of the table."""
    with running(name, CLIENTS) as server:
        idle = server.uses_cpu(1)
    with running(name, 0) as server:
        busy = measure(server, CLIENTS, MESSAGES)
    row = f"{name:26}{busy.rate:12,.0f}{busy.slow * 1000:9.1f} ms{busy.first * 1000:11,.1f} ms"
    row += f"{busy.cpu * 1e6:7.1f} us{idle:7.1%}"
    if name == "blocking":
        return f"{row}  one at a time"
    never_sleep = " --interval 0" if name == "nonblocking" else ""
    with running(name + never_sleep, SILENT) as server:
        row += f"{measure(server, FEW, FEW_MESSAGES).cpu * 1e6:9.1f} us{never_sleep}"
    return row.replace("nan us", "     -").replace("nan%", "   -")  # not on Linux


def benchmark(names: tuple[str, ...] = MEASURED) -> None:
    """Measure servers; print each row, or why there is none, as soon as it is known."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        print(f"Python {platform.python_version()}, {platform.platform()}, cores: {cores}")
        print(HEAD, flush=True)
        for name in names:
            try:
                row = table_row(name)
            except (AssertionError, OSError, RuntimeError) as error:
                row = f"{name:26}  {str(error).strip().splitlines()[-1]}"
            print(row, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stdout = None  # otherwise Python would try to write again at exit
        sys.exit("cannot write to stdout")


class Benchmark(Case):
    def test_figures(self) -> None:
        """Known times give known figures, and each client sends what the head says."""
        seen: list[Any] = []

        def run(crowd: list[client.Client], address: object, start: float) -> None:
            pace = (1, 2, 9)[len(seen)]  # the median is 2
            seen.append((len(crowd), crowd[0].messages, crowd[0].size, crowd[0].pause, address))
            for one in crowd:
                one.sock.close()
                one.closed_at = start + pace * (5 if one.number == 7 else 1)
                one.first_echo_at = start + pace * (0.3 if one.number == 3 else 0.1)
                one.round_trips = array("d", [pace * i / 1000 for i in range(one.messages)])

        server = mock.Mock(address="address", **{"cpu.side_effect": [0, 1, 10, 12, 20, 29]})
        with mock.patch("client.run", run):
            figures = measure(server, 10, 100)
        self.assertEqual(seen, [(10, 100, SIZE, 0, "address")] * RUNS)
        self.assertAlmostEqual(figures.rate, 1000 / (2 * 5))
        self.assertAlmostEqual(figures.slow, 2 * 98 / 1000)  # not 99, the maximum
        self.assertAlmostEqual(figures.first, 2 * 0.3)
        self.assertAlmostEqual(figures.cpu, 2 / 1000)

    @LINUX
    def test_rows(self) -> None:
        """Figures that are possible, measured with few clients, below their heads."""
        small: dict[str, Any] = {
            "CLIENTS": 5, "MESSAGES": 20, "FEW": 2, "FEW_MESSAGES": 300, "SILENT": 20}
        spied = mock.Mock(wraps=running)
        with mock.patch.multiple(__name__, running=spied, **small), \
             contextlib.redirect_stdout(io.StringIO()) as output:
            benchmark(("select", "nonblocking", "blocking", "blocking --threads 0"))
        self.assertEqual(RUNNING, set(), "all servers have been ended")
        calls = [call.args for call in spied.call_args_list[:6]]
        self.assertEqual(calls, [("select", 5), ("select", 0), ("select", 20), ("nonblocking", 5),
                                 ("nonblocking", 0), ("nonblocking --interval 0", 20)])
        *_, select_row, nonblocking, blocking, refused, _ = output.getvalue().split("\n")
        figure = r" +([\d,.]+)"
        row = rf"{figure}{figure} ms{figure} ms{figure} us{figure}%"
        self.assertRegex(select_row, rf"\Aselect{row}{figure} us\Z")
        self.assertRegex(nonblocking, rf"\Anonblocking{row}{figure} us --interval 0\Z")
        self.assertRegex(blocking, rf"\Ablocking{row}  one at a time\Z")
        self.assertRegex(refused, r"\Ablocking --threads 0 .*--threads must be from 1 to 1000\Z")
        self.assertIn(HEAD, output.getvalue())
        cpu, idle, beside = re.findall(r"([\d.]+)(?: us|%)", select_row)
        self.assertLess(float(idle), 5)
        self.assertTrue(1 < float(cpu) < 1000 and 1 < float(beside) < 1000, "microseconds")

    def test_every_server_of_the_readme_has_a_row(self) -> None:
        text = (HERE / "README.md").read_text("utf-8-sig")
        table = text.partition("test_all.py --benchmark")[2].partition("</details>")[0]
        for name in NAMES:
            self.assertIn(f"`{name}`", table)
        for name in re.findall(r"`((?:\w+ )?--(?:threads|selector) \w+|\w+)`", table):
            self.assertIn(name, [*MEASURED, *(row.partition(" ")[2] for row in MEASURED)])

    @POSIX
    def test_end(self) -> None:
        """Ctrl-C, and a reader that has left, end it with one line. -h names it."""
        script = HERE / "test_all.py"
        measuring = Process(script, "--benchmark")
        eventually(lambda: HEAD.encode() in measuring.output(), "the head of the table")
        measuring.process.send_signal(signal.SIGINT)
        self.assertEqual(measuring.result()[1:], (b"interrupted\n", 130))
        ours, theirs = os.pipe()
        os.close(ours)
        measuring = Process(script, "--benchmark", stdout=theirs)
        os.close(theirs)
        self.assertEqual(measuring.result(), (b"", b"cannot write to stdout\n", 1))
        self.assertIn(b"--benchmark", Process(script, "-h").result()[0])

    @POSIX
    def test_nothing_is_left_running(self) -> None:
        """A signal to the tests alone ends the servers that they have started, too."""
        code = "import test_all as t, time; t.setUpModule(); " \
            "print(t.Server(t.SCRIPTS['select']).port, flush=True); time.sleep(60)"
        for number in (signal.SIGINT, signal.SIGTERM):
            tests = Process(Path("-c"), code, cwd=HERE)
            eventually(tests.output, "the port of a server", tests.log)
            tests.process.send_signal(number)
            with self.assertRaises(ConnectionRefusedError):
                connect(("127.0.0.1", int(tests.result()[0])))


# ---- The tools: serve() in a thread of this process

class Inside:
    """A server in a thread: for faults that are injected, and for calls that are counted.

    Its listener and its clients' sockets are spies. calls has what was called, in order, with the
    number of the client: "accept", "recv 1", "send 1", "recv 1 would block", "wait" ...
    """

    def __init__(self, name: str, arguments: list[Any], accept_errors: list[Any]) -> None:
        self.script = str(SCRIPTS[name])
        self.polls = name in ("nonblocking", "async")  # its calls may raise BlockingIOError
        self.accept_errors = accept_errors
        self.no_address = False  # accept() returns no address
        self.calls: list[str] = []
        self.pauses: list[float] = []  # of half a second or more: they are made short
        self.executed = 0  # lines of the script: a loop over all clients counts each of them
        self.sockets: list[Spy] = []  # the server's end of each client
        self.lines: list[str] = []  # of the log
        self.mistakes: list[Exception] = []  # exceptions that nobody caught
        self.hold = threading.Lock()  # a test that has it holds the server at its next call
        self.stopped = False
        self.listener = Spy(self, 0)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)  # soon full
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)  # several recv()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.address = self.listener.getsockname()
        self.arguments = [self.spied_waiter(argument) if hasattr(argument, "modify") else argument
                          for argument in arguments]
        self.patches = contextlib.ExitStack()
        self.patch("threading.excepthook", lambda thread: self.keep_mistake(thread.exc_value))
        self.patch("time.sleep", self.sleep)
        self.patch("select.select", functools.partial(self.call, "wait", select.select))
        if hasattr(select, "epoll"):
            new_epoll = select.epoll
            self.patch("select.epoll", lambda: self.spied_waiter(new_epoll()))
        if resource:
            self.patch("resource.setrlimit", mock.Mock())  # it would be the test's limit
        self.module = load(SCRIPTS[name])
        self.module.log.setLevel(logging.INFO)
        self.module.log.propagate = False
        self.module.log.handle = lambda record: self.lines.append(record.getMessage())
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def patch(self, name: str, replacement: object) -> None:
        self.patches.enter_context(mock.patch(name, replacement))

    def run(self) -> None:
        sys.settrace(self.count_line)
        result = self.module.serve(self.listener, *self.arguments)
        if asyncio.iscoroutine(result):
            with contextlib.closing(asyncio.SelectorEventLoop()) as loop:
                loop.set_exception_handler(lambda _, what: self.keep_mistake(what.get("exception")))
                vars(loop)["call_later"] = functools.partial(self.call_later, loop.call_later)
                loop.run_until_complete(result)

    def keep_mistake(self, error: object) -> None:
        if isinstance(error, Exception):  # not SystemExit: see pass_hold
            self.mistakes.append(error)

    def count_line(self, frame: Any, _: str, __: object) -> Any:
        if frame.f_code.co_filename == self.script:
            self.executed += 1
            return self.count_line
        return None

    def call(self, name: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call a function for the server and note it. End the thread if the test is over."""
        if threading.current_thread() is not self.thread:
            return function(*args, **named)
        self.pass_hold()
        try:
            result = function(*args, **named)
        except BlockingIOError:
            self.calls.append(f"{name} would block")
            raise
        self.calls.append(name)
        self.pass_hold()
        return result

    def pass_hold(self) -> None:
        with self.hold:
            if self.stopped:
                sys.exit()  # passes each `except`, and ends a thread without a word

    def spied_waiter(self, waiter: Any) -> Any:
        """Return an epoll object or a selector that notes the calls that wait or modify."""
        spied = mock.Mock(wraps=waiter)
        for method, name in (("select", "wait"), ("poll", "wait"), ("modify", "modify")):
            if hasattr(waiter, method):
                setattr(spied, method, functools.partial(self.call, name, getattr(waiter, method)))
        spied.__class__ = type(waiter)  # for isinstance()
        return spied

    def sleep(self, seconds: float, real_sleep: Callable[[float], None] = time.sleep) -> None:
        if threading.current_thread() is self.thread:
            if seconds >= 0.5:
                self.pauses.append(seconds)
            self.call(f"sleep {seconds}", real_sleep, 0.001)
        else:
            real_sleep(seconds)

    def call_later(self, function: Callable[..., Any], seconds: float, *args: Any,
                   **named: Any) -> Any:
        """asyncio.sleep() and asyncio.wait() call this, a method of the event loop."""
        if seconds >= 0.5:
            self.pauses.append(seconds)
            seconds = 0.01
        return function(seconds, *args, **named)

    def work(self) -> list[str]:
        """Return the calls about clients, without those that would block if that is the model."""
        calls = [call for call in list(self.calls) if not call.startswith(("sleep", "modify"))]
        return [call for call in calls if not (self.polls and call.endswith("would block"))]

    def wait_until_idle(self) -> None:
        """Wait until it does nothing for a moment."""

        def idle() -> bool:
            before = len(self.work())
            time.sleep(0.03)
            return len(self.work()) == before

        eventually(idle, "an idle server")

    def log(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    def wait_for_log(self, text: str) -> None:
        eventually(lambda: text in self.log() or self.mistakes, text, self.log)

    def stop(self) -> None:
        """End the thread. Raise AssertionError if it does not end, or for a mistake in it."""
        self.stopped = True
        for spy in self.sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(spy, socket.SHUT_RDWR)  # wakes it, as if the client closed
        end = time.monotonic() + 1
        while self.thread.is_alive() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(self.address, 0.1).close()  # wakes it in accept()
            self.thread.join(0.02)
        self.patches.close()
        for spy in (self.listener, *self.sockets):
            socket.socket.close(spy)
        if self.mistakes or self.thread.is_alive():
            mistake = self.mistakes[0] if self.mistakes else None
            raise AssertionError("it ended by a mistake, or hangs") from mistake


class Spy(socket.socket):
    """A socket of a server in this process: notes its calls, and fails as told."""

    def __init__(self, inside: Inside, number: int, fileno: int | None = None) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM, fileno=fileno)
        self.inside = inside
        self.number = number
        self.errors: dict[str, Exception] = {}  # what the next call of this name raises
        self.send_limit = sys.maxsize  # the bytes that one send() takes; 0: it would block, once
        self.endless = False  # receives the same again and again, and nobody gets the echo

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        result = self.inside.call(f"{name} {self.number}", function, *args)
        if name in self.errors:
            raise self.errors.pop(name)
        return result

    def recv(self, size: int, flags: int = 0) -> Any:
        return self.call("recv", super().recv, size, socket.MSG_PEEK if self.endless else flags)

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> Any:
        flags = socket.MSG_PEEK if self.endless else flags
        return self.call("recv", super().recv_into, buffer, size, flags)

    def send(self, data: Any, flags: int = 0) -> Any:
        if self.endless or len(data) == 0:  # the latter would do nothing
            return len(data)
        if self.send_limit == 0:
            self.send_limit = sys.maxsize
            raise BlockingIOError(errno.EAGAIN, "the send buffer is full")
        return self.call("send", super().send, data[: self.send_limit], flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        if len(data) > 0:
            self.call("send", super().sendall, data, flags)

    def shutdown(self, how: int) -> None:
        self.call("shutdown", super().shutdown, how)

    def close(self) -> None:
        if self.fileno() != -1:
            self.inside.calls.append(f"close {self.number}")
        super().close()

    def accept(self) -> Any:
        return self.inside.call("accept", self.accept_as_planned)

    def accept_as_planned(self, real_select: Callable[..., Any] = select.select) -> Any:
        """Accept a client when there is one, or raise the error that is planned for this call."""
        patience = None if self.getblocking() else 0  # seconds
        if not real_select([self], [], [], patience)[0]:
            raise BlockingIOError(errno.EAGAIN, "no client is in the backlog")
        error = self.inside.accept_errors.pop(0) if self.inside.accept_errors else None
        if error:
            self.inside.calls.append("accept fails")
            raise error
        sock, address = super().accept()
        spy = Spy(self.inside, len(self.inside.sockets) + 1, sock.detach())
        self.inside.sockets.append(spy)
        return spy, None if self.inside.no_address else address


def load(script: Path) -> Any:
    """Return the module of a script, a new one in each call."""
    spec: Any = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- The tools: scripts as processes

INTERPRETER = [sys.executable, *(f"-W{option}" for option in sys.warnoptions),
               *(["-X", "dev"] if sys.flags.dev_mode else []),
               "-Wignore::ResourceWarning"]  # an end by Ctrl-C leaves sockets to the kernel
# What colours a traceback, or changes another thing that is compared, is not passed on.
ENVIRONMENT = {name: value for name, value in os.environ.items()
               if "PYTHON" not in name and name not in ("FORCE_COLOR", "TEST_DEADLINE")}
# A prelude: the buffers of connections are then soon full.
SMALL_BUFFERS = """
import socket
class SmallBuffers(socket.socket):
    def listen(self, *backlog):
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        super().listen(*backlog)
socket.socket = SmallBuffers
"""
# A prelude for FAULT.format(call, error): the call, of a method or a function, raises the error.
FAULT = """
import socket, threading
def fault(*_):
    raise {1}
{0} = fault
"""
RUN_SCRIPT = """
import runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Process:
    """A script as a process. Threads read what it writes, and it is killed when the tests end."""

    def __init__(self, script: Path, *options: str, prelude: str = "", files: int = 0,
                 terminal: bool = False, **settings: Any) -> None:
        """Start a script: after a prelude, with so many file descriptors, or in a terminal."""
        command = [*INTERPRETER, str(script), *options]
        if prelude:
            command = [*INTERPRETER, "-c", prelude + RUN_SCRIPT, str(script), *options]
        if files:
            command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
        self.screen: Any = None
        theirs = subprocess.PIPE
        if terminal:
            ours, theirs = vars(os)["openpty"]()
            self.screen = io.FileIO(ours, "r+")
        settings = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": ENVIRONMENT,
                    **settings}
        self.process: Any = subprocess.Popen(command, bufsize=0, **settings)
        RUNNING.add(self)
        if terminal:
            os.close(theirs)
        self.stdout = bytearray()  # what has come so far
        self.stderr = bytearray()  # or in the terminal
        self.readers = []
        for file, data in ((self.process.stdout, self.stdout),
                           (self.process.stderr or self.screen, self.stderr)):
            reader = threading.Thread(target=self.read, args=(file, data), daemon=True)
            reader.start()
            self.readers.append(reader)
        self.expected = b""

    def read(self, file: Any, data: bytearray) -> None:
        """Read a pipe or a terminal to its end."""
        with contextlib.suppress(OSError, ValueError):  # a terminal ends with an error
            while file and (part := file.read(65536)):
                data.extend(part)

    def output(self) -> bytes:
        """Return what it has written to stdout so far."""
        return bytes(self.stdout)

    def said(self) -> bytes:
        """Return what it has written to stderr or to the terminal: all of it, if it has ended."""
        if self.process.poll() is not None:
            self.readers[1].join(DEADLINE)
        return bytes(self.stderr).replace(b"\r\n", b"\n")

    def log(self) -> str:
        return self.said().decode(errors="surrogateescape")

    def wait_for_log(self, text: str, number: int = 1) -> None:
        """Wait until a text is in the log so many times."""
        eventually(lambda: self.log().count(text) >= number, f"{number} x {text!r}", self.said)

    def expect(self, text: bytes) -> None:
        """Wait until it has written this, after what was expected before."""
        self.expected += text
        eventually(lambda: self.said().startswith(self.expected), repr(self.expected), self.said)

    def send(self, data: bytes) -> None:
        """Write to its stdin, or type in its terminal."""
        (self.process.stdin or self.screen).write(data)

    def result(self, stdin: bytes = b"") -> tuple[bytes, bytes, int]:
        """Wait for its end; return what it wrote to stdout and to stderr, and its status."""
        with contextlib.suppress(OSError, ValueError), self.process.stdin or io.BytesIO() as pipe:
            while stdin:  # which has not been closed already
                stdin = stdin[pipe.write(stdin) :]
        try:
            self.process.wait(3 * DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end: {self.log()[-500:]}") from None
        self.kill()
        return self.output(), self.said(), self.process.returncode

    def kill(self) -> None:
        """End it, if it has not ended; read the rest of what it has written."""
        self.process.kill()
        self.process.wait()
        RUNNING.discard(self)
        for reader in self.readers:
            reader.join(DEADLINE)
        for file in (self.process.stdin, self.process.stdout, self.process.stderr, self.screen):
            with contextlib.suppress(OSError):
                if file:
                    file.close()

    def cpu(self) -> float:
        """Return the CPU time of all its threads in seconds, or nan."""
        if sys.platform != "linux":
            return float("nan")
        return time.clock_gettime((~self.process.pid << 3) | 2)  # as clock_getcpuclockid(3) has it

    def uses_cpu(self, seconds: float) -> float:
        """Return the CPU time that it uses in the next so many seconds."""
        before = self.cpu()
        time.sleep(seconds)
        return self.cpu() - before

    def sleeps(self) -> bool:
        """Return whether it is blocked in a call. Elsewhere than on Linux, nothing tells it."""
        state = Path(f"/proc/{self.process.pid}/stat")
        return sys.platform != "linux" or ") S" in state.read_text()

    def wait_until_idle(self) -> None:
        """Wait until it sleeps and uses no CPU time, or little if it polls."""
        most = 0.015 if b"every" in self.output() else 0.0  # as nonblocking_server.py says
        eventually(lambda: not self.uses_cpu(0.05) > most and self.sleeps(), "idle", self.said)


class Server(Process):
    """A server as a process. It listens: line is its first line, and address is in it."""

    def __init__(self, script: Path, *options: str, **settings: Any) -> None:
        super().__init__(script, "--port=0", *options, **settings)  # a later --port wins
        with contextlib.suppress(AssertionError):
            eventually(lambda: b"\n" in self.output() or self.process.poll() is not None, "a line")
        self.line = self.output().decode().replace("\r", "")
        match = re.match(r"listening on \S+:(\d+) \(", self.line)
        if not match:
            self.kill()
            raise AssertionError(f"{self.line!r} is not 'listening':\n{self.log()[-500:]}")
        self.port = int(match[1])
        self.address = ("127.0.0.1", self.port)


RUNNING: set[Process] = set()


@atexit.register
def end_processes() -> None:
    """End what still runs, however the tests end: unittest runs no cleanups after a Ctrl-C."""
    for one in list(RUNNING):
        one.process.terminate()  # tests of a copy end their own processes then
    for one in list(RUNNING):
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(2)
        one.process.kill()


def setUpModule() -> None:
    """Give the scripts a Ctrl-C even if we were started without, and us enough files."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # then atexit has its turn, too
    if resource:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = min(most, 10_400) if most > 0 else 10_400
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def need_files(test: unittest.TestCase, number: int) -> None:
    """Skip a test if this process may not have so many file descriptors."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else number
    if files < number:
        test.skipTest(f"needs {number} open files, and a process may have {files} here")


def eventually(condition: Callable[[], object], what: str, log: Callable[[], Any] = str) -> None:
    """Return as soon as the condition is true. Raise AssertionError at the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen: {what} {log()[-500:]!r}")
        time.sleep(0.002)


# ---- The tools: clients

def connect(address: tuple[str, int]) -> socket.socket:
    """Return a client whose buffers are soon full, and that does not wait forever."""
    sock = socket.socket()
    sock.settimeout(DEADLINE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def receive(sock: socket.socket, size: int = sys.maxsize) -> bytes:
    """Return the next size bytes, or what comes before the connection ends."""
    data = bytearray()
    while len(data) < size and (part := sock.recv(min(size - len(data), 65536))):
        data += part
    return bytes(data)


def send_in_thread(sock: socket.socket, data: bytes, last: bool = False) -> threading.Thread:
    """Send data, and end the stream if it is the last, while somebody else receives."""

    def send() -> None:
        with contextlib.suppress(OSError):  # the receiver will notice what is missing
            sock.sendall(data)
            if last:
                sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def flood(sock: socket.socket) -> bytes:
    """Send without receiving until no more goes, or 4 MB went; return what was sent."""
    sent = b""
    sock.setblocking(False)
    while len(sent) < 4 << 20 and select.select([], [sock], [], 0.1)[1]:
        start = len(sent) % len(NOISE)
        with contextlib.suppress(BlockingIOError):
            number = sock.send(NOISE[start : start + 65536])
            sent += NOISE[start : start + number]
    sock.settimeout(DEADLINE)
    return sent


def reset(sock: socket.socket) -> None:
    """Close a socket in a way that resets the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # 0 seconds
    sock.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--benchmark"]:
        setUpModule()
        benchmark()
    else:
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__)
        unittest.main()
