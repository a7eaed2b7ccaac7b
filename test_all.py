"""Tests of the six echo servers and of their client; with --benchmark, their measurement.

    python test_all.py                              everything, in about a minute
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
        command = [sys.executable, "select_server.py", "--port", "0", "--quiet"]
        server = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE)
        self.addCleanup(server.communicate)
        self.addCleanup(server.kill)  # whatever happens here, no process stays behind
        assert server.stdout
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
    """Tests of a script: what they do, and what they want to see."""

    name = ""
    options: tuple[str, ...] = ()
    server: "Server"  # for all tests of a class; some need one of their own
    one_at_a_time = False  # serves a client only when the one before has left
    polls = False  # uses CPU while it is idle

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
        if "prelude" in more and self.name == "async" and sys.platform == "win32":
            self.skipTest("on Windows asyncio does not call accept() and recv() of a socket")
        server = Server(SCRIPTS[self.name], *self.options, *options, **more)
        self.addCleanup(server.kill)
        return server

    def connect(self, server: "Server | None" = None) -> socket.socket:
        """Return a connection to the server of all tests, or to another."""
        sock = (server or self.server).connect()
        self.addCleanup(sock.close)
        return sock

    def hello(self, server: "Server | None" = None) -> socket.socket:
        """Return a connection whose first message has come back."""
        sock = self.connect(server)
        self.assert_echo(sock, b"hello\n")
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
        if sys.platform == "win32":
            return
        if not at_work:
            server.wait_for_rest()
        elif self.name == "async" and sys.version_info < (3, 11):
            self.skipTest("before CPython 3.11, asyncio may print a traceback")
        pressed = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        self.assertEqual(server.output(), b"", "stdout has one line only")
        self.assertLess(time.monotonic() - pressed, 1)
        self.assertEqual(server.process.returncode, 0, server.log()[-500:])
        self.assertRegex(server.log(), rb"(\A|\n)[\d:.]+ stopped\n\Z")
        self.assertNotIn(b"Traceback", server.log())

    def assert_refused(self, *options: str, message: str, **more: Any) -> None:
        """Fail unless the script ends with an error: a line that names it, after the usage."""
        process = Process(SCRIPTS[self.name], "--port", "0", *options, **more)
        self.addCleanup(process.kill)
        self.assertEqual(process.output(), b"")
        self.assertGreater(process.process.returncode, 0)
        log = process.log().decode()
        self.assertRegex(log, rf"\A(usage: .*\n( .*\n)*)?.*{re.escape(message)}.*\n")
        self.assertNotIn("Traceback", log)

    def assert_full_house(self, clients: int, room: range, *options: str, files: int) -> None:
        """Fail unless clients are served while there is room, and the next ones as they leave."""
        need_files(self, files)
        server = self.start(*options, files=files)
        socks = [self.connect(server) for _ in range(clients)]
        answers = select.poll()
        for sock in socks:
            sock.sendall(b"hello\n")
            answers.register(sock, select.POLLIN)
        eventually(lambda: len(answers.poll(0)) >= room[0], f"{room[0]} clients served")
        self.assert_rests(server)
        full = len(answers.poll(0))
        self.assertIn(full, room)
        self.assertEqual(server.log().count(b"full ("), 0 if self.one_at_a_time else 1)
        inside, waiting = socks[:full], socks[full:]
        for sock in inside:
            self.assertEqual(receive(sock, 6), b"hello\n")
            self.assert_echo(sock, b"still inside\n")
        inside.pop().close()  # one leaves, and the next one is served
        self.assertEqual(receive(waiting[0], 6), b"hello\n")
        inside.append(waiting.pop(0))
        self.assert_rests(server)
        for sock in inside:  # they leave, and as many of the next ones are served
            sock.close()
        for sock in waiting:
            self.assertEqual(receive(sock, 6), b"hello\n")
            sock.close()
        self.assertNotIn(b"Traceback", server.log())


# ---- Every server: the conversation

class EveryServer(ServerTest):
    """What every server must do."""

    says = ""  # in the line on stdout
    mistakes: tuple[tuple[str, str], ...] = ()  # options of its own, and what is named as wrong

    def test_every_byte(self) -> None:
        """Each byte comes back as it arrives, unchanged; what only looks like a q is data too."""
        alike = b"quit\nqq\n q\nQ\nq q\nq \nxq\nq\0\nq\r\r\n\tq\n"
        single = [bytes([byte]) for byte in range(256) if byte != ord("q")]
        sock = self.connect()
        for data in (alike, b"no newline", b"\n", b"\n\n\r\n\r\r", *single):
            self.assert_echo(sock, data)

    @POSIX
    def test_q_after_full_read(self) -> None:
        """A read that fills the buffer cuts a message: the q that then comes alone is data."""
        sock = self.hello()
        for _ in range(3):
            with self.server.stopped():  # so that it finds enough for a full read
                sock.sendall(b"x" * 65536 + b"q")
            self.assertTrue(receive(sock, 65537) == b"x" * 65536 + b"q")

    @LINUX
    def test_large_message(self) -> None:
        """Large messages come back unchanged, however TCP cuts them, and leave no memory used."""
        server = self.start("--quiet")
        sock = self.connect(server)
        lines = random.Random(1).randbytes(4_000_000).replace(b"\nq", b"\n-") + b"."
        for data in (lines, b"x" * 4_000_000):
            used = []
            for _ in range(5):
                self.assertTrue(exchange(sock, data) == data)
                used.append(server.memory())
            self.assertLess(used[-1] - used[0], 2 << 20)

    def test_q_line(self) -> None:
        """A line that is just q ends it, wherever TCP cuts it: only what is before comes back."""
        long = b"x" * 70_000 + b"\n"
        for pieces, echoes in (
            ([b"q\n"], [b""]),
            ([b"one\r\nq\r\nnot this\r\nq\r\n"], [b"one\r\n"]),
            ([long + b"q\nnot this"], [long]),
            ([b"one\nq", b"\n"], [b"one\nq", b""]),  # what has come back is not undone
            ([b"one\n", b"q\r", b"\nnot this"], [b"one\n", b"q\r", b""]),
            ([b"hello", b"q"], [b"hello", b""]),
        ):
            with self.subTest(ends=pieces[-1][-9:]), self.server.connect() as sock:
                for piece, echo in zip(pieces, echoes):
                    sock.sendall(piece)
                    self.assertEqual(receive(sock, len(echo)), echo)
                self.assertEqual(read_to_end(sock), b"")

    def test_half_close(self) -> None:
        """After the end of the client's stream, all that is unsent still comes."""
        data = random.Random(2).randbytes(1_000_000).replace(b"\nq", b"\n-") + b"."
        with self.server.connect() as sock:
            [sent] = self.server.flood([sock], data)
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
                [sent] = self.server.flood([sock], text, len(text))
                with in_thread(sock, sock.sendall, text[sent:]):
                    echo = read_to_end(sock)
                    sock.shutdown(socket.SHUT_RDWR)
                self.assertTrue(echo == before, f"{len(echo)} bytes of {len(before)}")

    def test_q_in_time(self) -> None:
        """A q ends one conversation, at once; a client that then stays costs no CPU."""
        server = self.start()
        sock, other = self.hello(server), self.connect(server)
        said = time.monotonic()
        sock.sendall(b"q\nmore")
        self.assertEqual(read_to_end(sock), b"")
        self.assertLess(time.monotonic() - said, 0.9)
        for _ in range(3):
            sock.sendall(b"and more")  # is read and ignored, and does not cause a reset
            self.assertEqual(sock.recv(1), b"")
        self.assert_echo(other, b"other\n")
        self.assert_rests(server)
        other.close()
        self.assert_serves(server)
        sock.close()
        server.wait_for_log(rb": closed \((quit|timed out)\)")

    # ---- Every server: hostile clients, and shortages

    @POSIX
    def test_reset(self) -> None:
        """A reset costs a line in the log: before accept, while it is read, while written to."""
        server = self.start()
        with server.stopped():
            early = self.connect(server)
            early.sendall(b"hello\n")
            reset(early)
        reset(self.hello(server))
        greedy = self.hello(server)
        server.flood([greedy], b"x" * 65536)
        reset(greedy)
        self.assert_serves(server)
        eventually(lambda: server.log().count(b": closed (") == 4, "four clients gone")
        resets = re.findall(rb"closed \(.*(?:reset|[Bb]roken pipe)", server.log())
        self.assertEqual(len(resets), 3, server.log())

    @LINUX
    def test_never_reads(self) -> None:
        """Clients that send and never read cost little memory, no CPU, and delay no other."""
        server = self.start("--quiet")
        socks = [self.connect(server) for _ in range(1 if self.one_at_a_time else 4)]
        for sock in socks:
            self.assert_echo(sock, b"x" * 200_000)
        before = server.memory()
        server.flood(socks, b"x" * 65536)
        self.assert_rests(server)
        self.assertLess(server.memory() - before, (len(socks) * 128 + 1024) * 1024)
        if not self.one_at_a_time:
            self.assert_serves(server)

    @LINUX
    def test_reads_late(self) -> None:
        """When a slow client has read everything, it is as any other: served, and at no CPU."""
        sock = self.connect()
        [sent] = self.server.flood([sock], b"x" * 65536)
        self.assertEqual(len(receive(sock, sent)), sent)
        self.assert_echo(sock, b"hello\n")
        self.assert_rests(self.server)

    @LINUX
    def test_no_leak(self) -> None:
        """1,000 clients come and go, and leave no descriptor and, with --quiet, no line behind."""
        server = self.start("--quiet")
        with self.hello(server):
            before = server.descriptors() - 1
        for _ in range(250):
            self.assert_serves(server)
            with server.connect() as sock:
                sock.sendall(b"q\n")
            with server.connect() as sock:
                sock.sendall(b"the echo is never read\n")
            reset(server.connect())
        self.assert_serves(server)
        eventually(lambda: server.descriptors() == before, "all descriptors closed")
        self.assertEqual(server.log(), b"")

    @LINUX
    def test_idle(self) -> None:
        """Silent clients cost no CPU."""
        socks = [self.connect() for _ in range(20)]
        self.assert_echo(socks[0], b"hello\n")
        self.assert_rests(self.server)

    @LINUX
    def test_no_descriptor_left(self) -> None:
        """With no descriptor left, the clients inside are served; the others wait, at no CPU."""
        room = range(1, 2) if self.one_at_a_time else range(50, 64)
        self.assert_full_house(200, room, files=64)

    def test_accept_fails(self) -> None:
        """A shortage costs a second if no client can leave; a client that has gone, nothing."""
        plan = [None, "EMFILE", None, "ECONNABORTED", None, "EPROTO", None, "no address", None]
        server = self.start(prelude=FAULTY_ACCEPT % plan)
        self.assert_serves(server)
        server.wait_for_log(b": closed")  # no client is inside now
        start = time.monotonic()
        self.assert_serves(server)
        self.assertGreater(time.monotonic() - start, 0.5)
        for _ in range(2):  # the one that cannot be accepted waits, and is accepted then
            self.assert_serves(server)
        self.assertEqual(read_to_end(self.connect(server)), b"")
        self.assert_serves(server)
        self.assertEqual(server.log().count(b"full ("), 1)

    # ---- Every server: what it says, and how it ends

    def test_what_it_says(self) -> None:
        """The first line and --help name the model; by default it is at 127.0.0.1:8088."""
        self.assertRegex(self.server.line, rf"^listening on 127\.0\.0\.1:\d+ \({self.says}\)$")
        explains = ("kernel", "waiting for data", "copying", "Cost:", "127.0.0.1", "8088")
        for option, prelude, words in (
            ("--help", "", explains),
            ("--quiet", SHOW_ADDRESS, ["127.0.0.1 8088 1024"]),
        ):
            script = Process(SCRIPTS[self.name], option, prelude=prelude)
            self.addCleanup(script.kill)
            output = script.output().decode()
            for word in words:
                self.assertIn(word, output)

    def test_no_delay(self) -> None:
        """Small replies go out at once (TCP_NODELAY), and a client may be silent for long."""
        server = self.start("--quiet", prelude=SHOW_NO_DELAY)
        self.hello(server)
        server.wait_for_log(rb"TCP_NODELAY True, timeout (None|0\.0)\n")

    def test_log(self) -> None:
        """The log has a line for each event, with milliseconds, and no byte of a client raw."""
        server, expected = self.start(), ""
        for last, reason in ((b"q\n", "quit"), (b"bye\n", "end of stream")):
            with server.connect() as sock:
                name = "{}:{}".format(*sock.getsockname())
                expected += f"{name}: connected\n"
                for data in (b"\x1b[31m\xff\a\r\n", b"long " * 99 + b"long\n", last):
                    sock.sendall(data)
                    receive(sock, len(data))
                    expected += f"{name}: read {len(data)} bytes: {data[:50]!r}\n"
            expected += f"{name}: closed ({reason})\n"
            server.wait_for_log(f"{name}: closed".encode())
        times_and_ends = r"(?m)^\d\d:\d\d:\d\d\.\d\d\d (127.* read 0 bytes: b''\n)?"
        self.assertEqual(re.sub(times_and_ends, "", server.log().decode()), expected)
        self.assert_stops(server)

    def test_mistakes(self) -> None:
        """A mistake gets a clear message on stderr, and a status that is not 0."""
        port = self.server.port
        for option, message in (
            (f"--port={port}", f"127.0.0.1:{port}"),
            ("--port=65536", "65536"),
            ("--host=192.0.2.1", "192.0.2.1"),
            ("--host=\udcff", "surrogates"),
            *self.mistakes,
        ):
            with self.subTest(option=option):
                self.assert_refused(option, message=message)

    @POSIX
    def test_cannot_go_on(self) -> None:
        """An error of the system, or a stdout that cannot be written to, ends it with one line."""
        fault = "import socket\nsocket.socket.setsockopt = lambda *_: open('no such file')"
        self.assert_refused(message="no such file", prelude=fault)
        reader, writer = os.pipe()
        os.close(reader)
        self.assert_refused(message="roken pipe", stdout=writer)
        os.close(writer)

    @POSIX
    def test_ctrl_c(self) -> None:
        """Ctrl-C ends it at once, with status 0 and one line, and its port is free again."""
        server = self.start()
        with self.hello(server) as sock:
            sock.sendall(b"q\n")
            self.assertEqual(read_to_end(sock), b"")  # the server closes first
        socks = [self.connect(server) for _ in range(5)]
        self.assert_echo(socks[0], b"hello\n")
        self.assert_stops(server)
        again = self.start("--port", str(server.port))
        self.assertEqual(again.port, server.port)
        self.hello(again)
        again.wait_for_rest()
        for _ in range(2):  # the second one can interrupt Python's exit, but nothing else
            again.process.send_signal(signal.SIGINT)
            again.wait_for_log(b"stopped")
        again.output()
        self.assertNotIn(b"RuntimeError", again.log())

    @POSIX
    def test_ctrl_c_ignored(self) -> None:
        """In the background of a shell, where Ctrl-C is ignored, it goes on."""
        server = self.start("--quiet", prelude="import signal\nsignal.signal(2, signal.SIG_IGN)")
        sock = self.hello(server)
        server.process.send_signal(signal.SIGINT)
        for _ in range(20):
            self.assert_echo(sock, b"still there?\n")

    @LINUX
    def test_ctrl_c_at_work(self) -> None:
        """Ctrl-C ends it at once, however much is on its way."""
        server = self.start("--quiet")
        busy, stuck = self.hello(server), self.connect(server)
        server.flood([stuck], b"x" * 65536)
        before = server.cpu()
        with in_thread(busy, exchange, busy, bytes(1 << 28)):
            eventually(lambda: server.cpu() > before + 0.05, "the server at work")
            self.assert_stops(server, at_work=True)


# ---- The servers that serve many at once

class ManyAtOnce(EveryServer):
    """What every server must do but the blocking one."""

    @LINUX
    def test_turns(self) -> None:
        """However much a client has sent, and however many wait, another one has its turn."""
        need_files(self, 1100)
        server = self.start()
        busy, other = self.hello(server), self.hello(server)
        with server.stopped():
            server.flood([busy], b"x" * 65536)
            waiting = [self.connect(server) for _ in range(1024)]  # as many as the backlog takes
            other.sendall(b"my turn\n")
        self.assertEqual(receive(other, 8), b"my turn\n")
        server.wait_for_log(b"my turn")
        before = server.log().partition(b"my turn")[0]
        self.assertLess(before.count(b"b'xxxx"), 5)
        self.assertLess(before.count(b": connected"), 10)
        for sock in waiting:
            self.assert_echo(sock, b"hello\n")
            sock.close()

    def test_endless_client(self) -> None:
        """A client whose data never ends delays no other, neither before its q nor after."""
        server = self.start("--quiet", prelude=ENDLESS)
        for first in (b"endless\n", b"q\n"):
            with self.subTest(first=first), server.connect() as endless:
                endless.sendall(first)
                with in_thread(endless, read_to_end, endless):
                    for _ in range(10):
                        self.assert_serves(server)
                    endless.shutdown(socket.SHUT_RDWR)

    def test_shortage(self) -> None:
        """A shortage is over when a client leaves; those inside never notice what accept does."""
        errors = ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM")
        plan = [step for error in errors for step in (None, error)] + [None] * 4
        server = self.start(prelude=FAULTY_ACCEPT % f"{plan} + ['EINVAL'] * 10 ** 6")
        inside = self.hello(server)
        for error in errors:
            waits = self.connect(server)
            waits.sendall(b"waits\n")
            server.wait_for_log(rf"full \(\[Errno {getattr(errno, error)}\]".encode())
            start = time.monotonic()
            self.assert_echo(inside, b"still inside\n")
            inside.close()
            self.assertEqual(receive(waits, 6), b"waits\n")
            self.assertLess(time.monotonic() - start, 0.9)
            inside = waits
        socks = [self.hello(server) for _ in range(3)]
        self.assertEqual(server.log().count(b"full ("), len(errors))
        self.connect(server)  # from now on, accept always fails
        for sock in socks * 7:
            self.assert_echo(sock, b"still there?\n")
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
        for sock in socks:
            sock.sendall(b"all at once\n")
        for sock in socks:
            self.assertEqual(receive(sock, 12), b"all at once\n")


# ---- Each model

class BlockingServer(EveryServer):
    """blocking_server.py: one client at a time."""

    name = "blocking"
    says = "blocking, threads: 1"
    mistakes = tuple((f"--threads={threads}", "--threads") for threads in ("0", "-1", "many"))
    one_at_a_time = True

    def test_threads(self) -> None:
        """As many clients are served at once as it has threads, and the next when one leaves."""
        for threads in (1, 4):
            with self.subTest(threads=threads):
                server = self.start("--threads", str(threads))
                self.assertIn(f"(blocking, threads: {threads})", server.line)
                *inside, last = [self.connect(server) for _ in range(threads + 1)]
                last.sendall(b"last\n")
                for _ in range(50):
                    for sock in inside:
                        self.assert_echo(sock, b"hello\n")
                self.assertEqual(select.select([last], [], [], 0)[0], [])
                inside[-1].close()
                self.assertEqual(receive(last, 5), b"last\n")
                self.assert_stops(server)

    def test_no_more_threads(self) -> None:
        """If the system cannot start so many threads, that is an error."""
        fault = "import threading\ndef fails(_): raise RuntimeError('no more threads')\n"
        fault += "threading.Thread.start = fails"
        more = {"prelude": fault, "stdout": subprocess.DEVNULL}  # where it says that it listens
        self.assert_refused("--threads=9", message="9 threads: no more threads", **more)


class NonblockingServer(ManyAtOnce):
    """nonblocking_server.py: asks in turn, and sleeps."""

    name = "nonblocking"
    options = ("--interval", "0.001")
    says = r"non-blocking, every 0\.001 s"
    mistakes = tuple((f"--interval={x}", "--interval") for x in ("-1", "nan", "inf", "soon"))
    polls = True

    @LINUX
    def test_interval_is_delay(self) -> None:
        """Data waits as long as the server sleeps, and that is not rounded."""
        slow = self.start("--interval", "0.3012345")
        self.assertIn("(non-blocking, every 0.3012345 s)", slow.line)
        for server, delays in ((slow, range(150, 10_000)), (self.server, range(150))):
            sock, times = self.hello(server), []
            for _ in range(3):
                server.wait_for_rest()  # else it may still be asking
                start = time.monotonic()
                self.assert_echo(sock, b"hello\n")
                times.append(time.monotonic() - start)
            self.assertIn(round(statistics.median(times) * 1000), delays)

    @LINUX
    def test_interval_is_cpu(self) -> None:
        """With interval 0 it never sleeps; with 0.01, the default, it uses little CPU."""
        busy = self.start("--interval", "0")
        self.hello(busy)
        states, end = "", time.monotonic() + 0.3
        while time.monotonic() < end:
            states += busy.state()
        self.assertLess(states.count("S"), len(states) * 0.1)
        default = Server(SCRIPTS[self.name])
        self.addCleanup(default.kill)
        self.assertIn("(non-blocking, every 0.01 s)", default.line)
        self.hello(default)
        self.assert_rests(default)

    def test_no_sleep_at_work(self) -> None:
        """It sleeps only after a round in which no socket was ready."""
        server = self.start("--interval", "0.2", "--quiet")
        start = time.monotonic()
        exchange(self.connect(server), b"x" * 1_000_000)  # 16 reads and more
        crowd = [self.connect(server) for _ in range(16)]
        self.assert_echo(crowd[-1], b"hello\n")
        self.assertLess(time.monotonic() - start, 2)


class SelectServer(ManyAtOnce):
    """select_server.py: one call for all, within its limit."""

    name = "select"
    says = "select"

    @LINUX
    def test_1300_clients(self) -> None:
        """The clients that select() cannot watch wait, and are served when there is room."""
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
        self.name = "epoll"
        prelude = "import select\nvars(select).pop('epoll', None)"
        self.assert_refused(message="selectors_server.py", prelude=prelude)


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
                    self.assert_refused("--selector", name, message=name)
                    continue
                server = self.start("--quiet", "--selector", name)
                self.assertIn(f"({kind})", server.line)
                _silent, sock = self.connect(server), self.connect(server)
                [sent] = server.flood([sock], b"x" * 65536)
                self.assert_rests(server)
                self.assert_serves(server)
                self.assertEqual(len(receive(sock, sent)), sent)
                reset(sock)
                self.assert_serves(server)

    @LINUX
    def test_1300_clients_of_select(self) -> None:
        """With --selector select, the clients that it cannot watch wait."""
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
        full = b"x" * 65536  # fills the buffer
        for pieces, replies, finished in (
            ([b"hello\n", b"quit\n"], [b"hello\n", b"quit\n"], False),
            ([b"one\nq\ntwo\n"], [b"one\n"], True),
            ([b"one\r\nq\r\ntwo"], [b"one\r\n"], True),
            ([b"a\nq\r", b"\nb"], [b"a\nq\r", b""], True),
            ([b"q"], [b""], True),
            ([b"hello", b"q"], [b"hello", b""], True),
            ([b"Iraq", b"\n"], [b"Iraq", b"\n"], False),
            ([full, b"q"], [full, b"q"], False),
            ([full, b"q", b"q"], [full, b"q", b""], True),
            ([full[1:], b"q"], [full[1:], b""], True),
            ([full[1:] + b"\n", b"q\n"], [full[1:] + b"\n", b""], True),
        ):
            with self.subTest(pieces=[piece[:20] for piece in pieces]):
                conversation = self.conversation()
                self.assertEqual([conversation.reply(piece) for piece in pieces], replies)
                self.assertEqual(conversation.finished, finished)

    def test_all_cuts(self) -> None:
        """However a text is cut, all comes back but a q line, or what is left of it at its end."""
        ended = [(b"a\n", b"q\n"), (b"", b"q\r\n"), (b"\n\n", b"q\r\n"), (b"Iraq\nx\n", b"q\n")]
        going = (b"Iraq\nx", b"\nqu\n", b"a\nquit", b"q\rq\n", b"\rq\n", b"\r\nq q", b"qq\nq\t\n")
        for before, quit_line in (*ended, *((text, b"") for text in going)):
            text = before + quit_line
            for pieces in cuts(text):
                if b"q" not in pieces:  # which ends it by itself
                    conversation = self.conversation()
                    echo = b"".join(conversation.reply(piece) for piece in pieces)
                    gone = min(len(quit_line), len(pieces[-1]))
                    self.assertEqual(echo, text[: len(text) - gone], pieces)
                    self.assertEqual(conversation.finished, bool(quit_line), pieces)

    def test_state_is_small(self) -> None:
        """It keeps some bytes of what was read, not all, and still notices a q line."""
        conversation = self.conversation()
        for _ in range(100):
            conversation.reply(b"x" * 65536)
        sizes = [len(value) for value in vars(conversation).values() if hasattr(value, "__len__")]
        self.assertLess(sum(sizes), 100)
        self.assertEqual(conversation.reply(b"\nq\n"), b"\n")
        self.assertTrue(conversation.finished)


@unittest.skipIf(sys.platform == "win32", "needs a send buffer that stays small")
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
        while self.connection.unsent and (part := self.client.recv(65536)):
            data += part
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
        self.client.sendall(b"more")
        kept = self.connection.unsent
        self.assertTrue(kept)
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
        self.assertTrue(self.read_all() == text)
        self.assertEqual(self.client.recv(100), b"")
        for _ in range(2):
            self.client.sendall(b"nor this")  # only one direction is shut down
            self.assertTrue(self.connection.on_ready())
        self.assertFalse(self.connection.closed)
        self.client.close()
        self.connection.on_ready()
        self.assertEqual(self.connection.closed, "quit")


# ---- The client

class ClientTest(ServerTest):
    """client.py, with a server of ours, or with the test itself as its server."""

    name = "select"
    options = ("--quiet",)
    in_terminal = False

    def run_client(self, port: int, *options: str, **more: Any) -> "Process":
        """Return client.py, with a pipe to its stdin or in a terminal of its own."""
        more = {"terminal": self.in_terminal, **more}
        process = Process(CLIENT, f"--port={port}", *options, **more)
        self.addCleanup(process.kill)
        return process

    def meet(self, *options: str, clients: int = 1, **more: Any) -> tuple[Any, ...]:
        """Return client.py and each of its connections to us: the test is the server."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(DEADLINE)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            process = self.run_client(listener.getsockname()[1], *options, **more)
            socks = [listener.accept()[0] for _ in range(clients)]
        for sock in socks:
            self.addCleanup(sock.close)
            sock.settimeout(DEADLINE)
        return (process, *socks)

    def assert_fails(self, process: "Process", *named: str) -> None:
        """Fail unless the client ends with status 1 and one line with these words."""
        process.process.wait(DEADLINE)
        line = process.log().decode()
        self.assertEqual(process.process.returncode, 1, line)
        self.assertRegex(line, r"\A[^\n]+\n\Z")
        for word in named:
            self.assertIn(word, line)


class ClientInPipe(ClientTest):
    """client.py < file"""

    def test_every_byte(self) -> None:
        """All of stdin is sent, up to a q line, and what comes back is on stdout, to the byte."""
        odd = b"\xff\0\r\n\n\xe4 quit\n q\nqq\nwithout a newline"
        long = b"x" * 70_000 + b"q\n" + b"y" * 65_536 + b"q\nz"  # read in pieces
        for data, sent, echo in (
            (b"", b"", b""),
            (odd, odd, odd),
            (long, long, long),
            (b"one\nq\ntwo\n", b"one\nq\n", b"one\n"),
            (b"one\r\nq\r\ntwo", b"one\r\nq\n", b"one\r\n"),
            (b"one\nq", b"one\nq\n", b"one\n"),
        ):
            with self.subTest(data=data[:20]), file_with(data) as file:
                process, sock = self.meet(stdin=file)
                self.assertTrue(read_to_end(sock) == sent)
                sock.sendall(echo)
                sock.close()
                result = process.result()
                self.assertTrue(result == (echo, b"", 0), result[1:])

    @LINUX
    def test_memory(self) -> None:
        """It needs little memory, whatever is in the file."""
        prelude = "import atexit, sys\n"
        prelude += "atexit.register(lambda: sys.stderr.write(open('/proc/self/status').read()))"
        with tempfile.TemporaryFile() as file:
            file.truncate(64 << 20)
            process = self.run_client(self.server.port, stdin=file, prelude=prelude)
            self.assertEqual(len(process.output()), 64 << 20)
        [most] = re.findall(rb"VmHWM:\s*(\d+) kB", process.log())
        self.assertLess(int(most), 64 << 10)

    def test_server_leaves(self) -> None:
        """A server that closes or resets, or sends too little: the connection is lost."""
        for leave in (socket.socket.close, reset):
            with self.subTest(leave=leave):
                process, sock = self.meet()
                process.send(b"hello\n")
                sock.sendall(read_line(sock))
                lost = "connection to {}:{} lost".format(*sock.getsockname())
                leave(sock)
                self.assert_fails(process, lost)
        with file_with(b"hello\n") as file:
            process, sock = self.meet(stdin=file)
            sock.sendall(read_to_end(sock)[:3])
            sock.close()
            self.assert_fails(process, "lost: closed by the server")

    @POSIX
    def test_stdin_and_stdout(self) -> None:
        """A stdin that cannot be read, a stdout that cannot be written, and closed ones."""
        port = self.server.port
        with open(os.devnull, "rb") as readable, open(os.devnull, "wb") as writable:
            self.assert_fails(self.run_client(port, stdin=writable), "cannot read stdin")
            process = self.run_client(port, stdout=readable)
            process.send(b"hello\n")
            self.assert_fails(process, "cannot write to stdout")
            process = self.run_client(port, "--clients=2", stdout=readable)
            self.assert_fails(process, "cannot write to stdout")
        for prelude in ("sys.stdin = None", "sys.stdout = None"):
            for options in ((), ("--clients=2",)):
                with self.subTest(prelude=prelude, options=options):
                    process = self.run_client(port, *options, prelude="import sys\n" + prelude)
                    self.assertEqual(process.result(b"hello\n")[1:], (b"", 0))

    @POSIX
    def test_ctrl_c(self) -> None:
        """What comes back is written at once; Ctrl-C ends it with the status that says so."""
        process, sock = self.meet()
        process.send(b"hello\n")
        sock.sendall(read_line(sock))
        self.assertEqual(process.read_line(), b"hello\n")
        process.wait_for_rest()
        process.process.send_signal(signal.SIGINT)
        process.process.wait(DEADLINE)
        self.assertEqual(process.result(), (b"", b"\n", 130))

    def test_no_server(self) -> None:
        """Without a server, one line says how to start one."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        what, hint = f"no server answers at 127.0.0.1:{port}", f"select_server.py --port {port}"
        for options in ((), ("--clients=3",)):
            with self.subTest(options=options):
                self.assert_fails(self.run_client(port, *options), what, f"python {hint}")
                nowhere = self.run_client(port, *options, "--host=\udcff")
                self.assert_fails(nowhere, "no server answers")

    def test_address(self) -> None:
        """One client and many connect to 127.0.0.1:8088, or to --host and --port."""
        prelude = "import socket, sys\nsocket.gethostbyname = str\n"
        prelude += "socket.create_connection = lambda address: sys.exit('{} {}'.format(*address))\n"
        prelude += "socket.socket.connect = lambda _, address: socket.create_connection(address)"
        for many in ((), ("--clients=1",)):
            for options, said in (((), b"127.0.0.1 8088\n"), (("--host=a", "--port=7"), b"a 7\n")):
                with self.subTest(many=many, options=options):
                    process = Process(CLIENT, *many, *options, prelude=prelude)
                    self.addCleanup(process.kill)
                    self.assertEqual(process.result(), (b"", said, 1))

    @mock.patch("socket.create_connection", side_effect=OSError)
    @mock.patch("client.run_many", side_effect=OSError)
    def test_mistakes(self, *_: mock.Mock) -> None:
        """A mistake gets a message that names it."""
        for mistake in (
            *("--port=65536", "--port=0", "--clients=0", "--clients=100000000000", "--messages=x"),
            *("--size=-1", "--size=1000000000000000", "--pause=nan"),
        ):
            with self.subTest(mistake=mistake), mock.patch("sys.argv", ["client.py", mistake]):
                said = io.StringIO()
                with contextlib.redirect_stderr(said), self.assertRaises(SystemExit) as ended:
                    client.main()
                self.assertEqual(ended.exception.code, 2)
                self.assertRegex(said.getvalue(), rf"error: .*{mistake.split('=')[0]}\b")


@POSIX
class ClientAtTerminal(ClientTest):
    """client.py, a conversation."""

    in_terminal = True

    def test_conversation(self) -> None:
        """It prompts, prints the echo, and ends with q or Ctrl-D; any byte can be typed."""
        for language, end in (("C", b"q\n"), ("C.UTF-8", b"\x04")):
            with self.subTest(language=language):
                environment = {**ENVIRONMENT, "LC_ALL": language}
                terminal = self.run_client(self.server.port, env=environment)
                terminal.expect(b">>> ")
                for line in (b"hello\n", b"\n", b"gr\xc3\xbcn \xff\xe4\n"):
                    terminal.send(line)
                    terminal.expect(line + line + b">>> ")
                terminal.send(end)
                terminal.expect(end.replace(b"\x04", b"\n"))
                self.assertEqual(terminal.result(), (b"", terminal.expected, 0))

    def test_without_bytes(self) -> None:
        """It works where stdin and stdout are a terminal, but have no bytes: in IDLE."""
        process = self.run_client(self.server.port, terminal=False, prelude=IDLE)
        self.assertEqual(process.result(), (">>> grün\n>>> \n>>> ".encode(), b"", 0))

    def test_echo_in_pieces(self) -> None:
        """It waits until the whole echo is there; a server that leaves before costs one line."""
        terminal, sock = self.meet()
        terminal.expect(b">>> ")
        terminal.send(b"hello\n")
        sock.sendall(read_line(sock)[:2])
        terminal.expect(b"hello\n")
        terminal.wait_for_rest()
        self.assertEqual(terminal.log(), terminal.expected)
        sock.sendall(b"llo\n")
        terminal.expect(b"hello\n>>> ")
        terminal.send(b"again\n")
        sock.sendall(read_line(sock)[:3])
        lost = "again\nconnection to {}:{} lost: closed by the server\n".format(*sock.getsockname())
        sock.close()
        terminal.expect(lost.encode())
        self.assertEqual(terminal.result(), (b"", terminal.expected, 1))

    def test_half_a_terminal(self) -> None:
        """With only one of stdin and stdout at a terminal, there is no prompt."""
        terminal = self.run_client(self.server.port, stdin=subprocess.PIPE)
        self.assertEqual(terminal.result(b"hello\nq\n"), (b"", b"hello\n", 0))
        terminal = self.run_client(self.server.port, stdout=subprocess.PIPE)
        terminal.send(b"hello\nq\n")
        self.assertEqual(terminal.output(), b"hello\n")

    def test_ctrl_c(self) -> None:
        """Ctrl-C ends it without a traceback: at the prompt, and while it waits for an echo."""
        for typed in (b"", b"hello\n"):
            with self.subTest(typed=typed):
                terminal, sock = self.meet()
                terminal.expect(b">>> ")
                if typed:
                    terminal.send(typed)
                    self.assertEqual(read_line(sock), typed)
                terminal.wait_for_rest()
                terminal.process.send_signal(signal.SIGINT)
                self.assertEqual(terminal.result(), (b"", b">>> " + typed + b"\n", 0))


class ClientFigures(unittest.TestCase):
    """The texts that client.py makes of known numbers."""

    def test_picture(self) -> None:
        """A row for each client: dots until its first echo, then # until its end."""
        lines = [
            ". waits for its first echo   # is served",
            "",
            "client  0            1            2            3            4 s",
            "        |------------|------------|------------|------------|",
            "     1  " + "." * 6 + "#" * 20,
            "     2  " + "." * 13 + "#" * 39,
            "     3  " + "." * 39,
            "     4  " + "." * 52 + "#",
        ]
        spans = [(0.5, 2.0), (1.0, 4.0), (0.0, 3.0), (4.0, 4.0)]
        self.assertEqual(client.picture(spans, 72).splitlines(), lines)

    def test_width(self) -> None:
        """It fits into the width, however long the run, and has a least width."""
        for width, most in ((72, 72), (200, 200), (100, 100), (20, 58), (0, 58)):
            for seconds in (0.0012345, 1.0, 3599.9):
                lines = client.picture([(seconds / 2, seconds)] * 3, width).splitlines()
                self.assertLessEqual(max(map(len, lines)), most)
                self.assertEqual(lines[-1].count("."), lines[-1].count("#"))

    def test_many_rows(self) -> None:
        """Of more than 20 clients, 20 are shown, the first and the last among them."""
        rows = client.picture([(1.0, 2.0)] * 41, 72).splitlines()
        self.assertEqual(rows[1], "20 of the 41 clients, evenly spaced")
        shown = [1, 3, 5, 7, 9, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 33, 35, 37, 39, 41]
        self.assertEqual([int(row.split()[0]) for row in rows[5:]], shown)
        rows = client.picture([(1.0, 2.0)] * 20, 72).splitlines()
        self.assertEqual([int(row.split()[0]) for row in rows[4:]], list(range(1, 21)))

    def test_figures(self) -> None:
        """Rate, median, 99th percentile and maximum."""
        times = [0.001] * 60 + [0.002] * 38 + [0.05, 2.5]
        random.Random(4).shuffle(times)
        text = "{} messages in {} s: {} a second\ntime to an echo: median {} ms, "
        text += "99th percentile {} ms, maximum {} ms"
        expected = text.format(100, 2, 50, "1.00", "50.00", "2,500.00")
        self.assertEqual(client.figures(times, 2.0), expected)
        expected = text.format(1, 0.5, 2, "3.00", "3.00", "3.00")
        self.assertEqual(client.figures([0.003], 0.5), expected)
        self.assertEqual(client.figures([], 0.25), "0 messages in 0.25 s: 0 a second")


class ClientMany(ClientTest):
    """client.py --clients"""

    def spans(self, output: bytes) -> list[tuple[int, int, int]]:
        """Return of each row of the picture the client, the dots and all columns."""
        rows = re.findall(r"^ *(\d+)  (\.*)(#*)\r?$", output.decode(), re.MULTILINE)
        return [(int(number), len(dots), len(dots + served)) for number, dots, served in rows]

    def test_at_once(self) -> None:
        """All clients talk at the same time, and each of their messages is echoed."""
        options = ("--clients=30", "--messages=20", "--pause=0.02")
        output, log, status = self.run_client(self.server.port, *options).result()
        self.assertEqual((log, status), (b"", 0))
        self.assertIn(b"20 of the 30 clients", output)
        self.assertIn(b"600 messages in ", output)
        numbers, dots, ends = zip(*self.spans(output))
        self.assertEqual((len(numbers), numbers[0], numbers[-1]), (20, 1, 30))
        self.assertLess(max(dots), min(ends))
        self.assertLessEqual(max(map(len, output.splitlines()[:-2])), 72)

    def test_staircase(self) -> None:
        """One after another if the server has one thread, four at a time if it has four."""
        for threads in (1, 4):
            server = Server(SCRIPTS["blocking"], "--quiet", "--threads", str(threads))
            self.addCleanup(server.kill)
            options = ("--clients=10", "--messages=3", "--pause=0.05")
            spans = self.spans(self.run_client(server.port, *options).output())
            self.assertEqual([number for number, _, _ in spans], list(range(1, 11)))
            for i, (_, dots, _) in enumerate(spans):
                before = sum(end <= dots + 1 for _, _, end in spans)  # how many had left by then
                self.assertIn(before, range(max(0, i - threads + 1), i - i % threads + 1))

    def test_measures(self) -> None:
        """The times that it prints are those that a clock shows."""
        start, times = time.monotonic(), []
        process, sock = self.meet("--clients=1", "--messages=4", "--pause=0.1")
        while (line := read_line(sock)) != b"q\n":
            times.append(time.monotonic())
            time.sleep(0.05)  # the time to an echo
            sock.sendall(line)
            times[-1] = time.monotonic() - times[-1]
        sock.close()
        text = process.output().decode()
        elapsed = time.monotonic() - start
        [found] = re.findall(r"4 messages in ([\d.]+) s: (\d+) a second\D+([\d.]+) ms", text)
        seconds, rate, median = map(float, found)
        self.assertTrue(4 * 0.05 + 3 * 0.1 < seconds < elapsed, text)
        self.assertAlmostEqual(rate, 4 / seconds, delta=0.5)
        self.assertAlmostEqual(median, statistics.median(times) * 1000, delta=40)
        [(_, dots, end)] = self.spans(text.encode())
        self.assertTrue(1 <= dots < end / 2, text)

    def test_what_is_sent(self) -> None:
        """100 messages of 64 bytes, or --messages of --size, and no next before the echo; a q."""
        few = ("--messages=3", "--size=1"), ("--messages=3", "--size=9")
        for options, number, size, kinds in ((), 100, 64, 16), (few[0], 3, 1, 1), (few[1], 3, 9, 6):
            process, *socks = self.meet("--clients=2", *options, clients=2)
            seen = []
            for sock in socks * number:
                seen.append(read_line(sock))
                sock.sendall(seen[-1][:-1])
                process.wait_for_rest()  # that was not all of the echo
                sock.sendall(b"\n")
            self.assertEqual([len(line) for line in seen], [size] * 2 * number)
            self.assertEqual(len(set(seen)), kinds, "one client's message is not another's")
            for sock in socks:
                self.assertEqual(read_line(sock), b"q\n")
                sock.close()
            self.assertEqual(process.result()[1:], (b"", 0))

    def test_large_messages(self) -> None:
        """Messages that no buffer can hold are sent and read at the same time, and soon."""
        options = ("--clients=2", "--messages=2", "--size=20000000")
        output, log, status = self.run_client(self.server.port, *options).result()
        self.assertIn(b"4 messages", output)
        self.assertEqual((log, status), (b"", 0))

    def test_problems(self) -> None:
        """An end too early and echoes that differ are counted; the others go on."""
        for leave in (socket.socket.close, reset):
            options = ("--clients=4", "--messages=1")
            process, lost, wrong, long, right = self.meet(*options, clients=4)
            read_line(lost)
            leave(lost)
            wrong.sendall(read_line(wrong)[:-2] + b"x\n")
            long.sendall(read_line(long) + b"\n")
            while (line := read_line(right)) != b"q\n":
                right.sendall(line)
            right.close()
            self.assert_fails(process, "lost: 1, echoes that differ: 2")
            output = process.output()
            self.assertIn(b"1 messages", output)
            served = [end > dots for _, dots, end in self.spans(output)]
            self.assertEqual(served, [False, False, False, True])

    @POSIX
    def test_progress(self) -> None:
        """A longer run shows its progress at a terminal, and only there."""
        options = ("--clients=2", "--messages=2")
        piped, *socks = self.meet(*options, clients=2)
        terminal, *others = self.meet(*options, clients=2, terminal=True)
        for sock in (socks[0], *socks, others[0], *others):  # three of four messages
            sock.sendall(read_line(sock))
        terminal.wait_for_log(rb"\A(\d s: [0-2] messages\r)*[12] s: 3 messages\r")
        for sock in (socks[1], others[1]):
            sock.sendall(read_line(sock))
        for sock in (*socks, *others):
            self.assertEqual(read_line(sock), b"q\n")
            sock.close()
        self.assertEqual(terminal.process.wait(DEADLINE), 0)
        output, log, status = piped.result()
        self.assertIn(b"4 messages in ", output)
        self.assertEqual((log, status), (b"", 0))

    @LINUX
    def test_too_many(self) -> None:
        """More clients than it may open files for: one line says so, and what to do."""
        process = self.run_client(self.server.port, "--clients=100", files=64)
        self.assert_fails(process, "cannot run 100 clients", "ulimit -n 150")


# ---- The pages

class Pages(unittest.TestCase):
    """What the scripts have in common is the same, and each stands alone."""

    shared = tuple(f"The {x}: the same in all servers" for x in ("conversation", "command line"))
    clients = "A client: the same in nonblocking, select, epoll and selectors"

    def sections(self, name: str) -> dict[str, str]:
        """Return the text of each section of a server, by its banner."""
        head, *parts = re.split(r"(?m)^# ---- (.+)\n", SCRIPTS[name].read_text(encoding="utf-8"))
        return {"the head": head, **dict(zip(parts[::2], parts[1::2]))}

    def test_shared_sections(self) -> None:
        """Each section that is said to be the same is the same, in the same order."""
        model = self.sections("select")
        for name in NAMES:
            sections = self.sections(name)
            clients = [self.clients] if name not in ("blocking", "async") else []
            self.assertEqual(list(sections), ["the head", "The model", *clients, *self.shared])
            for section in (*clients, self.shared[0]):
                self.assertEqual(sections[section], model[section], name)
            constants = re.findall(r"(?m)^[A-Zl]\w+ = .*\n", sections["the head"])
            self.assertEqual([f"\n{x}" in model["the head"] for x in constants], [True] * 4, name)

    def test_main(self) -> None:
        """main has the same lines everywhere, but for the model, and more for an option."""
        texts = [self.sections(name)[self.shared[1]] for name in NAMES]
        mains = [re.sub(r".*(listening on|serve\().*\n", "", text).splitlines() for text in texts]
        for lines in mains:
            rest = iter(lines)
            self.assertTrue(all(line in rest for line in min(mains, key=len)), lines)

    def test_model_first(self) -> None:
        """The call that is the model stands in the upper half of each page."""
        calls = ("listener.accept()", "connection.on_ready()", "select.select(readers, writers",
                 "epoll.poll()", "selector.select()", "loop.sock_accept(")
        for name, call in zip(NAMES, calls):
            before = SCRIPTS[name].read_text(encoding="utf-8").partition(call)[0]
            self.assertLess(before.count("\n"), 85, name)

    def test_each_stands_alone(self) -> None:
        """A server imports modules of the standard library only."""
        ours = {path.stem for path in HERE.glob("*.py")}
        for script in SCRIPTS.values():
            nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
            names = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
            names |= {x.name for node in nodes if isinstance(node, ast.Import) for x in node.names}
            names = {name.partition(".")[0] for name in names}
            self.assertFalse(ours & names)
            known = getattr(sys, "stdlib_module_names", names)  # since CPython 3.10
            self.assertLessEqual(names, set(known))


class Readme(unittest.TestCase):
    """What README.md says is so."""

    text = (HERE / "README.md").read_text(encoding="utf-8")

    def assert_program_serves(self, name: str) -> None:
        """Fail unless the program echoes, to several clients at once, and survives a reset."""
        [program] = re.findall(rf'(?s)```python\n("""{name}.*?)```', self.text)
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, name)
            script.write_text(program.replace("8088", "0"), encoding="utf-8")
            server = Server(script)
            self.addCleanup(server.kill)
            with server.connect() as first, server.connect() as second:
                for sock in (first, second, first):
                    for text in (b"hello\n", b"x" * 100_000):
                        self.assertTrue(exchange(sock, text) == text)
                reset(second)
                self.assertEqual(exchange(first, b"still there?\n"), b"still there?\n")

    @LINUX
    def test_signal_driven(self) -> None:
        """The program for the model without a script, signal-driven I/O, works."""
        self.assert_program_serves("signal_server.py")

    def test_streams(self) -> None:
        """The twin of async_server.py with streams works."""
        self.assert_program_serves("streams_server.py")

    def test_exercises(self) -> None:
        """Each change of the table "Break it", made in a copy, is noticed by its test."""
        row = r"(?m)^\| `(\w+\.py)` \| `(.+?)` \| `(.+?)` \| .+ \| (none: )?`(.+)` \|$"
        exercises = re.findall(row, self.text)
        self.assertGreaterEqual(len(exercises), 10)
        self.assertLessEqual({path.name for path in SCRIPTS.values()}, {x[0] for x in exercises})
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(self.run_broken, exercises))
        for (script, old, _, none, _), (status, text) in zip(exercises, results):
            with self.subTest(script=script, old=old):
                self.assertIn("Ran 1 test", text)
                if "skipped" not in text:
                    self.assertEqual(status == 0, bool(none), text[-1000:])

    def run_broken(self, exercise: tuple[str, str, str, str, str]) -> tuple[int, str]:
        """Run a test in a copy of all scripts, one of which is changed; return how it ended."""
        script, old, new, _, test = exercise
        with tempfile.TemporaryDirectory() as folder:
            for path in (*HERE.glob("*.py"), HERE / "README.md"):
                text = path.read_text(encoding="utf-8")
                if path.name == script:
                    self.assertEqual(text.count(old), 1, f"{old} in {script}")
                    text = text.replace(old, new)
                text = text.replace("DEADLINE = 10.0", "DEADLINE = 2.0")
                Path(folder, path.name).write_text(text, encoding="utf-8")
            process = Process(Path(folder, "test_all.py"), test)
            self.addCleanup(process.kill)
            process.output(seconds=60)
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
    *("blocking", "blocking --threads 1000", "nonblocking", "select", "epoll"),
    *("selectors", "selectors --selector poll", "async"),
)
HEAD = """\
Messages of 64 bytes, each sent after the echo of the one before; medians of three runs
/s: messages a second; 99%: 99th percentile of the time to an echo

                                   1 client        100 clients     CPU a    CPU  10 clients
                               /s    median       /s       99%   message   idle  \
beside 900 silent, /s (# is 5,000)"""


def table_row(name: str, one: Run, hundred: Run, idle: float, ten: "Run | None") -> str:
    """Return the line of a server: with 1, 100, 10 clients, and its share of a core when idle."""
    slow = sorted(hundred.times)[math.ceil(len(hundred.times) * 0.99) - 1]
    cpu, share = f"{hundred.cpu / len(hundred.times) * 1e6:.1f} us", f"{idle:.1%}"
    if math.isnan(idle):
        cpu = share = "-"
    beside = f"{ten.rate:7,.0f} " + "#" * round(ten.rate / 5000) if ten else "one at a time"
    return (
        f"{name:26}{one.rate:7,.0f}{statistics.median(one.times) * 1000:7.2f} ms"
        f"{hundred.rate:9,.0f}{slow * 1000:7.1f} ms{cpu:>10}{share:>7}  {beside}"
    )


def run_clients(server: "Server", clients: int, messages: int) -> Run:
    """Let some clients talk to the server. Raises AssertionError if one was not served well."""
    before = server.cpu()
    crowd = [client.Client(number, messages, 64) for number in range(clients)]
    with selectors.DefaultSelector() as selector:
        start = client.run(crowd, selector, ("127.0.0.1", server.port), 0)
    used = server.cpu() - before
    assert not any(one.problem for one in crowd), [one.problem for one in crowd]
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


def idle_cpu(server: "Server", seconds: float) -> float:
    """Return the share of a core that the server uses while all clients are silent."""
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
            one, hundred, ten = measure(server, 1, seconds), measure(server, 100, seconds), None
            for _ in range(100):
                stack.enter_context(server.connect())
            if name != "blocking":
                measure(server, 1, 0)  # it is served, so those before it have been accepted
            idle = idle_cpu(server, seconds)
            if name != "blocking":
                for _ in range(800):
                    stack.enter_context(server.connect())
                ten = measure(server, 10, seconds)
            print(table_row(name, one, hundred, idle, ten), flush=True)


class Benchmark(unittest.TestCase):
    """The figures of --benchmark."""

    def test_row(self) -> None:
        """A row is made of known numbers."""
        one = Run([0.002] * 6 + [0.5] * 4, 4.0, 0.1)
        hundred = Run([0.001] * 98 + [0.0341, 9.0], 0.05, 0.00123)
        row = table_row("select", one, hundred, 0.0451, Run([1.0] * 60_000, 4.0, 0.0))
        text = "select                          2   2.00 ms    2,000   34.1 ms"
        self.assertEqual(row, f"{text}   12.3 us   4.5%   15,000 ###")
        row = table_row("select", one, hundred, math.nan, None)
        self.assertEqual(row, f"{text}         -      -  one at a time")

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
        self.assertTrue(run.seconds < sum(run.times) <= 3 * run.seconds)
        self.assertAlmostEqual(run.cpu, used, delta=0.03)
        self.assertGreater(measure(server, 1, 0.1).seconds, 0.05)
        runs = [Run([1.0], seconds, 0) for seconds in (3.0, 1.0, 2.0)]
        with mock.patch(f"{__name__}.run_clients", side_effect=runs):
            self.assertEqual(measure(server, 1, 0.1).seconds, 2.0)
        self.assertLess(idle_cpu(server, 0.2), 0.1)
        polls = Server(SCRIPTS["nonblocking"], "--interval", "0", "--quiet")  # and never sleeps
        self.addCleanup(polls.kill)
        self.assertGreater(idle_cpu(polls, 0.3), 0.15)

    @LINUX
    def test_benchmark(self) -> None:
        """The table has a head, and a row for each server, measured with so many clients."""
        need_files(self, 1100)
        seen, really_measure = [], measure

        def watch(server: "Server", clients: int, seconds: float) -> Run:
            run = really_measure(server, clients, seconds)
            seen.append((clients, server.descriptors()))
            return run

        watched = mock.patch(f"{__name__}.measure", watch)
        with contextlib.redirect_stdout(io.StringIO()) as output, watched:
            benchmark(["select", "blocking"], 0.02)
        self.assertEqual([clients for clients, _ in seen], [1, 100, 1, 10, 1, 100])
        self.assertIn(seen[3][1], range(900, 930))  # the silent ones, and what else is open
        rows = r"(?s)CPython .*\nselect .*\nblocking .* one at a time\n"
        self.assertRegex(output.getvalue(), rows)


# ---- The tools of the tests

ENVIRONMENT = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
PRELUDE = """{}
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FAULTY_ACCEPT = """
import errno, select, socket
accept, plan = socket.socket.accept, iter(%s)
def faulty(listener):
    "Do what the plan says about each client that waits: accept it (None), or fail."
    if not select.select([listener], [], [], None if listener.getblocking() else 0)[0]:
        raise BlockingIOError(errno.EAGAIN, "no client waits")
    fault = next(plan, None)
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
SHOW_NO_DELAY = """
import socket, sys
def show(sock, size, recv=socket.socket.recv):
    no_delay = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    print(f"TCP_NODELAY {no_delay > 0}, timeout {sock.gettimeout()}", file=sys.stderr)
    return recv(sock, size)
socket.socket.recv = show
"""
SHOW_ADDRESS = """
import socket
def show(address, backlog=None, **options):
    raise SystemExit(print(*(x.decode() if isinstance(x, bytes) else x for x in address), backlog))
socket.create_server = show
"""
IDLE = """
import io, sys
class Shell(io.StringIO):
    encoding = "utf-8"
    isatty = lambda self: True
    write = lambda self, text: sys.__stdout__.buffer.write(text.encode())
sys.stdin, sys.stdout = Shell("gr\\u00fcn\\n\\nq\\n"), Shell()
"""


def setUpModule() -> None:
    """Give the scripts a Ctrl-C even if we were started without, and us enough files."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform != "win32":
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = min(most, 10_400) if most > 0 else 10_400
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def need_files(test: unittest.TestCase, number: int) -> None:
    """Skip a test that needs more open files than a process may have here."""
    if sys.platform != "win32":
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files < number:
            test.skipTest(f"needs {number} open files, and a process may have {files} here")


def load(name: str) -> ModuleType:
    """Return a server as a module."""
    return importlib.import_module(f"{name}_server")


def eventually(condition: Callable[[], object], what: str) -> None:
    """Return as soon as the condition is true. Raises AssertionError at the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen: {what}")
        time.sleep(0.001)


class Process:
    """A script as a subprocess."""

    def __init__(self, script: Path, *options: str, prelude: str = "", files: int = 0,
                 terminal: bool = False, **more: Any) -> None:
        """Start it, after the prelude, with so many open files at most, in a terminal or not."""
        if files:
            more["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        command = ["-c", PRELUDE.format(prelude), str(script)] if prelude else [str(script)]
        screen, theirs = os.openpty() if terminal else os.pipe()
        others = theirs if terminal else subprocess.PIPE
        more = {"stdin": others, "stdout": others, "stderr": theirs, "env": ENVIRONMENT, **more}
        command = [sys.executable, *command, *options]
        self.process = subprocess.Popen(command, bufsize=0, **more)
        os.close(theirs)
        self.pid = self.process.pid
        self.screen = io.FileIO(screen, "r+" if terminal else "r")
        self.said = bytearray()
        self.expected = b""
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self) -> None:
        """Take what it says on stderr, or on the terminal."""
        with self.screen, contextlib.suppress(OSError):  # the end of a terminal is an error
            while data := self.screen.read(65536):
                self.said += data

    def log(self) -> bytes:
        """Return what it has said there, all of it if it has ended."""
        if self.process.poll() is not None:
            self.listener.join(DEADLINE)
        return bytes(self.said).replace(b"\r\n", b"\n")

    def wait_for_log(self, pattern: bytes) -> None:
        """Wait until a line there matches. Raises AssertionError at the deadline."""
        try:
            eventually(lambda: re.search(pattern, self.log()), repr(pattern))
        except AssertionError as error:
            raise AssertionError(f"{error} in {self.log()[-500:]!r}") from None

    def expect(self, text: bytes) -> None:
        """Wait until it has said the text, right after what has been expected before."""
        self.expected += text
        self.wait_for_log(rb"\A" + re.escape(self.expected))

    def state(self) -> str:
        """Return the kernel's letter for what it does: R if it runs, or would; S if it sleeps."""
        if sys.platform != "linux":
            return "S"  # as far as we can know
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]

    def wait_for_rest(self) -> None:
        """Wait until it sleeps in a call. Raises AssertionError at the deadline.

        Of a signal in the microsecond before such a call, Python learns only after it.
        """
        eventually(lambda: self.state() == "S", "a process that sleeps")

    def send(self, data: bytes) -> None:
        """Write data to its stdin, or type it."""
        (self.process.stdin or self.screen).write(data)

    def read_line(self) -> bytes:
        """Return the next line of its stdout. Kills it at the deadline."""
        assert self.process.stdout
        watchdog = threading.Timer(DEADLINE, self.process.kill)
        watchdog.start()
        line = bytes(self.process.stdout.readline())
        watchdog.cancel()
        return line.replace(b"\r\n", b"\n")

    def output(self, data: bytes = b"", seconds: float = DEADLINE) -> bytes:
        """Give it data and the end of stdin; return the rest of its stdout when it has ended."""
        return self.process.communicate(data, seconds)[0] or b""

    def result(self, data: bytes = b"") -> tuple[bytes, bytes, int]:
        """Give it data and the end of stdin; return its stdout, its log and its status."""
        return self.output(data), self.log(), self.process.returncode

    def kill(self) -> None:
        """End it, if it has not ended."""
        with self.process:
            self.process.kill()
        self.listener.join(DEADLINE)


class Server(Process):
    """A server as a subprocess, listening."""

    def __init__(self, script: Path, *options: str, **more: Any) -> None:
        """Start it and wait until it listens. Raises AssertionError if it does not."""
        if "--port" not in options and script.parent == HERE:
            options = ("--port", "0", *options)
        super().__init__(script, *options, **more)
        self.line = self.read_line().decode().strip()
        match = re.match(r"listening on 127\.0\.0\.1:(\d+) ", self.line)
        if not match:
            self.kill()
            raise AssertionError(f"{self.line!r} is not 'listening'; {self.log()[-500:]!r}")
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

    def flood(self, socks: list[socket.socket], data: bytes, most: int = 1 << 28) -> list[int]:
        """Send it data again and again on each connection, without reading, until nothing goes.

        Returns how many bytes were sent on each, which are at most so many.
        """
        sent, went = dict.fromkeys(socks, 0), time.monotonic()
        for sock in socks:
            sock.setblocking(False)
        while open_ones := [sock for sock in socks if sent[sock] < most]:
            ready = select.select([], open_ones, [], 0.05)[1]
            if ready:
                went = time.monotonic()
            elif self.state() != "R" or time.monotonic() > went + 1:  # else it waits for a core
                break
            for sock in ready:
                with contextlib.suppress(BlockingIOError):
                    sent[sock] += sock.send(memoryview(data)[sent[sock] % len(data) :])
        for sock in socks:
            sock.settimeout(DEADLINE)
        return list(sent.values())

    def descriptors(self) -> int:
        """Return how many file descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Return its resident memory, in bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float:
        """Return the CPU time that it has used, user and system, in seconds; nan if unknown."""
        if sys.platform != "linux":
            return math.nan
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def sleeps(self) -> bool:
        """Return whether it does not run at all for an eighth of a second."""

        def trace() -> object:
            status = Path(f"/proc/{self.pid}/status").read_text()
            return re.findall(r"ctxt_switches:\t(\d+)", status), self.cpu()

        before = trace()
        time.sleep(0.12)
        return trace() == before and self.state() == "S"  # not R: one that waits for a core


@contextlib.contextmanager
def in_thread(sock: socket.socket, work: Callable[..., object], *args: Any) -> Iterator[None]:
    """Do the work in a thread, which ends with it or, after a failure, with the connection."""

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
    while len(data) < size and (part := sock.recv(min(size - len(data), 65536))):
        data += part
    return bytes(data)


def read_to_end(sock: socket.socket) -> bytes:
    """Return what comes until the connection ends."""
    return receive(sock, sys.maxsize)


@contextlib.contextmanager
def file_with(data: bytes) -> Iterator[Any]:
    """Make a file with this data, to be read."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file


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


def cuts(text: bytes) -> Iterator[list[bytes]]:
    """Yield the text in all the ways in which it can be cut into pieces."""
    for places in itertools.product((False, True), repeat=len(text) - 1):
        ends = [*itertools.compress(range(1, len(text)), places), len(text)]
        yield [text[start:end] for start, end in zip([0, *ends], ends)]


# Only what is derived from these is a test.
del ServerTest, EveryServer, ManyAtOnce, TenThousand, ClientTest

if __name__ == "__main__":
    if sys.argv[1:] == ["--benchmark"]:
        setUpModule()
        benchmark(BENCHMARK)
    else:
        unittest.main()
