"""Tests of the six echo servers and of the client; with --benchmark, their measurement.

    python test_all.py                              everything, in less than a minute
    python test_all.py -v                           and says what it checks
    python test_all.py EpollServer                  one server
    python test_all.py EpollServer.test_half_close  one test
    python test_all.py --benchmark                  the table of the README, in a minute

Every server runs as a subprocess on a free port of 127.0.0.1.
"""

import ast
import contextlib
import itertools
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import client

if sys.platform != "win32":
    import resource

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    name: HERE / f"{name}_server.py"
    for name in ("blocking", "nonblocking", "select", "epoll", "selectors", "async")
}
CLIENT = HERE / "client.py"
DEADLINE = 10.0  # seconds: what has not happened by then does not happen
PROFILER = """
import atexit, collections, runpy, sys
calls = collections.Counter()
def count(frame, event, function):
    if event == "c_call":
        calls[function.__name__] += 1
sys.argv = [sys.argv[-1], *sys.argv[1:-1]]
sys.setprofile(count)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.setprofile(None)
    print(dict(calls), file=sys.stderr)
"""
NO_EPOLL = """
import runpy, select, sys
vars(select).pop("epoll", None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
POSIX = unittest.skipIf(sys.platform == "win32", "needs the signals of POSIX")
LINUX = unittest.skipUnless(sys.platform == "linux", "needs /proc")
ENVIRONMENT = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
FOLDER = tempfile.TemporaryDirectory()  # of the servers' logs


def setUpModule() -> None:
    """Give the servers a Ctrl-C even if we were started without, and us enough files."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform != "win32":
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 10_300 if most == resource.RLIM_INFINITY else min(most, 10_300)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def tearDownModule() -> None:
    FOLDER.cleanup()


def eventually(condition: Callable[[], object], what: str) -> None:
    """Return as soon as the condition is true. Raises AssertionError at the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"in vain: {what}")
        time.sleep(0.001)


class Process:
    """A script of ours as a subprocess; what it says on stderr goes to a file."""

    numbers = itertools.count()

    def __init__(self, script: Path, *options: str, files: int = 0, **more: Any) -> None:
        """Start the script; with files, it may open only so many."""
        self.log_file = Path(FOLDER.name, f"{next(self.numbers)}.log")
        if files:
            more["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        command = [sys.executable, str(script), *options]
        with open(self.log_file, "wb") as log:
            more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": log, **more}
            self.process = subprocess.Popen(command, env=ENVIRONMENT, **more)
        self.pid = self.process.pid

    def log(self) -> bytes:
        """Return what it has said on stderr up to now."""
        return self.log_file.read_bytes()

    def wait_for_log(self, pattern: bytes) -> None:
        """Wait until a line on stderr matches. Raises AssertionError at the deadline."""
        eventually(lambda: re.search(pattern, self.log()), f"{pattern!r} in {self.log()!r}")

    def state(self) -> str:
        """Return the kernel's letter for what it does: R if it runs, or would; S if it sleeps."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]

    def wait_for_rest(self) -> None:
        """Wait until it sleeps in a call. Raises AssertionError at the deadline.

        Of a Ctrl-C in the microsecond before the call, Python learns only after it.
        """
        if sys.platform == "linux":
            eventually(lambda: self.state() == "S", "a process that sleeps")

    def output(self, data: "bytes | None" = None) -> bytes:
        """Give it data on stdin; return the rest of its stdout when it has ended.

        Kills it at the deadline.
        """
        watchdog = threading.Timer(DEADLINE, self.process.kill)
        watchdog.start()
        try:
            output, _ = self.process.communicate(data)
            return bytes(output or b"")
        finally:
            watchdog.cancel()

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):  # what it did not read is lost
                    pipe.close()


class Server(Process):
    """A server as a subprocess, listening."""

    def __init__(self, script: Path, *options: str, **more: Any) -> None:
        """Start it and wait until it listens. Raises AssertionError if it does not."""
        if "--port" not in options:
            options = ("--port", "0", *options)
        super().__init__(script, *options, **more)
        watchdog = threading.Timer(DEADLINE, self.process.kill)
        watchdog.start()
        assert self.process.stdout
        self.line = self.process.stdout.readline().decode()
        watchdog.cancel()
        match = re.match(r"listening on 127\.0\.0\.1:(\d+) .+\n", self.line)
        if not match:
            self.kill()
            raise AssertionError(f"{self.line!r} does not say that it listens; {self.log()!r}")
        self.port = int(match[1])

    def connect(self) -> socket.socket:
        """Return a new connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), DEADLINE)

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


def read_to_end(sock: socket.socket) -> bytes:
    """Return what arrives on a connection until the server closes it."""
    data = bytearray()
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


def read_line(sock: socket.socket) -> bytes:
    """Return what arrives up to a newline."""
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            break
        line += byte
    return line


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
    while ready := select.select([], [sock for sock in socks if sent[sock] < most], [], 0.05)[1]:
        for sock in ready:
            with contextlib.suppress(BlockingIOError):
                sent[sock] += sock.send(memoryview(data)[sent[sock] % len(data) :])
    for sock in socks:
        sock.settimeout(DEADLINE)
    return list(sent.values())


def conversation(pieces: list[bytes]) -> tuple[bytes, bool]:
    """Return the echo of what is read in these pieces, and whether a q has ended it."""
    text = b""
    for piece in pieces:
        if piece == b"q":
            return text, True
        before = len(text)
        text += piece
        quit_line = re.search(rb"(?:\A|\n)(q\r?\n)", text)
        if quit_line:
            return text[: max(before, quit_line.start(1))], True
    return text, False


def cuts(text: bytes) -> Iterator[list[bytes]]:
    """Yield the text in all the ways in which it can be cut into pieces."""
    for places in itertools.product((False, True), repeat=len(text) - 1):
        ends = [i for i, cut in enumerate(places, 1) if cut] + [len(text)]
        yield [text[start:end] for start, end in zip([0, *ends], ends)]


class Terminal:
    """client.py in a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self.keyboard, theirs = os.openpty()
        command = [sys.executable, str(CLIENT), *options]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
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


class ForEveryServer:
    """What every server must do (in a class, so that only the servers below are tested)."""

    class Tests(unittest.TestCase):
        name = ""
        options: tuple[str, ...] = ()
        one_at_a_time = False  # serves a client only when the one before has left
        polls = False  # uses CPU while idle
        server: Server

        @classmethod
        def setUpClass(cls) -> None:
            cls.server = Server(SCRIPTS[cls.name], *cls.options)

        @classmethod
        def tearDownClass(cls) -> None:
            cls.server.kill()

        def setUp(self) -> None:
            if self.server.process.poll() is not None:  # a test before this one has ended it
                type(self).server = Server(SCRIPTS[self.name], *self.options)

        def start(self, *options: str, **more: Any) -> Server:
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
            self.assertEqual(client.receive(sock, len(data)), data)

        def assert_serves(self, server: "Server | None" = None) -> None:
            """Fail if a new client is not served, or if there was a traceback."""
            with (server or self.server).connect() as sock:
                self.assert_echo(sock, b"still there?\n")
            self.assertNotIn(b"Traceback", (server or self.server).log())

        def assert_stops(self, server: Server, at_work: bool = False) -> None:
            """Press Ctrl-C; fail if it is not obeyed at once, with status 0 and one line."""
            if not at_work:
                server.wait_for_rest()
            said = server.log()
            pressed = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            self.assertEqual(server.output(), b"", "stdout has one line only")
            self.assertLess(time.monotonic() - pressed, 1)
            self.assertEqual(server.process.returncode, 0)
            self.assertRegex(server.log()[len(said) :], rb"\A[^\n]*stopped\n\Z")

        # The conversation

        def test_every_byte(self) -> None:
            """Every byte comes back, in order, as it arrives, without any newline."""
            sock = self.connect()
            for data in (b"no newline", b"\n", b"\n\n\r\n\r\r", bytes(range(256)), b"\xff\xfe"):
                self.assert_echo(sock, data)
            for byte in range(256):
                if byte != ord("q"):
                    self.assert_echo(sock, bytes([byte]))

        def test_large_messages(self) -> None:
            """Megabytes come back unchanged, however they are cut on the way."""
            data = random.Random(1).randbytes(3_000_000).replace(b"\nq", b"\n-") + b"."
            with self.connect() as sock:
                sender = threading.Thread(target=sock.sendall, args=[data])
                sender.start()
                echo = client.receive(sock, len(data))
                sender.join()
            self.assertTrue(echo == data)

        def test_q_line(self) -> None:
            """A line that is just q ends it: before it all is echoed, after it nothing."""
            for data, echo in (
                (b"q\n", b""),
                (b"q\r\n", b""),
                (b"\nq\n", b"\n"),
                (b"one\ntwo\nq\nnot this\n", b"one\ntwo\n"),
                (b"one\r\nq\r\nnot this\r\nq\r\n", b"one\r\n"),
                (b"quit\nqq\nq q\n q\nq\n", b"quit\nqq\nq q\n q\n"),
                (b"x" * 70_000 + b"\nq\nnot this", b"x" * 70_000 + b"\n"),
            ):
                with self.subTest(data=data[:30]), self.connect() as sock:
                    sock.sendall(data)
                    self.assertEqual(read_to_end(sock), echo)

        def test_any_cut(self) -> None:
            """The rule holds wherever TCP cuts the bytes; Iraq and a newline is a word."""
            texts = (b"a\nq\nb", b"q\r\nb", b"\nq\r\n", b"Iraq\nx", b"\nqu\n", b"q\rq\n", b"\r\nq")
            for text in texts:
                with self.subTest(text=text):  # fails once, and not for each cut
                    for pieces in cuts(text):
                        self.assert_conversation(pieces)

        def assert_conversation(self, pieces: list[bytes]) -> None:
            """Send the pieces, each after the echo of the one before; fail if an echo is wrong."""
            with self.connect() as sock:
                got = b""
                for i, piece in enumerate(pieces, 1):
                    sock.sendall(piece)
                    echo, over = conversation(pieces[:i])
                    if over:
                        break
                    got += client.receive(sock, len(echo) - len(got))
                else:
                    sock.shutdown(socket.SHUT_WR)
                self.assertEqual(got + read_to_end(sock), echo, pieces)

        def test_lone_q(self) -> None:
            """A read that is exactly q ends it, as the client without newlines says it."""
            sock = self.connect()
            self.assert_echo(sock, b"hello")
            sock.sendall(b"q")
            self.assertEqual(read_to_end(sock), b"")

        def test_not_a_q_line(self) -> None:
            """Whatever only looks like a q is data."""
            lines = (b"quit", b"qq", b" q", b"Q", b"q q", b"q ", b"xq", b"q\0", b"q\r\r", b"\tq")
            for line in lines:
                with self.subTest(line=line), self.connect() as sock:
                    self.assert_echo(sock, line + b"\n")
                    self.assert_echo(sock, b"and " + line + b"\n")
                    self.assert_echo(sock, b"more\n")

        def test_half_close(self) -> None:
            """After the end of the client's stream, all that it is owed is still sent."""
            data = random.Random(2).randbytes(1_000_000).replace(b"\nq", b"\n-") + b"."
            with self.connect() as sock:
                [sent] = flood([sock], data)
                sock.shutdown(socket.SHUT_WR)
                echo = read_to_end(sock)
            self.assertEqual(len(echo), sent)
            self.assertTrue(echo == (data * (sent // len(data) + 1))[:sent])

        def test_q_after_much(self) -> None:
            """The echo arrives to its last byte, though much stands after the q too."""
            data = b"much " * 1_000_000 + b"\n"
            for before in (b"one\ntwo\n", data):
                text = before + b"q\n" + data[:1_000_000]
                with self.subTest(before=len(before)), self.connect() as sock:
                    [sent] = flood([sock], text, len(text))  # and is slow to read

                    def send(sock: socket.socket = sock, rest: bytes = text[sent:]) -> None:
                        with contextlib.suppress(OSError):  # the server may have closed
                            sock.sendall(rest)

                    sender = threading.Thread(target=send)
                    sender.start()
                    echo = read_to_end(sock)
                    sock.shutdown(socket.SHUT_RDWR)
                    sender.join()
                self.assertTrue(echo == before, f"{len(echo)} bytes of {len(before)}")

        def test_q_is_for_one(self) -> None:
            """A q ends one conversation; the others, and those to come, go on."""
            first, second = self.connect(), self.connect()
            self.assert_echo(first, b"first\n")
            first.sendall(b"q\n")
            self.assertEqual(read_to_end(first), b"")
            self.assert_echo(second, b"second\n")
            second.close()
            self.assert_serves()

        # What every server does

        def test_port(self) -> None:
            """--port takes that port, --help says so, and Ctrl-C gives it back at once."""
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
            """--help explains the model and the options."""
            process = Process(SCRIPTS[self.name], "--help")
            text = process.output().decode()
            self.assertEqual(process.process.returncode, 0)
            for word in ("kernel", "waiting for", "copying", "--host", "--port", "--quiet"):
                self.assertIn(word, text)

        def test_log(self) -> None:
            """stderr gets a line an event, with milliseconds, and no byte of a client raw."""
            server = self.start()
            said: list[bytes] = []
            for way_to_leave in ("quit", "end of stream", "reset"):
                sock = server.connect()
                name = "{}:{}".format(*sock.getsockname()).encode()
                self.assert_echo(sock, b"\x1b[31m\xff\a\r\n" + b"long " * 10_000)
                if way_to_leave == "quit":
                    sock.sendall(b"\nq\n")
                    self.assertEqual(read_to_end(sock), b"\n")
                if way_to_leave == "reset":
                    reset(sock)
                sock.close()
                wanted = name + rb": closed \(.*" + way_to_leave.encode()
                server.wait_for_log(wanted)
                lines = [line for line in server.log().splitlines() if name in line]
                self.assertRegex(lines[0], b" connected$")
                self.assertRegex(lines[1], rb" read \d+ bytes: b'\\x1b\[31m\\xff\\x07\\r\\nlong")
                self.assertEqual(sum(b": closed " in line for line in lines), 1)
                said += lines
            self.assertCountEqual(server.log().splitlines(), said)
            for line in said:
                self.assertRegex(line, rb"\A\d\d:\d\d:\d\d\.\d\d\d [ -~]{1,120}\Z")

        def test_quiet(self) -> None:
            """--quiet silences the log."""
            server = self.start("--quiet")
            self.assert_serves(server)
            reset(self.connect(server))
            self.assert_serves(server)
            self.assertEqual(server.log(), b"")
            self.assert_stops(server)

        def test_closed_stdout(self) -> None:
            """A stdout that cannot be written to ends it with an error, and no traceback."""
            reader, writer = os.pipe()
            os.close(reader)
            process = Process(SCRIPTS[self.name], "--port", "0", stdout=writer)
            os.close(writer)
            self.addCleanup(process.kill)
            process.output()
            self.assertGreater(process.process.returncode, 0)
            self.assertIn(b"cannot serve", process.log())
            self.assertNotIn(b"Traceback", process.log())

        def test_mistakes(self) -> None:
            """A mistake gets one line that names it, and a status that is not 0."""
            port = str(self.server.port)
            mistakes = (
                (("--port", port), f"127.0.0.1:{port}"),
                (("--port", "65536"), "65536"),
                (("--host", "192.0.2.1"), "192.0.2.1"),
                (("--nonsense",), "--nonsense"),
            )
            processes = [Process(SCRIPTS[self.name], *options) for options, _ in mistakes]
            for process, (options, named) in zip(processes, mistakes):
                with self.subTest(options=options):
                    self.assertEqual(process.output(), b"")
                    self.assertGreater(process.process.returncode, 0)
                    self.assertRegex(process.log().decode(), rf"(?s)\A.*{re.escape(named)}.*\n\Z")
                    self.assertNotIn(b"Traceback", process.log())

        @POSIX
        def test_ctrl_c(self) -> None:
            """Ctrl-C ends it at once, without clients, and with silent ones."""
            self.assert_stops(self.start())
            server = self.start()
            clients = [self.connect(server) for _ in range(5)]
            self.assert_echo(clients[0], b"hello\n")
            self.assert_stops(server)

        @POSIX
        def test_ctrl_c_in_transfers(self) -> None:
            """Ctrl-C ends it at once, however much is on its way, or stuck."""
            server = self.start("--quiet")
            stuck, busy = self.connect(server), self.connect(server)
            if not self.one_at_a_time:
                flood([stuck], b"x" * 65536)
            else:
                stuck.close()

            def exchange() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        busy.sendall(b"x" * 1000)
                        busy.recv(65536)

            clients = [threading.Thread(target=exchange) for _ in range(2)]
            for thread in clients:
                thread.start()
            before = server.cpu() if sys.platform == "linux" else 0.0
            if sys.platform == "linux":
                eventually(lambda: server.cpu() > before + 0.05, "the server at work")
            self.assert_stops(server, at_work=True)
            for thread in clients:
                thread.join()

        @POSIX
        def test_reset(self) -> None:
            """A reset costs a line: before accept, while read, while written."""
            server = self.start()
            server.process.send_signal(signal.SIGSTOP)
            early = self.connect(server)
            early.sendall(b"hello\n")
            names = [early.getsockname()]
            reset(early)
            server.process.send_signal(signal.SIGCONT)
            for harm in ("silent", "greedy"):
                sock = self.connect(server)
                names.append(sock.getsockname())
                self.assert_echo(sock, b"hello\n")
                if harm == "greedy":
                    flood([sock], b"x" * 65536)
                reset(sock)
            self.assert_serves(server)
            for host, port in names[1:]:
                line = rf"{host}:{port}: closed \(.*reset".encode()
                server.wait_for_log(line)
                self.assertEqual(server.log().count(f"{host}:{port}: closed".encode()), 1)
            self.assert_serves(server)

        @POSIX
        def test_queue(self) -> None:
            """1,024 clients can wait in the kernel's queue, and are served then."""
            with contextlib.suppress(OSError):
                most = int(Path("/proc/sys/net/core/somaxconn").read_text())
                if most < 1024:
                    self.skipTest(f"the kernel queues {most} clients at most")
            server = self.start("--quiet")
            server.process.send_signal(signal.SIGSTOP)
            socks = [socket.socket() for _ in range(1024)]
            for sock in socks:
                self.addCleanup(sock.close)
                sock.settimeout(3)  # who finds no room is not told, and tries again in a second
                sock.connect(("127.0.0.1", server.port))
                sock.sendall(b"hello\n")
            server.process.send_signal(signal.SIGCONT)
            for sock in socks:
                self.assertEqual(client.receive(sock, 6), b"hello\n")
                sock.close()

        @LINUX
        def test_idle(self) -> None:
            """Silent clients cost no CPU."""
            server = self.start()
            socks = [self.connect(server) for _ in range(20)]
            self.assert_echo(socks[0], b"hello\n")
            self.assert_idle(server)

        def assert_idle(self, server: Server) -> None:
            """Fail if the server does not come to rest."""
            if not self.polls:
                eventually(server.sleeps, "a server that sleeps")
                return
            before, start = server.cpu(), time.monotonic()
            time.sleep(0.3)
            self.assertLess(server.cpu() - before, (time.monotonic() - start) / 2)

        @LINUX
        def test_never_reads(self) -> None:
            """Clients that send and never read cost little memory, no CPU, and nobody's time."""
            server = self.start("--quiet")
            clients = 1 if self.one_at_a_time else 4
            socks = [self.connect(server) for _ in range(clients)]
            for sock in socks:
                self.assert_echo(sock, b"x" * 200_000)
            before = server.memory()
            flood(socks, b"x" * 65536)
            self.assert_idle(server)
            self.assertLess(server.memory() - before, (clients * 128 + 1024) * 1024)
            if not self.one_at_a_time:
                self.assert_serves(server)

        @LINUX
        def test_reads_late(self) -> None:
            """A client that has read late all that it was owed costs no CPU from then on."""
            server = self.start("--quiet")
            sock = self.connect(server)
            [sent] = flood([sock], b"x" * 65536)
            self.assertEqual(len(client.receive(sock, sent)), sent)
            self.assert_echo(sock, b"hello\n")
            self.assert_idle(server)

        @LINUX
        def test_long_conversation(self) -> None:
            """A conversation of 32 MiB more leaves nothing in memory."""
            server = self.start("--quiet")
            chunk = b"0123456\n" * 8192
            with server.connect() as sock:

                def exchange(chunks: int) -> None:
                    sender = threading.Thread(target=sock.sendall, args=[chunk * chunks])
                    sender.start()
                    client.receive(sock, len(chunk) * chunks)
                    sender.join()

                exchange(64)
                before = server.memory()
                for _ in range(8):
                    exchange(64)
                self.assertLess(server.memory() - before, 2 << 20)

        @LINUX
        def test_no_descriptor_left(self) -> None:
            """With no descriptor left, who is in is served; the others wait, at no CPU."""
            if self.one_at_a_time:
                self.assert_full_house(120, range(1, 2), lines=0, files=64)
            else:
                self.assert_full_house(120, range(50, 64), lines=1, files=64)

        def assert_full_house(
            self, clients: int, room: range, lines: int, *options: str, files: int = 0
        ) -> None:
            """Fail if, of so many clients, not as many as there is room for are served, and
            then the next one whenever one leaves; or if that is not said in so many lines."""
            server = self.start(*options, files=files)
            waiting = {}
            queue = select.poll()
            for _ in range(clients):
                sock = self.connect(server)
                sock.sendall(b"hello\n")
                waiting[sock.fileno()] = sock
                queue.register(sock, select.POLLIN)
            inside: list[socket.socket] = []

            def let_in() -> int:
                """Note who has been served; return how many are inside."""
                for fd, _ in queue.poll(0):
                    sock = waiting.pop(fd)
                    queue.unregister(sock)
                    self.assertEqual(client.receive(sock, 6), b"hello\n")
                    inside.append(sock)
                return len(inside)

            eventually(lambda: let_in() >= room[0], f"{room[0]} clients served")
            self.assert_idle(server)
            full = let_in()
            self.assertIn(full, room)
            self.assertEqual(b" full (" in server.log(), lines > 0)
            for sock in inside:
                self.assert_echo(sock, b"still in\n")
            for _ in range(20):
                inside.pop(0).close()
                self.wait_for(let_in, full)
            while waiting:
                missing = min(full, len(waiting))
                for sock in inside:
                    sock.close()
                inside.clear()
                self.wait_for(let_in, missing)
            self.assertNotIn(b"Traceback", server.log())

        def wait_for(self, number: Callable[[], int], wanted: int) -> None:
            """Wait until the number is the wanted one."""
            eventually(lambda: number() == wanted, f"{number()} becomes {wanted}")

        @LINUX
        def test_no_leak(self) -> None:
            """2,000 clients come and go, and leave no descriptor behind."""
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
                        sock.sendall(b"is left unread\n")
                    if number % 4 == 3:
                        reset(sock)
            self.assert_serves(server)
            eventually(lambda: server.descriptors() == before, "all descriptors closed")

        # The client

        def run_client(self, data: bytes, *options: str) -> tuple[bytes, bytes, int]:
            """Pipe data through client.py; return its stdout, stderr and status."""
            options = ("--port", str(self.server.port), *options)
            process = Process(CLIENT, *options, stdin=subprocess.PIPE)
            self.addCleanup(process.kill)
            output = process.output(data)
            return output, process.log(), process.process.returncode

        def test_client_piped(self) -> None:
            """stdout of client.py is what came back, to the byte; a q line ends it."""
            data = b"\xff\0\r\n\n\xe4 quit\nqq\nwithout a newline"
            self.assertEqual(self.run_client(data), (data, b"", 0))
            self.assertEqual(self.run_client(b"one\nq\ntwo\n"), (b"one\n", b"", 0))

        def test_client_long_line(self) -> None:
            """A line of 20 MB comes back through client.py."""
            line = b"megabytes of this line. " * 850_000 + b"\n"
            output, errors, status = self.run_client(line)
            self.assertTrue(output == line)
            self.assertEqual((errors, status), (b"", 0))

        @POSIX
        def test_client_at_terminal(self) -> None:
            """At a terminal client.py prompts, prints the echo, and ends with q or Ctrl-D."""
            for end, rest in ((b"q\n", b"q\r\n"), (b"\x04", b"\r\n")):
                with self.subTest(end=end):
                    terminal = Terminal("--port", str(self.server.port))
                    self.addCleanup(terminal.close)
                    terminal.expect(b">>> ")
                    terminal.type(b"hello\n")
                    terminal.expect(b"hello\r\nhello\r\n>>> ")
                    terminal.type(b"\n")
                    terminal.expect(b"\r\n\r\n>>> ")
                    terminal.type(end)
                    terminal.expect(rest)
                    self.assertEqual(terminal.process.wait(DEADLINE), 0)

        def test_client_many(self) -> None:
            """client.py --clients is many at once, checks every echo, and draws who was served."""
            output, errors, status = self.run_client(b"", "--clients", "30", "--messages", "20")
            self.assertEqual((errors, status), (b"", 0))
            text = output.decode()
            self.assertIn("20 of the 30 clients", text)
            self.assertIn("600 messages in ", text)
            rows = re.findall(r"^ *(\d+)  (\.*)(#+)$", text, re.MULTILINE)
            self.assertEqual(len(rows), 20)
            self.assertEqual((rows[0][0], rows[-1][0]), ("1", "30"))
            self.assertLessEqual(max(map(len, text.splitlines()[:-3])), 72)
            waits = [len(row[1]) for row in rows]
            if self.one_at_a_time:
                self.assertEqual(waits, sorted(waits), "a staircase")
                self.assertGreater(waits[-1], 20)
            crowd = client.Crowd(clients=5, messages=10, size=200_000, pause=0.001)
            crowd.run(("127.0.0.1", self.server.port))
            self.assertEqual((crowd.lost, crowd.different, len(crowd.echo_times)), (0, 0, 50))
            if self.one_at_a_time:
                for end, first_echo in zip(crowd.end, crowd.first_echo[1:]):
                    self.assertLess(end, first_echo)
            else:
                self.assertLess(max(crowd.first_echo), min(crowd.end))


class ForManyAtOnce:
    """What every server must do but the blocking one."""

    class Tests(ForEveryServer.Tests):
        def test_silent_neighbour(self) -> None:
            """A client that says nothing keeps nobody waiting."""
            self.connect()
            self.assert_serves()

        @POSIX
        def test_turns(self) -> None:
            """However much a client has sent, the others have their turn between two reads."""
            server = self.start()
            busy, other = self.connect(server), self.connect(server)
            self.assert_echo(busy, b"hello\n")
            self.assert_echo(other, b"hello\n")
            server.process.send_signal(signal.SIGSTOP)
            flood([busy], b"x" * 65536)
            other.sendall(b"my turn\n")
            server.process.send_signal(signal.SIGCONT)
            self.assertEqual(client.receive(other, 8), b"my turn\n")
            before = server.log().partition(b"my turn")[0]
            self.assertLess(before.count(b"b'xxxx"), 5)

        def test_busy_neighbour(self) -> None:
            """A client that sends as fast as it can keeps nobody waiting."""
            server = self.start("--quiet")
            busy, other = self.connect(server), self.connect(server)
            self.assert_echo(other, b"hello\n")
            stop = False

            def send() -> None:
                chunk = b"x" * (1 << 20)
                with contextlib.suppress(OSError):
                    while not stop:
                        busy.sendall(chunk)

            def receive() -> None:
                with contextlib.suppress(OSError):
                    while busy.recv(1 << 20):
                        pass

            threads = [threading.Thread(target=send), threading.Thread(target=receive)]
            for thread in threads:
                thread.start()
            slowest = 0.0
            try:
                for _ in range(50):
                    start = time.monotonic()
                    self.assert_echo(other, b"hello\n")
                    slowest = max(slowest, time.monotonic() - start)
            finally:
                stop = True
                busy.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join()
            self.assertLess(slowest, 1)


class BlockingServer(ForEveryServer.Tests):
    """The model of blocking_server.py: one client at a time."""

    name = "blocking"
    one_at_a_time = True

    def test_one_at_a_time(self) -> None:
        """The second client is connected, and waits for its echo until the first leaves."""
        first, second = self.connect(), self.connect()
        second.sendall(b"second\n")
        for _ in range(100):
            self.assert_echo(first, b"first\n")
        self.assertEqual(select.select([second], [], [], 0)[0], [])
        first.close()
        self.assertEqual(client.receive(second, 7), b"second\n")

    def test_who_stays_after_q(self) -> None:
        """A client that has said q, and does not close, keeps the next one waiting no longer."""
        first = self.connect()
        first.sendall(b"q\nnot this\n")
        self.assertEqual(read_to_end(first), b"")
        self.assert_serves()


class NonblockingServer(ForManyAtOnce.Tests):
    """The model of nonblocking_server.py: asks everybody in turn, and pauses."""

    name = "nonblocking"
    options = ("--interval", "0.001")
    polls = True

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
        return sorted(delays)[1]

    @LINUX
    def test_interval_is_delay(self) -> None:
        """A message waits for as long as the pause is."""
        self.assertGreater(self.delay("0.3"), 0.15)
        self.assertLess(self.delay("0.001"), 0.15)

    @LINUX
    def test_interval_is_cpu(self) -> None:
        """Without a pause it never sleeps; with one of 0.01, it uses little CPU while idle."""
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

    def test_no_pause_at_work(self) -> None:
        """It pauses only after a round in which nobody had anything to do."""
        server = self.start("--interval", "0.3", "--quiet")
        data = b"x" * 6_000_000
        with server.connect() as sock:
            sender = threading.Thread(target=sock.sendall, args=[data])
            start = time.monotonic()
            sender.start()
            client.receive(sock, len(data))
            sender.join()
        self.assertLess(time.monotonic() - start, 9)  # 92 reads and more

    def test_bad_interval(self) -> None:
        """An interval that is none gets one line."""
        for interval in ("-1", "nan", "inf", "soon"):
            process = Process(SCRIPTS[self.name], f"--interval={interval}")
            self.assertEqual(process.output(), b"")
            self.assertGreater(process.process.returncode, 0)
            self.assertRegex(process.log().decode(), r"(?s)\A.*--interval.*\n\Z")


class SelectServer(ForManyAtOnce.Tests):
    """The model of select_server.py: select on everyone, within its limit."""

    name = "select"

    @LINUX
    def test_1300_clients(self) -> None:
        """Whom select cannot watch waits in the queue, and is served when there is room."""
        self.assert_full_house(1300, range(1000, 1025), 1)


class TenThousand:
    """What the servers without a limit must do."""

    class Tests(ForManyAtOnce.Tests):
        @LINUX
        def test_10_000_clients(self) -> None:
            """10,000 clients are held, at no CPU, and served."""
            files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if files < 10_300:
                self.skipTest(f"a process may open {files} files here")
            server = self.start("--quiet")
            socks = []
            for number in range(10_000):
                socks.append(self.connect(server))
                if number % 200 == 199:  # no faster than it accepts them
                    self.assert_echo(socks[-1], b"hello\n")
            self.assert_idle(server)
            for sock in socks[::100]:
                self.assert_echo(sock, b"hello\n")
            for sock in socks:
                sock.sendall(b"all at once\n")
            for sock in socks:
                self.assertEqual(client.receive(sock, 12), b"all at once\n")


@unittest.skipUnless(hasattr(select, "epoll"), "this platform has no epoll")
class EpollServer(TenThousand.Tests):
    """The model of epoll_server.py: told only who is ready."""

    name = "epoll"

    def test_calls(self) -> None:
        """A message costs a recv and a send; writable is watched for only while it is owed."""
        profiler = Path(FOLDER.name, "profiler.py")
        profiler.write_text(PROFILER)
        server = Server(profiler, str(SCRIPTS[self.name]))
        self.addCleanup(server.kill)
        sock = self.connect(server)
        for _ in range(200):
            self.assert_echo(sock, b"hello\n")
        sock.close()
        server.wait_for_log(b": closed ")
        server.wait_for_rest()
        server.process.send_signal(signal.SIGINT)
        server.output()
        calls = ast.literal_eval(server.log().decode().splitlines()[-1])
        self.assertEqual(calls["send"], 200)
        self.assertEqual(calls["recv"], 201)
        self.assertLessEqual(calls["poll"], 210)
        self.assertLessEqual(calls.get("modify", 0), 2)


class NoEpoll(unittest.TestCase):
    """epoll_server.py where the platform has no epoll."""

    def test_says_so(self) -> None:
        """It says so in one line, which names selectors_server.py."""
        runner = Path(FOLDER.name, "no_epoll.py")
        runner.write_text(NO_EPOLL)
        process = Process(runner, str(SCRIPTS["epoll"]))
        self.assertEqual(process.output(), b"")
        self.assertGreater(process.process.returncode, 0)
        self.assertRegex(process.log().decode(), r"\A.*epoll.*selectors_server\.py.*\n\Z")


class SelectorsServer(TenThousand.Tests):
    """The model of selectors_server.py: the best selector, or the one that is asked for."""

    name = "selectors"

    def test_names_the_selector(self) -> None:
        """The line on stdout says which selector is at work: by default the best."""
        self.assertIn(selectors.DefaultSelector.__name__, self.server.line)

    def test_each_selector(self) -> None:
        """--selector takes each one that the platform has, which then serves."""
        for name in ("select", "poll", "epoll", "kqueue", "devpoll"):
            kind = f"{name.capitalize()}Selector"
            with self.subTest(name=name):
                if not hasattr(selectors, kind):
                    process = Process(SCRIPTS[self.name], "--selector", name)
                    self.assertEqual(process.output(), b"")
                    self.assertRegex(process.log().decode(), rf"(?s)\A.*--selector.*{name}.*\n\Z")
                    continue
                server = self.start("--quiet", "--selector", name)
                self.assertIn(kind, server.line)
                self.connect(server)
                sock = self.connect(server)
                [sent] = flood([sock], b"x" * 65536)
                if sys.platform == "linux":
                    self.assert_idle(server)
                self.assert_serves(server)
                self.assertEqual(len(client.receive(sock, sent)), sent)
                reset(sock)
                self.assert_serves(server)
                if sys.platform != "win32":
                    self.assert_stops(server)

    @LINUX
    def test_1300_clients_of_select(self) -> None:
        """With --selector select, whom it cannot watch waits in the queue."""
        self.assert_full_house(1300, range(1000, 1025), 1, "--selector", "select")


class AsyncServer(TenThousand.Tests):
    """The model of async_server.py."""

    name = "async"


class SharedCode(unittest.TestCase):
    """What two servers share stands in both to the letter, in the same order."""

    MODEL = ("serve", "handle_client", "main")  # may differ: they are the model, or call it

    @staticmethod
    def definitions(script: Path) -> dict[str, str]:
        """Return the text of each top-level statement of a script, by the name it defines."""
        source = script.read_text()
        texts = {}
        for node in ast.parse(source).body:
            text = ast.get_source_segment(source, node) or ""
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                texts[node.name] = text
            elif isinstance(node, ast.Assign):
                texts[ast.unparse(node.targets[0])] = source.splitlines()[node.lineno - 1]
            elif isinstance(node, ast.If):
                texts[text.split(":")[0]] = text
        return texts

    def test_to_the_letter(self) -> None:
        """Every definition that two servers have is the same, in the same place."""
        every = {name: self.definitions(script) for name, script in SCRIPTS.items()}
        for (one, ours), (other, theirs) in itertools.combinations(every.items(), 2):
            common = [name for name in ours if name in theirs]
            self.assertEqual(common, [name for name in theirs if name in ours], (one, other))
            for name in common:
                if name not in self.MODEL:
                    self.assertEqual(ours[name], theirs[name], f"{name} in {one} and {other}")
        for ours in every.values():
            self.assertLessEqual({"Conversation", "main", "RECV_SIZE"}, ours.keys())
        for name in ("nonblocking", "select", "epoll", "selectors"):
            self.assertLessEqual({"Connection", "accept"}, every[name].keys())

    def test_main(self) -> None:
        """main has the same lines in all servers, and some more where there is an option."""
        mains = []
        for script in SCRIPTS.values():
            lines = self.definitions(script)["main"].splitlines()
            mains.append([line for line in lines if not re.search(r"serve\(|listening on", line)])
        common = min(mains, key=len)
        for lines in mains:
            rest = iter(lines)
            self.assertTrue(all(line in rest for line in common), lines)

    def test_each_stands_alone(self) -> None:
        """A script imports nothing but the standard library, and runs where nothing else is."""
        ours = {path.stem for path in HERE.glob("*.py")}
        for name, script in SCRIPTS.items():
            for node in ast.walk(ast.parse(script.read_text())):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    self.assertFalse(ours & {alias.name for alias in node.names})
                    self.assertNotIn(getattr(node, "module", None), ours)
            with self.subTest(name=name), tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, "lesson.py")
                copy.write_text(script.read_text())
                if name == "epoll" and not hasattr(select, "epoll"):
                    continue
                server = Server(copy, "--quiet", cwd=folder)
                self.addCleanup(server.kill)
                with server.connect() as sock:
                    sock.sendall(b"hello\n")
                    self.assertEqual(client.receive(sock, 6), b"hello\n")


class Client(unittest.TestCase):
    """client.py, at servers that are not ours."""

    def listen(self, answer: Callable[[socket.socket], object]) -> int:
        """Return the port of a server that answers one client, in a thread."""
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(DEADLINE)

        def serve() -> None:
            with listener, contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(DEADLINE)
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        self.addCleanup(thread.join)
        return int(listener.getsockname()[1])

    def start(self, port: int, *options: str) -> Process:
        """Return client.py, with a pipe to its stdin."""
        process = Process(CLIENT, "--port", str(port), *options, stdin=subprocess.PIPE)
        self.addCleanup(process.kill)
        return process

    def assert_fails(self, process: Process, *named: str) -> None:
        """Fail unless the client ends with status 1 and one line with these words."""
        process.process.wait(DEADLINE)
        self.assertEqual(process.process.returncode, 1)
        line = process.log().decode()
        self.assertRegex(line, r"\A[^\n]+\n\Z")
        for word in named:
            self.assertIn(word, line)

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

            def answer(connection: socket.socket, seen: list[bytes] = seen) -> None:
                seen.append(read_to_end(connection))
                connection.sendall(seen[0].replace(b"\nq\n", b"\n"))

            with self.subTest(data=data):
                process = self.start(self.listen(answer))
                process.output(data)
                self.assertEqual(seen, [wanted])
                self.assertEqual(process.process.returncode, 0)

    def test_echo_at_once(self) -> None:
        """In a pipe, what comes back is written at once, before more is read."""
        port = self.listen(lambda connection: connection.sendall(read_line(connection) * 2))
        process = self.start(port)
        assert process.process.stdin and process.process.stdout
        process.process.stdin.write(b"hello\n")
        process.process.stdin.flush()
        self.assertEqual(process.process.stdout.readline(), b"hello\n")
        process.process.stdin.close()

    @POSIX
    def test_echo_in_pieces(self) -> None:
        """At a terminal, the client waits until the whole of the echo is there."""
        proceed = threading.Event()

        def answer(connection: socket.socket) -> None:
            line = read_line(connection)
            connection.sendall(line[:2])
            proceed.wait(DEADLINE)
            connection.sendall(line[2:])
            read_to_end(connection)

        terminal = Terminal("--port", str(self.listen(answer)))
        self.addCleanup(terminal.close)
        terminal.expect(b">>> ")
        terminal.type(b"hello\n")
        terminal.expect(b"hello\r\n")
        self.assertEqual(select.select([terminal.keyboard], [], [], 0.1)[0], [])
        proceed.set()
        terminal.expect(b"hello\r\n>>> ")

    @POSIX
    def test_ctrl_c(self) -> None:
        """Ctrl-C ends it without a traceback: at the prompt, and while it waits."""
        for typed, shown in ((b"", b""), (b"hello\n", b"hello\r\n")):
            got = threading.Event()

            def answer(connection: socket.socket, got: threading.Event = got) -> None:
                if connection.recv(100):
                    got.set()
                    read_to_end(connection)

            with self.subTest(typed=typed):
                terminal = Terminal("--port", str(self.listen(answer)))
                self.addCleanup(terminal.close)
                terminal.expect(b">>> ")
                if typed:
                    terminal.type(typed)
                    terminal.expect(shown)
                    self.assertTrue(got.wait(DEADLINE))
                terminal.process.send_signal(signal.SIGINT)
                terminal.expect(b"\r\n")
                self.assertEqual(terminal.process.wait(DEADLINE), 0)
                self.assertEqual(terminal.screen, b"")

    def test_no_server(self) -> None:
        """Without a server, one line says how to start one."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for options in ((), ("--clients", "3")):
            with self.subTest(options=options):
                process = self.start(port, *options)
                self.assert_fails(process, f"127.0.0.1:{port}", "python select_server.py")

    def test_server_goes_away(self) -> None:
        """A server that goes away in the middle is told in one line, though stdin is open."""
        for way in ("end", "reset"):
            with self.subTest(way=way):

                def answer(connection: socket.socket, way: str = way) -> None:
                    connection.sendall(read_line(connection))
                    if way == "reset":
                        reset(connection)

                process = self.start(self.listen(answer))
                assert process.process.stdin and process.process.stdout
                process.process.stdin.write(b"hello\n")
                process.process.stdin.flush()
                self.assertEqual(process.process.stdout.readline(), b"hello\n")
                self.assert_fails(process, "python select_server.py")

    @POSIX
    def test_server_leaves_terminal(self) -> None:
        """At a terminal too, a server that goes away is told in one line."""

        def answer(connection: socket.socket) -> None:
            connection.sendall(read_line(connection)[:3])

        terminal = Terminal("--port", str(self.listen(answer)))
        self.addCleanup(terminal.close)
        terminal.expect(b">>> ")
        terminal.type(b"hello\n")
        terminal.expect(b"hello\r\nno server answers at 127.0.0.1:")
        self.assertEqual(terminal.process.wait(DEADLINE), 1)

    def test_reader_goes_away(self) -> None:
        """When nobody reads its stdout any more, it ends without a traceback."""
        process = self.start(self.listen(lambda sock: sock.sendall(read_line(sock))))
        assert process.process.stdin and process.process.stdout
        process.process.stdout.close()
        process.process.stdin.write(b"hello\n")
        process.process.stdin.flush()
        self.assert_fails(process, "cannot write")

    def test_mistakes(self) -> None:
        """A mistake gets one line that names it."""
        mistakes = (
            ("--port", "65536"),
            ("--port", "0"),
            ("--clients", "0"),
            ("--messages", "x"),
            ("--size", "-1"),
            ("--pause", "nan"),
            ("--nonsense",),
        )
        processes = [Process(CLIENT, *options) for options in mistakes]
        for process, options in zip(processes, mistakes):
            with self.subTest(options=options):
                self.assertEqual(process.output(), b"")
                self.assertGreater(process.process.returncode, 0)
                self.assertRegex(process.log().decode(), rf"\A[^\n]*{options[0]}[^\n]*\n\Z")

    def test_wrong_echo(self) -> None:
        """--clients counts an echo that differs, in any byte, or is too long."""
        for end in (b"x\n", b"t \n\n"):

            def answer(connection: socket.socket, end: bytes = end) -> None:
                connection.sendall(read_line(connection)[:-2] + end)

            process = self.start(self.listen(answer), "--clients", "1", "--messages", "1")
            process.output(b"")
            self.assert_fails(process, "differ: 1")

    def test_lost_connection(self) -> None:
        """--clients counts a connection that ends before its time."""
        process = self.start(self.listen(read_line), "--clients", "1")
        output = process.output(b"")
        self.assert_fails(process, "lost: 1")
        self.assertIn(b"0 messages", output)

    @POSIX
    def test_progress(self) -> None:
        """A run of more than a second shows its progress at a terminal, and only there."""
        server = Server(SCRIPTS["selectors"], "--quiet")
        self.addCleanup(server.kill)
        options = ("--port", str(server.port), "--clients=2", "--messages=3", "--pause=0.6")
        process = Process(CLIENT, *options)
        terminal = Terminal(*options)
        self.addCleanup(terminal.close)
        terminal.expect(b"\r1 s: 4 of 6 messages ")
        self.assertEqual(terminal.process.wait(DEADLINE), 0)
        self.assertIn(b"6 messages in 1.", process.output())
        self.assertEqual(process.log(), b"")

    @LINUX
    def test_too_many_clients(self) -> None:
        """More clients than it may open files for: one line says so, and what to do."""
        port = self.listen(lambda connection: None)
        process = Process(CLIENT, "--port", str(port), "--clients", "100", files=64)
        self.assertEqual(process.output(), b"")
        self.assert_fails(process, "100 clients", "ulimit -n")
        socket.create_connection(("127.0.0.1", port), DEADLINE).close()


# The measurement


def measure(server: Server, clients: int, seconds: float) -> tuple[client.Crowd, float]:
    """Return what so many clients saw of a server in about so many seconds, and its CPU time.

    That is the median of three runs. Raises AssertionError if an echo was wrong or a
    connection lost.
    """
    messages = 5
    runs: list[tuple[client.Crowd, float]] = []
    while len(runs) < 3:
        crowd = client.Crowd(clients, messages, size=64, pause=0)
        before = server.cpu() if sys.platform == "linux" else 0.0
        crowd.run(("127.0.0.1", server.port))
        used = server.cpu() - before if sys.platform == "linux" else 0.0
        if crowd.lost or crowd.different:
            raise AssertionError(f"{crowd.lost} connections lost, {crowd.different} echoes differ")
        took = max(crowd.end)
        if took > seconds / 2:
            runs.append((crowd, used))
        else:
            messages *= max(2, int(seconds / took))
    return sorted(runs, key=lambda run: rate(run[0]))[1]


def rate(crowd: client.Crowd) -> float:
    """Return how many messages a second these clients had echoed."""
    return len(crowd.echo_times) / max(crowd.end)


def idle_cpu(server: Server, seconds: float) -> float:
    """Return the share of a core that the server uses while all are silent."""
    before, start = server.cpu(), time.monotonic()
    time.sleep(seconds)
    return (server.cpu() - before) / (time.monotonic() - start)


def benchmark(rows: tuple[str, ...], seconds: float = 1.0) -> None:
    """Measure servers, each a name with its options; print a row as soon as it is measured."""
    print(f"CPython {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    print("Messages of 64 bytes, each sent after the echo of the one before; medians of three runs")
    print("/s: messages a second; 99%: 99th percentile of the time to an echo")
    print()
    print(f"{'':26}{'1 client':>17}{'100 clients':>19}{'CPU a':>10}{'CPU':>7}  10 clients")
    print(
        f"{'':26}{'/s':>7}{'median':>10}{'/s':>9}{'99%':>10}"
        f"{'message':>10}{'idle':>7}  beside 900 silent, /s (# is 5,000)"
    )
    for row in rows:
        name, *options = row.split()
        if name == "epoll" and not hasattr(select, "epoll"):
            print(f"{row:26}not on this platform")
            continue
        with contextlib.ExitStack() as stack:
            server = Server(SCRIPTS[name], "--quiet", *options)
            stack.callback(server.kill)
            one, _ = measure(server, 1, seconds)
            hundred, used = measure(server, 100, seconds)
            cpu = idle = "-"
            silent = [stack.enter_context(server.connect()) for _ in range(100)]
            if name != "blocking":
                measure(server, 1, 0)  # who comes after them is served: they are in
            if sys.platform == "linux":
                cpu = f"{used / len(hundred.echo_times) * 1e6:.1f} us"
                idle = f"{idle_cpu(server, seconds):.1%}"
            beside = "one at a time"
            if name != "blocking":
                silent += [stack.enter_context(server.connect()) for _ in range(800)]
                ten, _ = measure(server, 10, seconds)
                beside = f"{rate(ten):7,.0f} " + "#" * round(rate(ten) / 5000)
        times = sorted(hundred.echo_times)
        print(
            f"{row:26}{rate(one):7,.0f}"
            f"{statistics.median(one.echo_times) * 1000:7.2f} ms"
            f"{rate(hundred):9,.0f}{times[len(times) * 99 // 100] * 1000:7.1f} ms"
            f"{cpu:>10}{idle:>7}  {beside}",
            flush=True,
        )


BENCHMARK = (
    "blocking",
    "nonblocking",
    "select",
    "epoll",
    "selectors",
    "selectors --selector poll",
    "async",
)

if __name__ == "__main__":
    if sys.argv[1:] == ["--benchmark"]:
        setUpModule()
        benchmark(BENCHMARK)
        tearDownModule()
    else:
        unittest.main()
