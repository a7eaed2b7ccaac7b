"""Tests of the six echo servers and of their client; with --benchmark, their measurement.

    python test_all.py                              everything, in less than a minute
    python test_all.py -v                           and says what it checks
    python test_all.py EpollServer                  one server
    python test_all.py EpollServer.test_half_close  one test
    python test_all.py --benchmark                  the table of the README, in a minute

Each test starts a script as a subprocess on a free port of 127.0.0.1, is a client (often a
hostile one), and looks at what comes back, at the log and at the process. The tools for
that, Server and its relatives, are at the end.
"""

import ast
import contextlib
import errno
import importlib.util
import io
import itertools
import math
import os
import platform
import random
import re
import select
import selectors
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import client

if sys.platform != "win32":
    import resource

HERE = Path(__file__).resolve().parent
NAMES = ("blocking", "nonblocking", "select", "epoll", "selectors", "async")
SCRIPTS = {name: HERE / f"{name}_server.py" for name in NAMES}
CLIENT = HERE / "client.py"
DEADLINE = 10.0  # seconds: what has not happened by then does not happen
LINUX = unittest.skipUnless(sys.platform == "linux", "needs /proc")
POSIX = unittest.skipIf(sys.platform == "win32", "needs the signals and terminals of POSIX")


# ---- A first test, which shows the method

class FirstTest(unittest.TestCase):
    """Start a server, be a client, look at what happens."""

    def test_first(self) -> None:
        """A client gets its bytes back, and can be lost without harm to another."""
        # Port 0 is any free port: the server says on stdout which one it has got.
        server = subprocess.Popen(
            [sys.executable, "select_server.py", "--port", "0", "--quiet"],
            cwd=HERE,
            stdout=subprocess.PIPE,
        )
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)  # whatever happens here, no process stays behind
        assert server.stdout
        self.addCleanup(server.stdout.close)
        port = int(server.stdout.readline().split(b":")[1].split()[0])

        # A client. The timeout makes a server that does not answer fail the test.
        with socket.create_connection(("127.0.0.1", port), timeout=10) as first:
            first.sendall(b"hello\n")
            self.assertEqual(first.recv(100), b"hello\n")

            # A hostile client: to linger for 0 seconds is to close with a reset.
            second = socket.create_connection(("127.0.0.1", port), timeout=10)
            second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            second.close()

            # What must be seen: the first client is served as before, and the server runs.
            first.sendall(b"still there?\n")
            self.assertEqual(first.recv(100), b"still there?\n")
            self.assertIsNone(server.poll())


# ---- What the tests of the servers have in common

class ServerTest(unittest.TestCase):
    """A server for all tests of a class, and for those that need it one of their own."""

    name = ""
    options: tuple[str, ...] = ()
    says = ""  # in the line on stdout
    one_at_a_time = False  # serves a client only when the one before has left
    polls = False  # uses CPU while it is idle
    server: "Server"

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = Server(SCRIPTS[cls.name], *cls.options)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.server.kill()

    def setUp(self) -> None:
        if self.server.process.poll() is not None:  # a test before this one has ended it
            type(self).setUpClass()

    def start(self, *options: str, **more: Any) -> "Server":
        """Return a server for this test alone."""
        server = Server(SCRIPTS[self.name], *self.options, *options, **more)
        self.addCleanup(server.kill)
        return server

    def connect(self, server: "Server | None" = None) -> socket.socket:
        """Return a connection to the server of all tests, or to another."""
        sock = (server or self.server).connect()
        self.addCleanup(sock.close)
        return sock

    def assert_echo(self, sock: socket.socket, data: bytes) -> None:
        """Send data; fail if the same does not come back."""
        sock.sendall(data)
        self.assertEqual(receive(sock, len(data)), data)

    def assert_serves(self, server: "Server") -> None:
        """Fail if a new client is not served, or if there was a traceback."""
        with server.connect() as sock:
            self.assert_echo(sock, b"still there?\n")
        self.assertNotIn(b"Traceback", server.log())

    def assert_rests(self, server: "Server") -> None:
        """Fail if the server does not come to rest; one that polls may use half a core."""
        if sys.platform != "linux":
            return
        if not self.polls:
            eventually(server.sleeps, "a server that sleeps")
            return
        before, start = server.cpu(), time.monotonic()
        time.sleep(0.3)
        self.assertLess(server.cpu() - before, (time.monotonic() - start) / 2)

    def assert_stops(self, server: "Server", at_work: bool = False) -> None:
        """Press Ctrl-C; fail if it is not obeyed at once, with status 0 and one line."""
        if not at_work:
            server.wait_for_rest()
        pressed = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        self.assertEqual(server.output(), b"", "stdout has one line only")
        self.assertLess(time.monotonic() - pressed, 1)
        self.assertEqual(server.process.returncode, 0, server.log()[-500:])
        self.assertRegex(server.log(), rb"(\A|\n)[\d:.]+ stopped\n\Z")
        self.assertNotIn(b"Traceback", server.log())

    def assert_refused(self, script: Path, *options: str, named: str, **more: Any) -> None:
        """Fail unless the script ends with an error message that names what is wrong."""
        process = Process(script, *options, **more)
        self.addCleanup(process.kill)
        self.assertEqual(process.output(), b"")
        self.assertGreater(process.process.returncode, 0)
        message = process.log().decode()
        self.assertIn(named, message)
        self.assertNotIn("Traceback", message)
        self.assertLessEqual(len([x for x in message.splitlines() if "error" in x.lower()]), 2)

    def assert_full_house(self, clients: int, room: range, *options: str, files: int = 0) -> None:
        """Fail unless so many clients are served at once as there is room for, and each time
        that one leaves the next one is served, until all have been."""
        server = self.start(*options, files=files)
        waiting: dict[int, socket.socket] = {}
        queue = select.poll()
        for _ in range(clients):
            sock = self.connect(server)
            sock.sendall(b"hello\n")
            waiting[sock.fileno()] = sock
            queue.register(sock, select.POLLIN)
        inside: list[socket.socket] = []

        def served() -> int:
            """Note which clients have been served; return how many are inside."""
            for fd, _ in queue.poll(0):
                sock = waiting.pop(fd)
                queue.unregister(sock)
                self.assertEqual(receive(sock, 6), b"hello\n")
                inside.append(sock)
            return len(inside)

        eventually(lambda: served() >= room[0], f"{room[0]} clients served")
        self.assert_rests(server)
        full = served()
        self.assertIn(full, room)
        self.assertEqual(b"full (" in server.log(), not self.one_at_a_time)
        for sock in inside:
            self.assert_echo(sock, b"still inside\n")
        for _ in range(20):
            inside.pop(0).close()
            eventually(lambda: served() >= full, "the next client served")
            self.assertEqual(len(inside), full)
        while waiting:
            for sock in inside:
                sock.close()
            inside.clear()
            eventually(lambda: served() >= full or not waiting, "the next clients served")
        self.assertNotIn(b"Traceback", server.log())


# ---- Every server: the conversation

class EveryServer(ServerTest):
    """What every server must do."""

    def test_every_byte(self) -> None:
        """Each byte comes back as it arrives, unchanged, and no newline is needed."""
        sock = self.connect()
        for data in (b"no newline", b"\n", b"\n\n\r\n\r\r", bytes(range(256)), b"\xff\xfe"):
            self.assert_echo(sock, data)
        for byte in range(256):
            if byte != ord("q"):
                self.assert_echo(sock, bytes([byte]))

    def test_large_message(self) -> None:
        """Three megabytes come back unchanged, however they are cut on the way."""
        data = random.Random(1).randbytes(3_000_000).replace(b"\nq", b"\n-") + b"."
        self.assertTrue(exchange(self.connect(), data) == data)

    def test_q_line(self) -> None:
        """A line that is just q ends it: what is before comes back, what follows does not."""
        for data, echo in (
            (b"q\n", b""),
            (b"q\r\n", b""),
            (b"\nq\n", b"\n"),
            (b"one\ntwo\nq\nnot this\n", b"one\ntwo\n"),
            (b"one\r\nq\r\nnot this\r\nq\r\n", b"one\r\n"),
            (b"quit\nqq\nq q\n q\nq\n", b"quit\nqq\nq q\n q\n"),
            (b"x" * 70_000 + b"\nq\nnot this", b"x" * 70_000 + b"\n"),
        ):
            with self.subTest(data=data[:30]), self.server.connect() as sock:
                sock.sendall(data)
                self.assertEqual(read_to_end(sock), echo)

    def test_q_in_pieces(self) -> None:
        """TCP may cut a q line anywhere; what came back before its newline came is not undone."""
        for pieces, echoes in (
            ([b"one\n", b"q\n"], [b"one\n", b""]),
            ([b"one\nq", b"\n"], [b"one\nq", b""]),
            ([b"one\n", b"q\r", b"\nnot this"], [b"one\n", b"q\r", b""]),
            ([b"hello", b"q"], [b"hello", b""]),
            ([b"Ira", b"q"], [b"Ira", b""]),
        ):
            with self.subTest(pieces=pieces), self.server.connect() as sock:
                for piece, echo in zip(pieces, echoes):
                    sock.sendall(piece)
                    self.assertEqual(receive(sock, len(echo)), echo)
                self.assertEqual(read_to_end(sock), b"")

    def test_not_a_q_line(self) -> None:
        """What only looks like a q is data, and so is a q after a read that filled the buffer."""
        sock = self.connect()
        for line in (b"quit", b"qq", b" q", b"Q", b"q q", b"q ", b"xq", b"q\0", b"q\r\r", b"\tq"):
            self.assert_echo(sock, line + b"\n")
        for _ in range(3):
            self.assert_echo(sock, b"x" * 65536 + b"q")

    def test_half_close(self) -> None:
        """After the end of the client's stream, all that is unsent still comes."""
        data = random.Random(2).randbytes(1_000_000).replace(b"\nq", b"\n-") + b"."
        with self.server.connect() as sock:
            [sent] = flood([sock], data)
            sock.shutdown(socket.SHUT_WR)
            echo = read_to_end(sock)
        self.assertEqual(len(echo), sent)
        self.assertTrue(echo == (data * (sent // len(data) + 1))[:sent])

    def test_q_after_much(self) -> None:
        """The echo comes to its last byte, though the client is slow, and sends after the q."""
        data = b"much " * 1_000_000 + b"\n"
        for before in (b"one\ntwo\n", data):
            text = before + b"q\n" + data[:1_000_000]
            with self.subTest(before=len(before)), self.server.connect() as sock:
                [sent] = flood([sock], text, len(text))
                with in_thread(sock, sock.sendall, text[sent:]):
                    echo = read_to_end(sock)
                    sock.shutdown(socket.SHUT_RDWR)
                self.assertTrue(echo == before, f"{len(echo)} bytes of {len(before)}")

    def test_q_in_time(self) -> None:
        """A q ends the conversation at once, and a client that then stays costs no CPU."""
        server = self.start()
        sock = self.connect(server)
        self.assert_echo(sock, b"hello\n")
        said = time.monotonic()
        sock.sendall(b"q\nmore")
        self.assertEqual(read_to_end(sock), b"")
        self.assertLess(time.monotonic() - said, 0.5)
        sock.sendall(b"and more")  # is read, and ignored
        self.assert_rests(server)
        self.assert_serves(server)
        sock.close()
        server.wait_for_log(rb": closed \((quit|timed out)\)")

    def test_q_is_for_one(self) -> None:
        """A q ends one conversation; the others, and those to come, go on."""
        first, second = self.connect(), self.connect()
        self.assert_echo(first, b"first\n")
        first.sendall(b"q\n")
        self.assertEqual(read_to_end(first), b"")
        self.assert_echo(second, b"second\n")
        second.close()
        self.assert_serves(self.server)

    # ---- Every server: hostile clients, and shortages

    @POSIX
    def test_reset(self) -> None:
        """A reset costs a line in the log: before accept, while it is read, while written to."""
        server = self.start()
        names = []
        with server.stopped():
            early = self.connect(server)
            early.sendall(b"hello\n")
            names.append("{}:{}".format(*early.getsockname()))
            reset(early)
        for kind in ("silent", "greedy"):
            sock = self.connect(server)
            names.append("{}:{}".format(*sock.getsockname()))
            self.assert_echo(sock, b"hello\n")
            if kind == "greedy":
                flood([sock], b"x" * 65536)
            reset(sock)
        self.assert_serves(server)
        for name in names:
            server.wait_for_log(rf"{name}: closed \(.*(reset|[Bb]roken pipe)".encode())
            self.assertEqual(server.log().count(f"{name}: closed".encode()), 1)

    @LINUX
    def test_never_reads(self) -> None:
        """Clients that send and never read cost little memory, no CPU, and delay no other."""
        server = self.start("--quiet")
        clients = 1 if self.one_at_a_time else 4
        socks = [self.connect(server) for _ in range(clients)]
        for sock in socks:
            self.assert_echo(sock, b"x" * 200_000)
        before = server.memory()
        flood(socks, b"x" * 65536)
        self.assert_rests(server)
        self.assertLess(server.memory() - before, (clients * 128 + 1024) * 1024)
        if not self.one_at_a_time:
            self.assert_serves(server)

    @LINUX
    def test_reads_late(self) -> None:
        """When a slow client has read everything, it is as any other: served, and at no CPU."""
        server = self.start("--quiet")
        sock = self.connect(server)
        [sent] = flood([sock], b"x" * 65536)
        self.assertEqual(len(receive(sock, sent)), sent)
        self.assert_echo(sock, b"hello\n")
        self.assert_rests(server)

    @LINUX
    def test_long_conversation(self) -> None:
        """A conversation of 32 MiB more, in lines or in none, leaves nothing in memory."""
        server = self.start("--quiet")
        with server.connect() as sock:
            for chunk in (b"0123456\n" * 524_288, b"x" * (4 << 20)):
                exchange(sock, chunk)
                before = server.memory()
                for _ in range(4):
                    exchange(sock, chunk)
                self.assertLess(server.memory() - before, 2 << 20)

    @LINUX
    def test_no_leak(self) -> None:
        """2,000 clients come and go, in four ways, and leave no descriptor behind."""
        server = self.start("--quiet")
        with server.connect() as sock:
            self.assert_echo(sock, b"hello\n")
            before = server.descriptors() - 1
        for number in range(2000):
            with server.connect() as sock:
                if number % 4 == 0:
                    self.assert_echo(sock, b"hello\n")
                if number % 4 == 1:
                    sock.sendall(b"q\n")
                if number % 4 == 2:
                    sock.sendall(b"the echo is never read\n")
                if number % 4 == 3:
                    reset(sock)
        self.assert_serves(server)
        eventually(lambda: server.descriptors() == before, "all descriptors closed")

    @LINUX
    def test_idle(self) -> None:
        """Silent clients cost no CPU."""
        server = self.start()
        socks = [self.connect(server) for _ in range(20)]
        self.assert_echo(socks[0], b"hello\n")
        self.assert_rests(server)

    @POSIX
    def test_backlog(self) -> None:
        """1,024 clients can wait in the backlog, and are served then."""
        need_files(self, 1100)
        with contextlib.suppress(OSError):
            most = int(Path("/proc/sys/net/core/somaxconn").read_text())
            if most < 1024:
                self.skipTest(f"the kernel queues {most} clients at most")
        server = self.start("--quiet")
        with server.stopped():
            socks = [socket.socket() for _ in range(1024)]
            for sock in socks:
                self.addCleanup(sock.close)
                sock.settimeout(3)  # one that finds no room is not told, and tries again
                sock.connect(("127.0.0.1", server.port))
                sock.sendall(b"hello\n")
        for sock in socks:
            self.assertEqual(receive(sock, 6), b"hello\n")
            sock.close()

    @LINUX
    def test_no_descriptor_left(self) -> None:
        """With no descriptor left, the clients inside are served; the others wait, at no CPU."""
        room = range(1, 2) if self.one_at_a_time else range(50, 64)
        self.assert_full_house(120, room, files=64)

    def test_shortage_passes(self) -> None:
        """As soon as a client leaves, a shortage is over, and then as many fit as before."""
        errors = ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM")[: 1 if self.one_at_a_time else 4]
        plan = [step for error in errors for step in (None, error)]
        server = self.start(prelude=FAULTY_ACCEPT % plan)
        inside = self.connect(server)
        self.assert_echo(inside, b"inside\n")
        for error in errors:
            waits = self.connect(server)
            waits.sendall(b"waits\n")
            if not self.one_at_a_time:
                server.wait_for_log(rf"full \(\[Errno {getattr(errno, error)}\]".encode())
                self.assert_echo(inside, b"still inside\n")
            inside.close()
            self.assertEqual(receive(waits, 6), b"waits\n")
            inside = waits
        if not self.one_at_a_time:
            for _ in range(3):
                self.assert_echo(self.connect(server), b"one more\n")
            self.assertEqual(server.log().count(b"full ("), len(errors))

    def test_shortage_without_clients(self) -> None:
        """With no client that could leave, it sleeps a second and tries again: it never ends."""
        server = self.start(prelude=FAULTY_ACCEPT % ["ENFILE"])
        sock, start = self.connect(server), time.monotonic()
        self.assert_echo(sock, b"hello\n")
        self.assertGreater(time.monotonic() - start, 0.5)
        self.assertEqual(server.log().count(b"full ("), 1)

    def test_client_gone_at_accept(self) -> None:
        """A client that has gone before it is accepted costs no other anything."""
        plan = [None, "ECONNABORTED", None, "EPROTO", None, "no address", None]
        server = self.start(prelude=FAULTY_ACCEPT % plan)
        self.assert_serves(server)
        for _ in range(2):  # the one that cannot be accepted waits, and is accepted then
            self.assert_serves(server)
        with self.connect(server) as gone:
            self.assertEqual(read_to_end(gone), b"")
        self.assert_serves(server)
        self.assertNotIn(b"full (", server.log())

    # ---- Every server: what it says, and how it ends

    def test_defaults(self) -> None:
        """Without options it listens on 127.0.0.1:8088, with a backlog of 1,024."""
        script = Process(SCRIPTS[self.name], prelude=SHOW_ADDRESS)
        self.addCleanup(script.kill)
        self.assertEqual(script.output().split(), [b"127.0.0.1", b"8088", b"1024"])

    def test_first_line(self) -> None:
        """The line on stdout names the model; stdout gets nothing else."""
        self.assertRegex(self.server.line, rf"^listening on 127\.0\.0\.1:\d+ \({self.says}\)$")

    @POSIX
    def test_port(self) -> None:
        """--port takes that port, and Ctrl-C gives it back at once, after connections too."""
        server = self.start()
        sock = self.connect(server)
        sock.sendall(b"q\n")
        self.assertEqual(read_to_end(sock), b"")  # the server closes first
        self.assert_echo(self.connect(server), b"hello\n")
        self.assert_stops(server)
        again = self.start("--port", str(server.port))
        self.assertEqual(again.port, server.port)
        self.assert_serves(again)

    def test_help(self) -> None:
        """--help explains the model."""
        script = Process(SCRIPTS[self.name], "--help")
        self.addCleanup(script.kill)
        text = script.output().decode()
        for word in ("kernel", "waiting for data", "copying", "Cost:", "127.0.0.1", "8088"):
            self.assertIn(word, text)

    def test_log(self) -> None:
        """The log has a line for each event, with milliseconds, and no byte of a client raw."""
        server = self.start()
        expected: list[bytes] = []
        for reason in ("quit", "end of stream", "reset"):
            sock = self.connect(server)
            name = "{}:{}".format(*sock.getsockname())
            first = b"\x1b[31m\xff\a\r\n"
            self.assert_echo(sock, first)
            self.assert_echo(sock, b"long " * 100)
            expected += [f"{name}: connected".encode(), f"{name}: read 9 bytes: {first!r}".encode()]
            expected += [f"{name}: read 500 bytes: {b'long ' * 10!r}".encode()]
            if reason == "quit":
                sock.sendall(b"\nq\n")
                self.assertEqual(read_to_end(sock), b"\n")
                expected += [name.encode() + rb": read 3 bytes: b'\nq\n'"]
            if reason == "reset" and sys.platform != "win32":
                reset(sock)
            else:
                reason = reason if reason == "quit" else "end of stream"
            sock.close()
            server.wait_for_log(rf"{name}: closed \(.*{reason}".encode())
            expected += [rf"{name}: closed ({reason})".encode()]
        lines = re.sub(rb"\[Errno \d+\] Connection reset by peer", b"reset", server.log()).splitlines()
        for line in lines:
            self.assertRegex(line, rb"^\d\d:\d\d:\d\d\.\d\d\d 127")
        self.assertEqual([line[13:] for line in lines if b"read 0" not in line], expected)

    def test_quiet(self) -> None:
        """--quiet silences the log."""
        server = self.start("--quiet")
        self.assert_serves(server)
        reset(self.connect(server))
        self.assert_serves(server)
        self.assertEqual(server.log(), b"")

    def test_mistakes(self) -> None:
        """A mistake gets a clear message on stderr, and a status that is not 0."""
        port = str(self.server.port)
        for options, named in (
            (("--port", port), f"127.0.0.1:{port}"),
            (("--port", "65536"), "65536"),
            (("--host", "192.0.2.1"), "192.0.2.1"),
            (("--host", "\udcff"), "surrogates"),
            (("--nonsense",), "--nonsense"),
        ):
            with self.subTest(options=options):
                self.assert_refused(SCRIPTS[self.name], *options, named=named)

    def test_cannot_go_on(self) -> None:
        """An error of the system that it cannot deal with ends it with one line, not status 0."""
        prelude = "import socket\ndef fails(*_): raise OSError('a fault of the test')\n"
        prelude += "socket.socket.setsockopt = fails"
        self.assert_refused(SCRIPTS[self.name], named="a fault of the test", prelude=prelude)

    @POSIX
    def test_closed_stdout(self) -> None:
        """A stdout that cannot be written to ends it with an error, not with a traceback."""
        reader, writer = os.pipe()
        os.close(reader)
        self.assert_refused(SCRIPTS[self.name], named="roken pipe", stdout=writer)
        os.close(writer)

    @POSIX
    def test_ctrl_c(self) -> None:
        """Ctrl-C ends it at once, with status 0 and one line: without clients, and with some."""
        self.assert_stops(self.start())
        server = self.start()
        socks = [self.connect(server) for _ in range(5)]
        self.assert_echo(socks[0], b"hello\n")
        self.assert_stops(server)

    @POSIX
    def test_second_ctrl_c(self) -> None:
        """An impatient user, who presses it twice, sees no other error."""
        server = self.start()
        self.assert_echo(self.connect(server), b"hello\n")
        server.wait_for_rest()
        server.process.send_signal(signal.SIGINT)
        server.wait_for_log(b"stopped")
        server.process.send_signal(signal.SIGINT)
        server.output()
        self.assertNotIn(b"Error", server.log())

    @POSIX
    def test_ctrl_c_ignored(self) -> None:
        """In the background of a shell, where Ctrl-C is ignored, it goes on."""
        server = self.start("--quiet", prelude="import signal\nsignal.signal(2, signal.SIG_IGN)")
        sock = self.connect(server)
        self.assert_echo(sock, b"hello\n")
        server.process.send_signal(signal.SIGINT)
        for _ in range(20):
            self.assert_echo(sock, b"still there?\n")

    @LINUX
    def test_ctrl_c_at_work(self) -> None:
        """Ctrl-C ends it at once, however much is on its way, and while clients come and go."""
        if self.name == "async" and sys.version_info < (3, 11):
            self.skipTest("before CPython 3.11, asyncio may print a traceback")
        server = self.start("--quiet")
        stuck, busy = self.connect(server), self.connect(server)
        if self.one_at_a_time:
            stuck.close()
        else:
            flood([stuck], b"x" * 65536)

        def work() -> None:
            while busy.send(b"x" * 1000):
                busy.recv(65536)

        before = server.cpu()
        with in_thread(busy, work), in_thread(busy, work):
            eventually(lambda: server.cpu() > before + 0.05, "the server at work")
            self.assert_stops(server, at_work=True)


# ---- The servers that serve many at once

class ManyAtOnce(EveryServer):
    """What every server must do but the blocking one."""

    @POSIX
    def test_turns(self) -> None:
        """However much a client has sent, another one has its turn between two reads."""
        server = self.start()
        busy, other = self.connect(server), self.connect(server)
        self.assert_echo(busy, b"hello\n")
        self.assert_echo(other, b"hello\n")
        with server.stopped():
            flood([busy], b"x" * 65536)
            other.sendall(b"my turn\n")
        self.assertEqual(receive(other, 8), b"my turn\n")
        server.wait_for_log(b"my turn")
        self.assertLess(server.log().partition(b"my turn")[0].count(b"b'xxxx"), 5)

    @POSIX
    def test_turns_of_newcomers(self) -> None:
        """However many clients connect, one that is connected has its turn between two of them."""
        server = self.start()
        inside = self.connect(server)
        self.assert_echo(inside, b"hello\n")
        with server.stopped():
            for _ in range(200):
                self.connect(server)
            inside.sendall(b"my turn\n")
        self.assertEqual(receive(inside, 8), b"my turn\n")
        server.wait_for_log(b"my turn")
        self.assertLess(server.log().partition(b"my turn")[0].count(b": connected"), 10)

    def test_endless_client(self) -> None:
        """A client whose data never ends delays no other, neither before its q nor after."""
        server = self.start("--quiet", prelude=ENDLESS)
        for first in (b"endless\n", b"q\n"):
            with self.subTest(first=first):
                endless = server.connect()
                endless.sendall(first)

                def read(sock: socket.socket = endless) -> None:
                    while sock.recv(65536):
                        pass

                with in_thread(endless, read):
                    for _ in range(10):
                        self.assert_serves(server)
                    with contextlib.suppress(OSError):
                        endless.shutdown(socket.SHUT_RDWR)
                endless.close()

    def test_lasting_error(self) -> None:
        """If accept never works again, whatever the error, the clients inside are served."""
        server = self.start("--quiet", prelude=FAULTY_ACCEPT % "[None] + ['EINVAL'] * 10 ** 6")
        sock = self.connect(server)
        self.assert_echo(sock, b"hello\n")
        self.connect(server)
        for _ in range(20):
            self.assert_echo(sock, b"still there?\n")
        if sys.platform != "win32":
            self.assert_stops(server, at_work=True)


class TenThousand(ManyAtOnce):
    """What the servers without a limit of their own must do."""

    @LINUX
    def test_10_000_clients(self) -> None:
        """10,000 clients are held, at no CPU, and served."""
        need_files(self, 10_300)
        server = self.start("--quiet")
        socks = []
        for number in range(10_000):
            socks.append(self.connect(server))
            if number % 200 == 199:  # no faster than it accepts them
                self.assert_echo(socks[-1], b"hello\n")
        self.assert_rests(server)
        for sock in socks[::100]:
            self.assert_echo(sock, b"hello\n")
        for sock in socks:
            sock.sendall(b"all at once\n")
        for sock in socks:
            self.assertEqual(receive(sock, 12), b"all at once\n")


# ---- Each model

class BlockingServer(EveryServer):
    """blocking_server.py: one client at a time."""

    name = "blocking"
    says = "blocking, threads: 1"
    one_at_a_time = True

    def test_one_at_a_time(self) -> None:
        """The second client is connected, and is served when the first one has left."""
        first, second = self.connect(), self.connect()
        second.sendall(b"second\n")
        for _ in range(100):
            self.assert_echo(first, b"first\n")
        self.assertEqual(select.select([second], [], [], 0)[0], [])
        first.close()
        self.assertEqual(receive(second, 7), b"second\n")

    def test_stays_after_q(self) -> None:
        """A client that has said q and does not close keeps the next one waiting a second."""
        first = self.connect()
        first.sendall(b"q\nnot this\n")
        self.assertEqual(read_to_end(first), b"")
        self.assert_serves(self.server)

    def test_threads(self) -> None:
        """With --threads 4, four clients are served at once, and the fifth when one leaves."""
        server = self.start("--threads", "4")
        self.assertIn("(blocking, threads: 4)", server.line)
        socks = [self.connect(server) for _ in range(5)]
        for _ in range(20):
            for sock in socks[:4]:
                self.assert_echo(sock, b"hello\n")
        socks[4].sendall(b"fifth\n")
        for sock in socks[:4]:
            self.assert_echo(sock, b"hello\n")
        self.assertEqual(select.select([socks[4]], [], [], 0)[0], [])
        socks[2].close()
        self.assertEqual(receive(socks[4], 6), b"fifth\n")
        if sys.platform != "win32":
            self.assert_stops(server)

    def test_threads_mistakes(self) -> None:
        """A number of threads that is none, or that the system cannot start, is an error."""
        for threads in ("0", "-1", "many"):
            self.assert_refused(SCRIPTS["blocking"], f"--threads={threads}", named="--threads")
        prelude = "import threading\ndef fails(_): raise RuntimeError('no more threads')\n"
        prelude += "threading.Thread.start = fails"
        process = Process(SCRIPTS["blocking"], "--threads", "9", "--port", "0", prelude=prelude)
        self.addCleanup(process.kill)
        process.output()
        self.assertGreater(process.process.returncode, 0)
        self.assertRegex(process.log(), rb"\A[^\n]*9[^\n]*no more threads\r?\n\Z")


class NonblockingServer(ManyAtOnce):
    """nonblocking_server.py: asks in turn, and sleeps."""

    name = "nonblocking"
    options = ("--interval", "0.001")
    says = r"non-blocking, every 0\.001 s"
    polls = True

    def test_default_interval(self) -> None:
        """The interval is 0.01 seconds, if no other is given; none is rounded."""
        for options, said in (((), "0.01"), (("--interval", "0.0123456"), "0.0123456")):
            server = Server(SCRIPTS[self.name], *options)
            self.addCleanup(server.kill)
            self.assertIn(f"(non-blocking, every {said} s)", server.line)

    def delay(self, interval: str) -> float:
        """Return how many seconds an echo takes with this interval: the median of three."""
        server = self.start("--interval", interval)
        sock = self.connect(server)
        self.assert_echo(sock, b"hello\n")
        delays = []
        for _ in range(3):
            server.wait_for_rest()  # else it may still be asking
            start = time.monotonic()
            self.assert_echo(sock, b"hello\n")
            delays.append(time.monotonic() - start)
        return statistics.median(delays)

    @LINUX
    def test_interval_is_delay(self) -> None:
        """Data waits as long as the server sleeps."""
        self.assertGreater(self.delay("0.3"), 0.15)
        self.assertLess(self.delay("0.001"), 0.15)

    @LINUX
    def test_interval_is_cpu(self) -> None:
        """With interval 0 it never sleeps; with 0.01 it uses little CPU while idle."""
        states, used = [], []
        for interval in ("0", "0.01"):
            server = self.start("--interval", interval)
            socks = [self.connect(server) for _ in range(10)]
            self.assert_echo(socks[-1], b"hello\n")
            before, end = server.cpu(), time.monotonic() + 0.3
            states.append("")
            while time.monotonic() < end:
                states[-1] += server.state()
            used.append(server.cpu() - before)
        self.assertGreater(states[0].count("R"), len(states[0]) * 0.9)
        self.assertLess(used[1], 0.1)

    def test_no_sleep_at_work(self) -> None:
        """It sleeps only after a round in which no socket was ready."""
        server = self.start("--interval", "0.5", "--quiet")
        start = time.monotonic()
        exchange(self.connect(server), b"x" * 1_000_000)  # 16 reads and more
        self.assertLess(time.monotonic() - start, 4)

    def test_interval_mistakes(self) -> None:
        """An interval that is none is an error."""
        for interval in ("-1", "nan", "inf", "soon"):
            self.assert_refused(SCRIPTS[self.name], f"--interval={interval}", named="--interval")


class SelectServer(ManyAtOnce):
    """select_server.py: one call for all, within its limit."""

    name = "select"
    says = "select"

    @LINUX
    def test_1300_clients(self) -> None:
        """The clients that select() cannot watch wait, and are served when there is room."""
        need_files(self, 1400)
        self.assert_full_house(1300, range(1000, 1025), files=1400)


@unittest.skipUnless(hasattr(select, "epoll"), "this platform has no epoll")
class EpollServer(TenThousand):
    """epoll_server.py: told only which sockets are ready."""

    name = "epoll"
    says = "epoll"

    @POSIX
    def test_calls(self) -> None:
        """A message costs a poll, a recv and a send, and writable is watched only if needed."""
        server = self.start("--quiet", prelude=COUNT_CALLS)
        sock = self.connect(server)
        for _ in range(200):
            self.assert_echo(sock, b"hello\n")
        self.assert_stops_and_says(server)

    def assert_stops_and_says(self, server: "Server") -> None:
        """Stop the server, and look at the calls that it has counted."""
        server.wait_for_rest()
        server.process.send_signal(signal.SIGINT)
        server.output()
        calls = ast.literal_eval(server.log().decode().splitlines()[-1])
        self.assertEqual((calls["send"], calls["recv"]), (200, 200))
        self.assertLessEqual(calls["poll"], 210)
        self.assertLessEqual(calls.get("modify", 0), 2)


class NoEpoll(ServerTest):
    """epoll_server.py where the platform has no epoll."""

    name = "select"

    def test_says_so(self) -> None:
        """It says so in one line, which names the script that runs everywhere."""
        prelude = "import select\nvars(select).pop('epoll', None)"
        named = "selectors_server.py"
        self.assert_refused(SCRIPTS["epoll"], named=named, prelude=prelude)


class SelectorsServer(TenThousand):
    """selectors_server.py: the best selector, or the one that is asked for."""

    name = "selectors"
    says = selectors.DefaultSelector.__name__

    def test_each_selector(self) -> None:
        """--selector takes each one that the platform has, and refuses the others."""
        for name in ("select", "poll", "epoll", "kqueue", "devpoll"):
            kind = f"{name.capitalize()}Selector"
            with self.subTest(name=name):
                if not hasattr(selectors, kind):
                    self.assert_refused(SCRIPTS[self.name], "--selector", name, named=name)
                    continue
                server = self.start("--quiet", "--selector", name)
                self.assertIn(f"({kind})", server.line)
                self.connect(server)
                sock = self.connect(server)
                [sent] = flood([sock], b"x" * 65536)
                self.assert_rests(server)
                self.assert_serves(server)
                self.assertEqual(len(receive(sock, sent)), sent)
                reset(sock)
                self.assert_serves(server)

    @LINUX
    def test_1300_clients_of_select(self) -> None:
        """With --selector select, the clients that it cannot watch wait."""
        need_files(self, 1400)
        self.assert_full_house(1300, range(1000, 1025), "--selector", "select", files=1400)


class AsyncServer(TenThousand):
    """async_server.py: a coroutine for each client."""

    name = "async"
    says = "asyncio"


# ---- The shared sections, in this process

class ConversationRule(unittest.TestCase):
    """The class Conversation, which is the same in all servers: known bytes in, known bytes out."""

    def setUp(self) -> None:
        self.conversation = load("select").Conversation

    def test_known(self) -> None:
        """What is read, piece by piece, and what is sent back for each piece."""
        for pieces, replies, finished in (
            ([b"hello\n", b"quit\n"], [b"hello\n", b"quit\n"], False),
            ([b"q\n"], [b""], True),
            ([b"q\r\n"], [b""], True),
            ([b"one\nq\ntwo\n"], [b"one\n"], True),
            ([b"one\r\nq\r\ntwo"], [b"one\r\n"], True),
            ([b"\n\nq\n"], [b"\n\n"], True),
            ([b"a\n", b"q\n"], [b"a\n", b""], True),
            ([b"a", b"\nq\n"], [b"a", b"\n"], True),
            ([b"a\nq", b"\n"], [b"a\nq", b""], True),
            ([b"a\nq\r", b"\nb"], [b"a\nq\r", b""], True),
            ([b"a\n", b"q\r", b"\n"], [b"a\n", b"q\r", b""], True),
            ([b"q"], [b""], True),
            ([b"hello", b"q"], [b"hello", b""], True),
            ([b"Ira", b"q"], [b"Ira", b""], True),
            ([b"Iraq", b"\n"], [b"Iraq", b"\n"], False),
            ([b"a\nqu", b"it\n"], [b"a\nqu", b"it\n"], False),
            ([b"q\r", b"q\n"], [b"q\r", b"q\n"], False),
            ([b"q\rq\n", b"\rq\n"], [b"q\rq\n", b"\rq\n"], False),
            ([b"x" * 65536, b"q"], [b"x" * 65536, b"q"], False),
            ([b"x" * 65536, b"q", b"q"], [b"x" * 65536, b"q", b""], True),
            ([b"x" * 65535, b"q"], [b"x" * 65535, b""], True),
            ([b"x" * 65535 + b"\n", b"q\n"], [b"x" * 65535 + b"\n", b""], True),
        ):
            with self.subTest(pieces=[piece[:20] for piece in pieces]):
                conversation = self.conversation()
                self.assertEqual([conversation.reply(piece) for piece in pieces], replies)
                self.assertEqual(conversation.finished, finished)

    def test_all_cuts(self) -> None:
        """However a text is cut, all before its q line comes back, and its end is noticed."""
        for before, quit_line in ((b"a\n", b"q\n"), (b"", b"q\r\n"), (b"Iraq\nx\n", b"q\n")):
            text = before + quit_line
            for pieces in cuts(text):
                if b"q" in pieces:  # ends it by itself
                    continue
                conversation = self.conversation()
                echo = b"".join(conversation.reply(piece) for piece in pieces)
                self.assertTrue(conversation.finished, pieces)
                self.assertIn(echo, (before, before + quit_line[:1], before + quit_line[:2]), pieces)
        for text in (b"Iraq\nx", b"\nqu\n", b"q\rq\n", b"\r\nq q", b"qq\nq\t\n"):
            for pieces in cuts(text):
                if b"q" not in pieces:
                    conversation = self.conversation()
                    echo = b"".join(conversation.reply(piece) for piece in pieces)
                    self.assertEqual((echo, conversation.finished), (text, False), pieces)

    def test_state_is_small(self) -> None:
        """It keeps some bytes of what was read, not all, and still notices a q line."""
        conversation = self.conversation()
        for _ in range(100):
            conversation.reply(b"x" * 65536)
        sizes = [len(value) for value in vars(conversation).values() if hasattr(value, "__len__")]
        self.assertLess(sum(sizes), 100)
        self.assertEqual(conversation.reply(b"\nq\n"), b"\n")
        self.assertTrue(conversation.finished)


class ConnectionOnReady(unittest.TestCase):
    """The class Connection, which four servers share, with a socket whose buffers are small."""

    def setUp(self) -> None:
        ours, self.client = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(self.client.close)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.setblocking(False)
        self.client.settimeout(DEADLINE)
        self.connection = load("select").Connection(ours, "a client")

    def read_all(self) -> bytes:
        """Read what is there, and let the connection send the rest, until nothing is unsent."""
        data = b""
        while self.connection.unsent:
            data += self.client.recv(65536)
            self.connection.on_ready()
        return data + self.client.recv(65536)

    def test_not_ready(self) -> None:
        """Without data, nothing is done, and that is said."""
        self.assertFalse(self.connection.on_ready())
        self.client.sendall(b"hello\n")
        self.assertTrue(self.connection.on_ready())
        self.assertEqual(self.client.recv(100), b"hello\n")
        self.assertFalse(self.connection.on_ready())
        self.assertFalse(self.connection.closed)

    def test_backpressure(self) -> None:
        """What the send buffer does not take is kept; until it is sent, nothing more is read."""
        data = random.Random(3).randbytes(60_000).replace(b"q", b"-")
        self.client.sendall(data)
        self.connection.on_ready()
        self.assertTrue(self.connection.unsent)
        self.client.sendall(b"more")
        kept = self.connection.unsent
        while self.connection.on_ready():  # there may be a little room yet
            self.assertLess(len(self.connection.unsent), len(kept))
            kept = self.connection.unsent
        self.assertTrue(self.read_all() == data)
        self.connection.on_ready()
        self.assertEqual(self.client.recv(100), b"more")

    def test_q(self) -> None:
        """After a q what is unsent is sent, then the end of stream; what follows is ignored."""
        text = b"x" * 60_000 + b"\n"
        self.client.sendall(text + b"q\nnot this")
        self.connection.on_ready()
        self.assertTrue(self.connection.unsent)
        self.assertEqual(self.read_all(), text)
        self.assertEqual(self.client.recv(100), b"")
        for _ in range(2):
            self.client.sendall(b"nor this")  # only one direction is shut down
            self.assertTrue(self.connection.on_ready())
        self.assertFalse(self.connection.closed)
        self.client.close()
        self.connection.on_ready()
        self.assertEqual(self.connection.closed, "quit")

    def test_end_of_stream(self) -> None:
        """An end of stream closes the connection, but only when all has been sent."""
        self.client.sendall(b"x" * 60_000)
        self.client.shutdown(socket.SHUT_WR)
        self.connection.on_ready()
        self.assertFalse(self.connection.closed)
        self.assertEqual(len(self.read_all()), 60_000)
        self.connection.on_ready()
        self.assertEqual(self.connection.closed, "end of stream")

    def test_broken_off(self) -> None:
        """A connection that the client breaks off is closed, with the reason."""
        self.client.sendall(b"x" * 60_000)
        self.connection.on_ready()
        self.client.close()
        self.connection.on_ready()
        self.assertTrue(self.connection.closed)


# ---- The client

class ClientTest(unittest.TestCase):
    """client.py, and servers that are made for a test."""

    def listen(self, *answers: Callable[[socket.socket], object], host: str = "127.0.0.1") -> int:
        """Return the port of a server, in a thread: each answer is for one connection."""
        listener = socket.create_server((host, 0))
        listener.settimeout(DEADLINE)

        def serve() -> None:
            with listener, contextlib.suppress(OSError):
                for answer in answers:
                    sock, _ = listener.accept()
                    with sock:
                        sock.settimeout(DEADLINE)
                        answer(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        self.addCleanup(thread.join)
        return int(listener.getsockname()[1])

    def start(self, port: int, *options: str, **more: Any) -> "Process":
        """Return client.py, with a pipe to its stdin."""
        more = {"stdin": subprocess.PIPE, **more}
        process = Process(CLIENT, "--port", str(port), *options, **more)
        self.addCleanup(process.kill)
        return process

    def terminal(self, port: int, *options: str, **more: Any) -> "Terminal":
        """Return client.py in a terminal of its own."""
        terminal = Terminal("--port", str(port), *options, **more)
        self.addCleanup(terminal.close)
        return terminal

    def assert_fails(self, process: "Process", *named: str, status: int = 1) -> None:
        """Fail unless the client ends with this status and one line with these words."""
        process.process.wait(DEADLINE)
        line = process.log().decode()
        self.assertEqual(process.process.returncode, status, line)
        self.assertRegex(line, r"\A[^\n]+\n\Z")
        for word in named:
            self.assertIn(word, line)


class ClientInPipe(ClientTest):
    """client.py < file"""

    def test_every_byte(self) -> None:
        """What comes back is on stdout, to the byte; a q line ends it."""
        server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(server.kill)
        data = b"\xff\0\r\n\n\xe4 quit\nqq\nwithout a newline"
        long = b"x" * 70_000 + b"q\n" + b"y" * 65_536 + b"q\n"
        for text, echo in ((data, data), (b"one\nq\ntwo\n", b"one\n"), (long, long), (b"", b"")):
            with self.subTest(text=text[:20]):
                process = self.start(server.port)
                self.assertTrue(process.output(text) == echo)
                self.assertEqual((process.log(), process.process.returncode), (b"", 0))

    @LINUX
    def test_memory(self) -> None:
        """It needs little memory, whatever is in the file."""
        server = Server(SCRIPTS["epoll"], "--quiet")
        self.addCleanup(server.kill)
        with tempfile.TemporaryFile() as file:
            file.truncate(64 << 20)
            process = self.start(server.port, stdin=file, prelude=SHOW_MEMORY)
            self.assertEqual(len(process.output()), 64 << 20)
        self.assertLess(int(process.log()), 64 << 10)  # KiB

    def test_nothing_after_q(self) -> None:
        """What stands after a q line is not sent; every other byte is."""
        for data, wanted in (
            (b"one\nq\ntwo\n", b"one\nq\n"),
            (b"one\r\nq\r\ntwo", b"one\r\nq\n"),
            (b"one\nq", b"one\nq\n"),
            (b"quit\n q\nqq", b"quit\n q\nqq"),
            (b"", b""),
        ):
            seen: list[bytes] = []

            def answer(sock: socket.socket, seen: list[bytes] = seen) -> None:
                seen.append(read_to_end(sock))
                sock.sendall(seen[0].replace(b"\nq\n", b"\n"))

            with self.subTest(data=data):
                process = self.start(self.listen(answer))
                process.output(data)
                self.assertEqual((seen, process.process.returncode), ([wanted], 0))

    def test_echo_at_once(self) -> None:
        """What comes back is written at once, before more is read or the server closes."""

        def answer(sock: socket.socket) -> None:
            sock.sendall(read_line(sock))
            read_to_end(sock)

        process = self.start(self.listen(answer))
        self.assertEqual(process.ask(b"hello\n"), b"hello\n")

    def test_server_leaves(self) -> None:
        """A server that closes, resets or sends too little: the connection is lost."""
        for way in ("close", "reset", "short"):
            with self.subTest(way=way):

                def answer(sock: socket.socket, way: str = way) -> None:
                    sock.sendall(read_line(sock)[: 3 if way == "short" else None])
                    if way == "reset":
                        reset(sock)

                process = self.start(port := self.listen(answer))
                process.send(b"hello\n")
                self.assert_fails(process, f"connection to 127.0.0.1:{port} lost")

    @POSIX
    def test_stdin_and_stdout(self) -> None:
        """stdin that cannot be read, stdout that cannot be written, and closed ones."""
        self.assert_fails(self.start(self.listen(read_to_end), stdin=os.open(os.devnull, os.O_WRONLY)),
                          "cannot read stdin")  # fmt: skip
        process = self.start(self.listen(lambda sock: sock.sendall(read_line(sock))))
        assert process.process.stdout
        process.process.stdout.close()
        process.send(b"hello\n")
        self.assert_fails(process, "cannot write to stdout")
        server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(server.kill)
        for prelude in ("sys.stdin = None", "sys.stdout = None"):
            for options in ((), ("--clients", "2")):
                process = self.start(server.port, *options, prelude="import sys\n" + prelude)
                process.output(b"hello\n")
                self.assertEqual((process.log(), process.process.returncode), (b"", 0))

    @POSIX
    def test_ctrl_c(self) -> None:
        """Ctrl-C ends it without a traceback, with the status that says so."""
        process = self.start(self.listen(lambda sock: sock.send(b"x\n") and read_to_end(sock)))
        self.assertEqual(process.ask(b""), b"x\n")
        process.wait_for_rest()
        process.process.send_signal(signal.SIGINT)
        process.process.wait(DEADLINE)
        self.assertEqual((process.log(), process.process.returncode), (b"\n", 130))

    def test_no_server(self) -> None:
        """Without a server, one line says how to start one."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for options in ((), ("--clients", "3")):
            with self.subTest(options=options):
                start = f"python select_server.py --port {port}"
                self.assert_fails(self.start(port, *options), f"no server answers at 127.0.0.1:{port}", start)

    def test_address(self) -> None:
        """By default it connects to 127.0.0.1:8088, else to --host and --port."""
        prelude = "import socket, sys\nsocket.create_connection = lambda a: sys.exit(f'{a[0]} {a[1]}')"
        for options, said in (((), b"127.0.0.1 8088"), (("--host=a", "--port=7"), b"a 7")):
            process = Process(CLIENT, *options, prelude=prelude)
            self.addCleanup(process.kill)
            process.output()
            self.assertEqual(process.log().split(b"\n")[0].strip(), said)

    @LINUX
    def test_host(self) -> None:
        """--host is used, by one client and by many."""
        for options in ((), ("--clients", "1")):
            port = self.listen(lambda sock: sock.sendall(b"!"), host="127.0.0.2")
            process = self.start(port, "--host", "127.0.0.2", *options)
            process.output(b"")
            self.assertNotIn(b"no server", process.log())

    def test_mistakes(self) -> None:
        """A mistake gets a message that names it."""
        for mistake in ("--port=65536", "--port=0", "--clients=0", "--clients=100000000000",
                        "--messages=x", "--size=-1", "--size=1000000000000000", "--pause=nan",
                        "--nonsense"):  # fmt: skip
            with self.subTest(mistake=mistake):
                process = Process(CLIENT, mistake)
                self.addCleanup(process.kill)
                self.assertEqual(process.output(), b"")
                self.assertEqual(process.process.returncode, 2)
                self.assertRegex(process.log().decode(), rf"error: .*{mistake.split('=')[0]}\b")


@POSIX
class ClientAtTerminal(ClientTest):
    """client.py, a conversation."""

    def test_conversation(self) -> None:
        """It prompts, prints the echo, and ends with q or Ctrl-D; any byte can be typed."""
        server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(server.kill)
        for language in ("C", "C.UTF-8"):
            for end, rest in ((b"q\n", b"q\r\n"), (b"\x04", b"\r\n")):
                with self.subTest(end=end, language=language):
                    terminal = self.terminal(server.port, language=language)
                    terminal.expect(b">>> ")
                    for line in (b"hello", b"", b"gr\xc3\xbcn \xff\xe4"):
                        terminal.type(line + b"\n")
                        terminal.expect(line + b"\r\n" + line + b"\r\n>>> ")
                    terminal.type(end)
                    terminal.expect(rest)
                    self.assertEqual(terminal.process.wait(DEADLINE), 0)

    def test_without_bytes(self) -> None:
        """It works where stdin and stdout are a terminal, but have no bytes: in IDLE."""
        server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(server.kill)
        process = self.start(server.port, prelude=IDLE)
        self.assertEqual(process.output(), ">>> grün\n>>> \n>>> ".encode())
        self.assertEqual((process.log(), process.process.returncode), (b"", 0))

    def test_echo_in_pieces(self) -> None:
        """It waits until the whole echo is there."""
        proceed = threading.Event()

        def answer(sock: socket.socket) -> None:
            line = read_line(sock)
            sock.sendall(line[:2])
            proceed.wait(DEADLINE)
            sock.sendall(line[2:])
            read_to_end(sock)

        terminal = self.terminal(self.listen(answer))
        terminal.expect(b">>> ")
        terminal.type(b"hello\n")
        terminal.expect(b"hello\r\n")
        self.assertEqual(select.select([terminal.keyboard], [], [], 0.1)[0], [])
        proceed.set()
        terminal.expect(b"hello\r\n>>> ")

    def test_half_a_terminal(self) -> None:
        """With only one of stdin and stdout at a terminal, there is no prompt."""
        server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(server.kill)
        terminal = self.terminal(server.port, stdin=subprocess.PIPE)
        assert terminal.process.stdin
        terminal.process.stdin.write(b"hello\nq\n")
        terminal.process.stdin.close()
        terminal.expect(b"hello\r\n")
        self.assertEqual(terminal.process.wait(DEADLINE), 0)
        terminal = self.terminal(server.port, stdout=subprocess.PIPE)
        terminal.type(b"hello\nq\n")
        assert terminal.process.stdout
        self.assertEqual(terminal.process.stdout.read(), b"hello\n")
        terminal.process.stdout.close()

    def test_ctrl_c(self) -> None:
        """Ctrl-C ends it without a traceback: at the prompt, and while it waits for an echo."""
        for typed in (b"", b"hello\n"):
            got = threading.Event()

            def answer(sock: socket.socket, got: threading.Event = got) -> None:
                if sock.recv(100):
                    got.set()
                    read_to_end(sock)

            with self.subTest(typed=typed):
                terminal = self.terminal(self.listen(answer))
                terminal.expect(b">>> ")
                if typed:
                    terminal.type(typed)
                    terminal.expect(b"hello\r\n")
                    self.assertTrue(got.wait(DEADLINE))
                terminal.process.send_signal(signal.SIGINT)
                terminal.expect(b"\r\n")
                self.assertEqual(terminal.process.wait(DEADLINE), 0)
                self.assertEqual(terminal.screen, b"")

    def test_server_leaves(self) -> None:
        """A server that leaves in the middle of an echo is told in one line."""
        terminal = self.terminal(port := self.listen(lambda sock: sock.sendall(read_line(sock)[:3])))
        terminal.expect(b">>> ")
        terminal.type(b"hello\n")
        terminal.expect(f"hello\r\nconnection to 127.0.0.1:{port} lost: ".encode())
        self.assertEqual(terminal.process.wait(DEADLINE), 1)


class ClientFigures(unittest.TestCase):
    """The texts that client.py makes of known numbers."""

    def test_picture(self) -> None:
        """A row for each client: dots until its first echo, then # until its end."""
        spans = [(0.5, 2.0), (1.0, 4.0), (0.0, 3.0), (4.0, 4.0)]
        self.assertEqual(
            client.picture(spans, 72).splitlines(),
            [
                ". waits for its first echo   # is served",
                "",
                "client  0            1            2            3            4 s",
                "        |------------|------------|------------|------------|",
                "     1  " + "." * 6 + "#" * 20,
                "     2  " + "." * 13 + "#" * 39,
                "     3  " + "." * 39,
                "     4  " + "." * 52 + "#",
            ],
        )

    def test_width(self) -> None:
        """It fits into the width, however long the run, and has a least width."""
        for width, most in ((72, 72), (200, 200), (100, 100), (20, 54), (0, 54)):
            for seconds in (0.0012345, 1.0, 3599.9):
                lines = client.picture([(seconds / 2, seconds)] * 3, width).splitlines()
                self.assertLessEqual(max(map(len, lines)), most)
                self.assertEqual(lines[-1].count("."), lines[-1].count("#"))

    def test_many_rows(self) -> None:
        """Of more than 20 clients, 20 are shown, the first and the last among them."""
        rows = client.picture([(1.0, 2.0)] * 41, 72).splitlines()
        self.assertEqual(rows[1], "20 of the 41 clients, evenly spaced")
        self.assertEqual(
            [int(row.split()[0]) for row in rows[5:]],
            [1, 3, 5, 7, 9, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 33, 35, 37, 39, 41],
        )
        rows = client.picture([(1.0, 2.0)] * 20, 72).splitlines()
        self.assertEqual([int(row.split()[0]) for row in rows[4:]], list(range(1, 21)))

    def test_figures(self) -> None:
        """Rate, median, 99th percentile and maximum."""
        times = [0.001] * 60 + [0.002] * 38 + [0.05, 2.5]
        random.Random(4).shuffle(times)
        self.assertEqual(
            client.figures(times, 2.0),
            "100 messages in 2 s: 50 a second\n"
            "time to an echo: median 1.00 ms, 99th percentile 50.00 ms, maximum 2,500.00 ms",
        )
        text = "1 messages in 0.5 s: 2 a second\n"
        text += "time to an echo: median 3.00 ms, 99th percentile 3.00 ms, maximum 3.00 ms"
        self.assertEqual(client.figures([0.003], 0.5), text)
        self.assertEqual(client.figures([], 0.25), "0 messages in 0.25 s: 0 a second")


class ClientMany(ClientTest):
    """client.py --clients"""

    def spans(self, output: bytes) -> list[tuple[int, int, int]]:
        """Return of each row of the picture the client, the dots and all columns."""
        rows = re.findall(r"^ *(\d+)  (\.*)(#*)\r?$", output.decode(), re.MULTILINE)
        return [(int(number), len(dots), len(dots + served)) for number, dots, served in rows]

    def test_at_once(self) -> None:
        """All clients talk at the same time, and each of their messages is echoed."""
        server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(server.kill)
        options = ("--clients", "30", "--messages", "20", "--pause", "0.02")
        process = self.start(server.port, *options)
        output = process.output(b"")
        self.assertEqual((process.log(), process.process.returncode), (b"", 0))
        self.assertIn(b"20 of the 30 clients", output)
        self.assertIn(b"600 messages in ", output)
        spans = self.spans(output)
        self.assertEqual((len(spans), spans[0][0], spans[-1][0]), (20, 1, 30))
        self.assertLess(max(dots for _, dots, _ in spans), min(end for _, _, end in spans))
        self.assertLessEqual(max(map(len, output.splitlines()[:-2])), 72)

    def test_staircase(self) -> None:
        """One after another if the server has one thread, four at a time if it has four."""
        for threads in (1, 4):
            server = Server(SCRIPTS["blocking"], "--quiet", "--threads", str(threads))
            self.addCleanup(server.kill)
            options = ("--clients", "10", "--messages", "3", "--pause", "0.05")
            spans = self.spans(self.start(server.port, *options).output(b""))
            self.assertEqual([number for number, _, _ in spans], list(range(1, 11)))
            for i, (_, dots, _) in enumerate(spans):
                before = sum(end <= dots + 1 for _, _, end in spans)  # how many had left by then
                self.assertEqual(before, i - i % threads)

    def test_measures(self) -> None:
        """The times that it prints are those that a clock shows."""

        def answer(sock: socket.socket) -> None:
            while (line := read_line(sock)) != b"q\n":
                time.sleep(0.05)
                sock.sendall(line)

        process = self.start(self.listen(answer), "--clients=1", "--messages=4", "--pause=0.1")
        start = time.monotonic()
        text = process.output(b"").decode()
        elapsed = time.monotonic() - start
        found = re.search(r"4 messages in ([\d.]+) s: (\d+) a second\D+([\d.]+) ms", text)
        assert found, text
        seconds, rate, median = map(float, found.groups())
        self.assertTrue(4 * 0.05 + 3 * 0.1 < seconds < elapsed, text)
        self.assertAlmostEqual(rate, 4 / seconds, delta=0.5)
        self.assertTrue(50 <= median < 100, text)
        [(_, dots, end)] = self.spans(text.encode())
        self.assertTrue(1 <= dots < end / 2, text)

    def test_what_is_sent(self) -> None:
        """Each message has --size bytes; after the last one comes a q."""
        seen: list[bytes] = []

        def answer(sock: socket.socket) -> None:
            while (line := read_line(sock)) != b"q\n":
                seen.append(line)
                sock.sendall(line)

        for size in (1, 9, 64):
            options = ("--clients=2", "--messages=3", f"--size={size}")
            self.start(self.listen(answer, answer), *options).output(b"")
            self.assertEqual([len(line) for line in seen], [size] * 6)
            if size > 8:
                self.assertEqual(len(set(seen)), 6, "one client's message is not another's")
            seen.clear()

    def test_large_messages(self) -> None:
        """Messages that no buffer can hold are sent and read at the same time, and soon."""
        server = Server(SCRIPTS["epoll"], "--quiet")
        self.addCleanup(server.kill)
        process = self.start(server.port, "--clients=2", "--messages=2", "--size=20000000")
        self.assertIn(b"4 messages", process.output(b""))
        self.assertEqual((process.log(), process.process.returncode), (b"", 0))

    def test_wrong_echo(self) -> None:
        """An echo that differs in a byte, or is too long, is counted."""
        for end in (b"x\n", b"t \n\n"):

            def answer(sock: socket.socket, end: bytes = end) -> None:
                sock.sendall(read_line(sock)[:-2] + end)

            port = self.listen(answer)
            process = self.start(port, "--clients=1", "--messages=1")
            process.output(b"")
            self.assert_fails(process, "differ: 1")

    def test_lost(self) -> None:
        """A connection that ends too early, or by a reset, is counted; the others go on."""
        for leave in (lambda sock: sock.close(), reset):

            def lose(sock: socket.socket, leave: Callable[[socket.socket], object] = leave) -> None:
                read_line(sock)
                leave(sock)

            def echo(sock: socket.socket) -> None:
                while (line := read_line(sock)) != b"q\n":
                    sock.sendall(line)

            process = self.start(self.listen(lose, echo), "--clients=2", "--messages=5")
            output = process.output(b"")
            self.assert_fails(process, "lost: 1,", "differ: 0")
            self.assertIn(b"5 messages", output)
            self.assertEqual([end > dots for _, dots, end in self.spans(output)], [False, True])

    @POSIX
    def test_unwritten(self) -> None:
        """A stdout that cannot be written to is told, and not mistaken for the server."""
        server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(server.kill)
        reader, writer = os.pipe()
        os.close(reader)
        process = self.start(server.port, "--clients=2", stdout=writer)
        os.close(writer)
        self.assert_fails(process, "cannot write to stdout")

    @POSIX
    def test_progress(self) -> None:
        """A longer run shows its progress at a terminal, and only there."""
        server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(server.kill)
        options = ("--clients=2", "--messages=3", "--pause=0.4")
        process = self.start(server.port, *options)
        terminal = self.terminal(server.port, *options)
        terminal.expect(b"1 s: 4 messages\r")
        self.assertEqual(terminal.process.wait(DEADLINE), 0)
        self.assertIn(b"6 messages in ", process.output(b""))
        self.assertEqual(process.log(), b"")

    @LINUX
    def test_too_many(self) -> None:
        """More clients than it may open files for: one line says so, and what to do."""
        port = self.listen(read_to_end)
        process = self.start(port, "--clients", "100", files=64)
        process.output(b"")
        self.assert_fails(process, "cannot be 100 clients", "ulimit -n 150")
        socket.create_connection(("127.0.0.1", port), DEADLINE).close()


# ---- The pages

class Pages(unittest.TestCase):
    """What the scripts have in common is the same, and each stands alone."""

    def sections(self, name: str) -> dict[str, str]:
        """Return the text of each section of a server, by its banner."""
        parts = re.split(r"^# ---- (.+)\n", SCRIPTS[name].read_text(encoding="utf-8"), flags=re.MULTILINE)
        return {"the head": parts[0], **dict(zip(parts[1::2], parts[2::2]))}

    def test_shared_sections(self) -> None:
        """Each section that is said to be the same is the same, in the same order."""
        every = {name: self.sections(name) for name in NAMES}
        client_section = "A client: the same in nonblocking, select, epoll and selectors"
        shared = ["The conversation: the same in all servers", "The command line: the same in all servers"]
        for name, sections in every.items():
            clients = [client_section] if name not in ("blocking", "async") else []
            self.assertEqual(list(sections), ["the head", "The model", *clients, *shared])
            self.assertEqual(sections[shared[0]], every["select"][shared[0]], name)
            if clients:
                self.assertEqual(sections[client_section], every["select"][client_section], name)
            constants = [x for x in sections["the head"].splitlines() if re.match(r"[A-Zl]\w+ = ", x)]
            self.assertEqual(len(constants), 4)
            self.assertLessEqual(set(constants), set(every["select"]["the head"].splitlines()))

    def test_main(self) -> None:
        """main has the same lines everywhere, but for the model, and more for an option."""
        mains = []
        for name in NAMES:
            text = self.sections(name)["The command line: the same in all servers"]
            mains.append([x for x in text.splitlines() if not re.search(r"listening on|serve\(", x)])
        shortest = min(mains, key=len)
        for lines in mains:
            rest = iter(lines)
            self.assertTrue(all(line in rest for line in shortest), lines)

    def test_model_first(self) -> None:
        """The call that is the model stands in the upper half of each page."""
        calls = {"blocking": "listener.accept()", "nonblocking": "connection.on_ready()",
                 "select": "select.select(readers, writers, [])", "epoll": "epoll.poll()",
                 "selectors": "selector.select()", "async": "loop.sock_accept("}  # fmt: skip
        for name, call in calls.items():
            lines = SCRIPTS[name].read_text(encoding="utf-8").splitlines()
            self.assertLess([call in line for line in lines].index(True), 85, name)

    def test_each_stands_alone(self) -> None:
        """A server imports the standard library only, and runs in an empty folder."""
        ours = {path.stem for path in HERE.glob("*.py")}
        for script in SCRIPTS.values():
            tree = ast.parse(script.read_text(encoding="utf-8"))
            imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
            names = {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
            names |= {x.name for node in imports if isinstance(node, ast.Import) for x in node.names}
            self.assertFalse(ours & names)
            known = getattr(sys, "stdlib_module_names", names)  # since CPython 3.10
            self.assertLessEqual({x.partition(".")[0] for x in names}, {x.partition(".")[0] for x in known})


class Readme(unittest.TestCase):
    """What README.md says is so."""

    text = (HERE / "README.md").read_text(encoding="utf-8")

    def program(self, name: str) -> str:
        """Return the program of the README whose first line has this name."""
        found = re.search(rf'```python\n("""{name}.*?)```', self.text, re.DOTALL)
        assert found, name
        return found[1]

    def assert_program_serves(self, name: str) -> None:
        """Fail unless the program echoes, to several clients at once, and ends with Ctrl-C."""
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, name)
            script.write_text(self.program(name).replace("8088", "0"), encoding="utf-8")
            server = Server(script)
            self.addCleanup(server.kill)
            first, second = server.connect(), server.connect()
            with first, second:
                for sock in (first, second, first):
                    for text in (b"hello\n", b"x" * 100_000):
                        self.assertEqual(exchange(sock, text), text)
                reset(second)
                first.sendall(b"still there?\n")
                self.assertEqual(receive(first, 13), b"still there?\n")

    @LINUX
    def test_signal_driven(self) -> None:
        """The program for the model without a script, signal-driven I/O, works."""
        self.assert_program_serves("signal_server.py")

    def test_streams(self) -> None:
        """The twin of async_server.py with streams works."""
        self.assert_program_serves("streams_server.py")

    def exercises(self) -> list[tuple[str, str, str, str]]:
        """Return of each exercise the script, what stands there, what to write, and the test."""
        rows = re.findall(r"^\| `(\w+\.py)` \| `(.+?)` \| `(.+?)` \| .+ \| (.+) \|$", self.text, re.MULTILINE)
        return [(script, old, new, test.strip("`")) for script, old, new, test in rows]

    def test_exercises(self) -> None:
        """Each change of the table "Break it", made in a copy, is noticed by its test."""
        exercises = self.exercises()
        self.assertGreaterEqual(len(exercises), 10)
        self.assertLessEqual({script.name for script in SCRIPTS.values()}, {x[0] for x in exercises})
        with tempfile.TemporaryDirectory() as folder:
            folders = (Path(folder, str(i)) for i in itertools.count())
            with ThreadPoolExecutor(2) as pool:
                results = list(pool.map(self.run_broken, folders, exercises))
        for (script, old, _, test), (status, text) in zip(exercises, results):
            with self.subTest(script=script, old=old):
                self.assertIn("Ran 1 test", text)
                if "skipped" not in text:
                    self.assertEqual(status == 0, test.startswith("none"), text[-1000:])

    def run_broken(self, folder: Path, exercise: tuple[str, str, str, str]) -> tuple[int, str]:
        """Run a test in a copy of all scripts, one of which is changed; return how it ended."""
        script, old, new, test = exercise
        folder.mkdir()
        for path in (*HERE.glob("*.py"), HERE / "README.md"):
            text = path.read_text(encoding="utf-8")
            if path.name == script:
                self.assertEqual(text.count(old), 1, f"{old} in {script}")
                text = text.replace(old, new)
            text = text.replace("DEADLINE = 10.0", "DEADLINE = 3.0")
            (folder / path.name).write_text(text, encoding="utf-8")
        process = Process(folder / "test_all.py", test.rpartition(" ")[2].strip("`"))
        process.output(seconds=60)
        process.kill()
        return process.process.returncode, process.log().decode()


# ---- The measurement

class Run(NamedTuple):
    """What some clients saw of a server, and the CPU time that it used meanwhile."""

    times: list[float]  # seconds to each echo
    seconds: float  # of the whole run
    cpu: float  # seconds

    @property
    def rate(self) -> float:
        """Messages a second."""
        return len(self.times) / self.seconds


BENCHMARK = (
    "blocking",
    "blocking --threads 1000",
    "nonblocking",
    "select",
    "epoll",
    "selectors",
    "selectors --selector poll",
    "async",
)
HEAD = """\
Messages of 64 bytes, each sent after the echo of the one before; medians of three runs
/s: messages a second; 99%: 99th percentile of the time to an echo

                                   1 client        100 clients     CPU a    CPU  10 clients
                               /s    median       /s       99%   message   idle  beside 900 silent, /s (# is 5,000)"""


def table_row(name: str, one: Run, hundred: Run, idle: "float | None", ten: "Run | None") -> str:
    """Return the line of a server: with 1, 100 and 10 clients, and its share of a core when idle."""
    slow = sorted(hundred.times)[math.ceil(len(hundred.times) * 0.99) - 1]
    cpu = share = "-"
    if idle is not None:
        cpu, share = f"{hundred.cpu / len(hundred.times) * 1e6:.1f} us", f"{idle:.1%}"
    beside = f"{ten.rate:7,.0f} " + "#" * round(ten.rate / 5000) if ten else "one at a time"
    return (
        f"{name:26}{one.rate:7,.0f}{statistics.median(one.times) * 1000:7.2f} ms"
        f"{hundred.rate:9,.0f}{slow * 1000:7.1f} ms{cpu:>10}{share:>7}  {beside}"
    )


def run_clients(server: "Server", clients: int, messages: int) -> Run:
    """Let some clients talk to the server. Raises AssertionError if one was not served well."""
    before = server.cpu() if sys.platform == "linux" else 0.0
    crowd = [client.Client(number, messages, 64) for number in range(clients)]
    with selectors.DefaultSelector() as selector:
        start = client.run(crowd, selector, "127.0.0.1", server.port, 0)
    used = server.cpu() - before if sys.platform == "linux" else 0.0
    problems = [one.problem for one in crowd if one.problem]
    assert not problems, problems
    times = [seconds for one in crowd for seconds in one.echo_times]
    return Run(times, max(one.closed_at for one in crowd) - start, used)


def measure(server: "Server", clients: int, seconds: float) -> Run:
    """Return the median of three runs, each of about so many seconds."""
    messages = 5
    runs: list[Run] = []
    while len(runs) < 3:
        run = run_clients(server, clients, messages)
        if run.seconds > seconds / 2:
            runs.append(run)
        else:
            messages *= max(2, int(seconds / run.seconds))
    return sorted(runs, key=lambda run: run.rate)[1]


def idle_cpu(server: "Server", seconds: float) -> "float | None":
    """Return the share of a core that the server uses while all clients are silent."""
    if sys.platform != "linux":
        return None
    before, start = server.cpu(), time.monotonic()
    time.sleep(seconds)
    return (server.cpu() - before) / (time.monotonic() - start)


def benchmark(names: Iterable[str], seconds: float = 1.0) -> None:
    """Measure servers, each a name with its options; print a row as soon as it is measured."""
    print(f"CPython {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    print(HEAD)
    for name in names:
        script, *options = name.split()
        if script == "epoll" and not hasattr(select, "epoll"):
            print(f"{name:26}not on this platform")
            continue
        with contextlib.ExitStack() as stack:
            server = Server(SCRIPTS[script], "--quiet", *options)
            stack.callback(server.kill)
            one, hundred = measure(server, 1, seconds), measure(server, 100, seconds)
            silent = [stack.enter_context(server.connect()) for _ in range(100)]
            if name != "blocking":
                measure(server, 1, 0)  # it is served, so those before it have been accepted
            idle, ten = idle_cpu(server, seconds), None
            if name != "blocking":
                silent += [stack.enter_context(server.connect()) for _ in range(800)]
                ten = measure(server, 10, seconds)
            print(table_row(name, one, hundred, idle, ten), flush=True)


class Benchmark(unittest.TestCase):
    """The figures of --benchmark."""

    def test_row(self) -> None:
        """A row is made of known numbers."""
        one = Run([0.002] * 6 + [0.5] * 4, 4.0, 0.1)
        hundred = Run([0.001] * 98 + [0.0341, 9.0], 0.05, 0.00123)
        self.assertEqual(
            table_row("select", one, hundred, 0.0451, Run([1.0] * 60_000, 4.0, 0.0)),
            "select                          2   2.00 ms    2,000   34.1 ms   12.3 us   4.5%"
            "   15,000 ###",
        )
        row = table_row("blocking", one, hundred, None, None)
        self.assertRegex(row, r"34\.1 ms +- +-  one at a time$")

    @LINUX
    def test_measure(self) -> None:
        """What is measured is what a clock and the kernel show; of three runs, the median."""
        server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(server.kill)
        before, start = server.cpu(), time.monotonic()
        run = run_clients(server, 3, 400)
        elapsed, used = time.monotonic() - start, server.cpu() - before
        self.assertEqual(len(run.times), 1200)
        self.assertTrue(0 < run.seconds <= elapsed)
        self.assertLessEqual(sum(run.times), 3 * run.seconds)
        self.assertGreater(sum(run.times), run.seconds)
        self.assertAlmostEqual(run.cpu, used, delta=0.03)
        self.assertGreater(measure(server, 1, 0.1).seconds, 0.05)
        runs = iter([Run([1.0], seconds, 0) for seconds in (3.0, 1.0, 2.0)])
        with mock.patch(f"{__name__}.run_clients", lambda *_: next(runs)):
            self.assertEqual(measure(server, 1, 0.1).seconds, 2.0)
        self.assertLess(idle_cpu(server, 0.2) or 0, 0.2)

    @LINUX
    def test_idle_cpu(self) -> None:
        """A server that never sleeps uses a whole core while it is idle."""
        server = Server(SCRIPTS["nonblocking"], "--interval", "0", "--quiet")
        self.addCleanup(server.kill)
        self.assertGreater(idle_cpu(server, 0.3) or 0, 0.3)

    def test_benchmark(self) -> None:
        """The table has a head, and a row for each server."""
        with contextlib.redirect_stdout(io.StringIO()) as output:
            benchmark(["select", "blocking"], 0.02)
        self.assertRegex(output.getvalue(), r"(?s)CPython .*\nselect .*\nblocking .* one at a time\n")


# ---- The tools of the tests

ENVIRONMENT = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
PRELUDE = "{}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
FAULTY_ACCEPT = """
import errno, select, socket
accept, plan = socket.socket.accept, iter(%s)
def faulty(listener):
    "Do what the plan says about each client that waits: accept it (None), or fail."
    waits = select.select([listener], [], [], None if listener.getblocking() else 0)[0]
    fault = next(plan, None) if waits else None
    if fault == "no address":
        return accept(listener)[0], None
    if fault:
        raise OSError(getattr(errno, fault), "a fault of the test")
    return accept(listener)
socket.socket.accept = faulty
"""
ENDLESS = """
import socket
recv, endless = socket.socket.recv, set()
def receive(sock, size):
    "Receive; but a client that has said endless or q sends without end."
    data = b"m" if sock in endless else recv(sock, size)
    if data.startswith((b"endless", b"q")):
        endless.add(sock)
    return data
socket.socket.recv = receive
"""
COUNT_CALLS = """
import atexit, collections, sys
calls = collections.Counter()
def count(frame, event, function):
    if event == "c_call":
        calls[function.__name__] += 1
atexit.register(lambda: (sys.setprofile(None), print(dict(calls), file=sys.stderr)))
sys.setprofile(count)
"""
SHOW_ADDRESS = """
import socket, sys
def show(address, backlog=None, **options):
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    print(host, address[1], backlog)
    sys.exit()
socket.create_server = show
"""
SHOW_MEMORY = """
import atexit, sys
status = lambda: dict(line.split(":") for line in open("/proc/self/status"))
atexit.register(lambda: print(status()["VmHWM"].split()[0], file=sys.stderr))
"""
IDLE = """
import io, sys
class Terminal(io.TextIOBase):
    encoding = "utf-8"
    lines = iter(["gr\\u00fcn\\n", "\\n", "q\\n"])
    write = sys.stdout.buffer.write
    def isatty(self): return True
    def readline(self): return next(self.lines)
    def write(self, text, out=sys.stdout.buffer): return out.write(text.encode("utf-8"))
sys.stdin = sys.stdout = Terminal()
"""


def setUpModule() -> None:
    """Give the scripts a Ctrl-C even if we were started without, and us enough files."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform != "win32":
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 10_400) if most > 0 else 10_400, most))


def need_files(test: unittest.TestCase, number: int) -> None:
    """Skip a test that needs more open files than a process may have here."""
    if sys.platform != "win32":
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files < number:
            test.skipTest(f"needs {number} open files, and a process may have {files} here")


def load(name: str) -> ModuleType:
    """Return a server as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS[name])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eventually(condition: Callable[[], object], what: str) -> None:
    """Return as soon as the condition is true. Raises AssertionError at the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen: {what}")
        time.sleep(0.001)


class Process:
    """A script as a subprocess."""

    def __init__(self, script: Path, *options: str, prelude: str = "", files: int = 0, **more: Any) -> None:
        """Start it, after the prelude, a program; with files, it may open only so many."""
        if files:
            more["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        command = ["-c", PRELUDE.format(prelude), str(script)] if prelude else [str(script)]
        pipe = subprocess.PIPE
        more = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, **more}
        self.process = subprocess.Popen([sys.executable, *command, *options], env=ENVIRONMENT, **more)
        self.pid = self.process.pid
        self.said = bytearray()
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self) -> None:
        """Take what it says on stderr."""
        assert self.process.stderr
        while data := os.read(self.process.stderr.fileno(), 65536):
            self.said += data

    def log(self) -> bytes:
        """Return what it has said on stderr, all of it if it has ended."""
        if self.process.poll() is not None:
            self.listener.join(DEADLINE)
        return bytes(self.said).replace(b"\r\n", b"\n")

    def wait_for_log(self, pattern: bytes) -> None:
        """Wait until a line on stderr matches. Raises AssertionError at the deadline."""
        eventually(lambda: re.search(pattern, self.log()), f"{pattern!r} in {self.log()[-500:]!r}")

    def state(self) -> str:
        """Return the kernel's letter for what it does: R if it runs, or would; S if it sleeps."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]

    def wait_for_rest(self) -> None:
        """Wait until it sleeps in a call. Raises AssertionError at the deadline.

        Of a signal in the microsecond before such a call, Python learns only after it.
        """
        if sys.platform == "linux":
            eventually(lambda: self.state() == "S", "a process that sleeps")

    def send(self, data: bytes) -> None:
        """Write data to its stdin."""
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def ask(self, data: bytes) -> bytes:
        """Write data to its stdin; return the next line of its stdout. Kills it at the deadline."""
        assert self.process.stdout
        if data:
            self.send(data)
        watchdog = threading.Timer(DEADLINE, self.process.kill)
        watchdog.start()
        line = bytes(self.process.stdout.readline())
        watchdog.cancel()
        return line.replace(b"\r\n", b"\n")

    def output(self, data: "bytes | None" = None, seconds: float = DEADLINE) -> bytes:
        """Give it data on stdin; return the rest of its stdout when it has ended.

        Kills it at the deadline.
        """
        watchdog = threading.Timer(seconds, self.process.kill)
        watchdog.start()
        feeder = threading.Thread(target=self.feed, args=[data or b""])
        feeder.start()
        output = self.process.stdout.read() if self.process.stdout else b""
        feeder.join()
        self.process.wait()
        watchdog.cancel()
        return bytes(output)

    def feed(self, data: bytes) -> None:
        """Write data to its stdin, and close it."""
        if self.process.stdin:
            with contextlib.suppress(OSError), self.process.stdin as stdin:
                stdin.write(data)

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.wait()
        self.listener.join(DEADLINE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


class Server(Process):
    """A server as a subprocess, listening."""

    def __init__(self, script: Path, *options: str, **more: Any) -> None:
        """Start it and wait until it listens. Raises AssertionError if it does not."""
        if "--port" not in options and "README" not in str(script):
            options = ("--port", "0", *options)
        super().__init__(script, *options, **more)
        self.line = self.ask(b"").decode().strip()
        match = re.match(r"listening on 127\.0\.0\.1:(\d+) ", self.line)
        if not match:
            self.kill()
            raise AssertionError(f"{self.line!r} does not say that it listens; {self.log()[-500:]!r}")
        self.port = int(match[1])

    def connect(self) -> socket.socket:
        """Return a new connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), DEADLINE)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Keep it from running for a while: what clients do meanwhile, it finds all at once."""
        self.wait_for_rest()
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def descriptors(self) -> int:
        """Return how many file descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Return its resident memory, in bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float:
        """Return the CPU time that it has used, user and system, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def sleeps(self) -> bool:
        """Return whether it does not run at all for an eighth of a second."""

        def trace() -> object:
            status = Path(f"/proc/{self.pid}/status").read_text()
            return re.findall(r"ctxt_switches:\t(\d+)", status), self.cpu()

        before = trace()
        time.sleep(0.12)
        return trace() == before


class Terminal:
    """client.py in a terminal of its own."""

    def __init__(self, *options: str, language: str = "C.UTF-8", **more: Any) -> None:
        """Start it; stdin or stdout may be something else than the terminal."""
        self.keyboard, theirs = os.openpty()
        more = {"stdin": theirs, "stdout": theirs, "stderr": theirs, **more}
        environment = {**ENVIRONMENT, "LC_ALL": language}
        command = [sys.executable, str(CLIENT), *options]
        self.process = subprocess.Popen(command, env=environment, **more)
        os.close(theirs)
        self.screen = b""

    def close(self) -> None:
        """End client.py and close its terminal."""
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)

    def type(self, keys: bytes) -> None:
        """Type the keys."""
        os.write(self.keyboard, keys)

    def expect(self, text: bytes) -> None:
        """Wait for the text, right after what has been expected before. Raises AssertionError."""
        while len(self.screen) < len(text) and select.select([self.keyboard], [], [], DEADLINE)[0]:
            try:
                self.screen += os.read(self.keyboard, 65536)
            except OSError:  # it has ended
                break
        if not self.screen.startswith(text):
            raise AssertionError(f"expected {text!r}, and saw {self.screen!r}")
        self.screen = self.screen[len(text) :]


@contextlib.contextmanager
def in_thread(sock: socket.socket, work: Callable[..., object], *args: Any) -> Iterator[None]:
    """Do the work in a thread, which ends with the work or, after a failure, with the connection."""

    def run() -> None:
        with contextlib.suppress(OSError):
            work(*args)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        raise
    finally:
        thread.join(DEADLINE)


def receive(sock: socket.socket, size: int) -> bytes:
    """Return the next size bytes, or what comes before the connection ends."""
    data = bytearray()
    while len(data) < size and (part := sock.recv(size - len(data))):
        data += part
    return bytes(data)


def read_to_end(sock: socket.socket) -> bytes:
    """Return what comes until the connection ends."""
    data = bytearray()
    while part := sock.recv(65536):
        data += part
    return bytes(data)


def read_line(sock: socket.socket) -> bytes:
    """Return what comes up to a newline."""
    line = b""
    while not line.endswith(b"\n") and (byte := sock.recv(1)):
        line += byte
    return line


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send data and meanwhile read; return as many bytes as were sent."""
    with in_thread(sock, sock.sendall, data):
        return receive(sock, len(data))


def reset(sock: socket.socket) -> None:
    """Close a connection with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def flood(socks: list[socket.socket], data: bytes, most: int = 1 << 28) -> list[int]:
    """Send data again and again on each connection, without reading, until nothing goes.

    Returns how many bytes were sent on each, which are at most so many.
    """
    sent = dict.fromkeys(socks, 0)
    for sock in socks:
        sock.setblocking(False)
    while open_ones := [sock for sock in socks if sent[sock] < most]:
        ready = select.select([], open_ones, [], 0.05)[1]
        if not ready:
            break
        for sock in ready:
            with contextlib.suppress(BlockingIOError):
                sent[sock] += sock.send(memoryview(data)[sent[sock] % len(data) :])
    for sock in socks:
        sock.settimeout(DEADLINE)
    return list(sent.values())


def cuts(text: bytes) -> Iterator[list[bytes]]:
    """Yield the text in all the ways in which it can be cut into pieces."""
    for places in itertools.product((False, True), repeat=len(text) - 1):
        ends = [i for i, cut in enumerate(places, 1) if cut] + [len(text)]
        yield [text[start:end] for start, end in zip([0, *ends], ends)]


del ServerTest, EveryServer, ManyAtOnce, TenThousand  # only what is derived from them is a test

if __name__ == "__main__":
    if sys.argv[1:] == ["--benchmark"]:
        setUpModule()
        benchmark(BENCHMARK)
    else:
        unittest.main()
