"""Tests for the six echo servers and their client. With --benchmark, measure the servers.

    python test_all.py EpollServer.test_half_close  one test (without a name: all, in a minute)

FirstTest shows the method: start a server, play a client, check what comes back. self.inside()
needs no process: serve() runs in a thread, with sockets that note each call and fail as told.
"""

from __future__ import annotations

import asyncio
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out
import client

resource: Any = importlib.import_module("resource") if os.name == "posix" else None
HERE = Path(__file__).resolve().parent
NAMES = ("blocking", "nonblocking", "select", "epoll", "selectors", "async")
SCRIPTS = {name: HERE / f"{name}_server.py" for name in NAMES}
CLIENT = HERE / "client.py"
DEADLINE = 10.0  # seconds to wait before giving up
NOISE = random.Random(1).randbytes(1 << 22).replace(b"q", b"-")
LINUX = unittest.skipUnless(os.path.exists("/proc/self/stat"), "needs /proc")


class FirstTest(unittest.TestCase):
    def test_a_lost_client_does_no_harm_to_another(self) -> None:
        # Port 0 is any free port: the server prints which one it got.
        command = [sys.executable, "select_server.py", "--port", "0", "--quiet"]
        server = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE)
        self.addCleanup(server.communicate)
        self.addCleanup(server.kill)  # whatever happens here, no process stays behind
        line = server.stdout.readline() if server.stdout else b""
        port = int(line.split(b":")[1].split()[0])
        # A client. The timeout makes a server that does not answer fail the test.
        with socket.create_connection(("127.0.0.1", port), timeout=10) as first:
            first.sendall(b"hello\n")
            self.assertEqual(first.recv(100), b"hello\n")
            # A misbehaving client: lingering for 0 seconds makes close() reset the connection.
            second = socket.create_connection(("127.0.0.1", port), timeout=10)
            second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            second.close()
            first.sendall(b"still there?\n")
            self.assertEqual(first.recv(100), b"still there?\n")


# ---- Every server: SelectServer.test_reset and the like are written here, and inherited

class EveryServer(unittest.TestCase):
    name = says = calls = ""  # says: in the line on stdout; calls: see test_calls
    options: tuple[tuple[str, Any], ...] = ()  # and what serve() then gets; None: it is refused
    many: tuple[str, ...] = ()  # options for crowds
    crowd = 300  # silent clients in test_idle
    iterative = retries = False  # serves one client at a time; tries to accept each second
    arguments: Any = staticmethod(list)  # what serve() takes beside the listener

    def start(self, clients: int, *options: str, **more: Any) -> tuple[Server, Any]:
        """Return a server, which is idle, and so many clients, which have said hello."""
        need_files(self, clients + 300)
        server, socks = Server(SCRIPTS[self.name], *options, **more), []
        self.addCleanup(server.kill)
        for number in range(clients):
            if number % 30 == 0:  # no faster than it can accept them
                server.wait_for_rest()
            socks.append(server.connect())
            self.addCleanup(socks[-1].close)
            socks[-1].sendall(b"hello\n")
        eventually(server.idle, "an idle server")
        return server, socks

    def inside(self, *plan: Any, arguments: Any = None, **changes: Any) -> Inside:
        """Return a server in a thread: accept() follows the plan, names of its module change."""
        inside = Inside(self.name, plan, arguments or self.arguments(), changes)
        self.addCleanup(inside.stop)
        return inside

    def assert_echo(self, sock: socket.socket, data: bytes) -> None:
        sock.sendall(data)
        self.assertEqual(receive(sock, len(data)), data)

    def hello(self, inside: Inside) -> socket.socket:
        sock = inside.connect()
        self.assert_echo(sock, b"hello\n")
        return sock

    def flooded(self) -> tuple[Inside, socket.socket, bytes]:
        """Return a server, a client that has sent until no more goes, and what it has sent."""
        inside = self.inside()
        sock = self.hello(inside)
        return inside, sock, NOISE[: flood(sock, NOISE, len(NOISE))]

    def run_main(self, *options: str, **changes: Any) -> Any:
        """Call main() in a module with stand-ins and changes; return what it did."""
        did, module, root = mock.MagicMock(status=0), load(self.name), logging.getLogger()
        did.create.return_value.getsockname = lambda: did.create.call_args[0][0]
        did.output = io.StringIO()
        vars(module).update({
            "asyncio": changed(asyncio, run=did.run), "serve": did.serve,
            "signal": changed(signal, signal=did.signal),
            "socket": changed(socket, create_server=did.create),
            "threading": changed(threading, Thread=did.thread), **changes})
        streams = {"argv": ["a_server.py", *options], "stdout": did.output, "stderr": did.output}
        with mock.patch.multiple(sys, **streams), mock.patch.object(root, "handlers", []):
            try:
                module.main()
            except SystemExit as error:
                did.status = error.code
            record = logging.makeLogRecord({"msecs": 7.8, "created": 0, "msg": "text"})
            did.line = root.handlers and root.handlers[0].format(record)
        did.level, did.help, did.served = module.log.level, module.__doc__, did.serve.call_args
        return did

    def test_calls(self, arguments: Any = None) -> None:
        """The calls, and the log, for a client that says something, a q, and more, and closes."""
        inside, data = self.inside(arguments=arguments), b"\x1b[31m\xff" + b"long " * 99 + b"\r\n"
        sock = inside.connect()
        name = "{}:{}: ".format(*sock.getsockname())
        eventually(inside.idle, "an idle server")
        self.assert_echo(sock, data)
        sock.sendall(b"q\n")
        self.assertEqual(receive(sock), b"")
        sock.sendall(b"more\n")  # is received, and does not cause a reset
        sock.close()
        inside.wait_for_line("closed")
        eventually(inside.idle, "an idle server")
        received = f"received 503 bytes: {data[:50]!r}", "received 2 bytes: b'q\\n'"
        lines = [name + event for event in ("connected", *received, "closed (quit)")]
        self.assertEqual((inside.made(), inside.lines), (self.calls.split(), lines))

    def test_large_message(self) -> None:
        inside, data = self.inside(), NOISE[: 300_000]
        sock = self.hello(inside)
        inside.socks[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # takes all
        with inside.gate:  # the server must wait, until all of it is there
            sent = flood(sock, data, len(data))
        self.assertEqual(receive(sock, sent), data[:sent])

    def test_half_close(self) -> None:
        inside, sock, echo = self.flooded()
        sock.shutdown(socket.SHUT_WR)
        self.assertEqual(receive(sock), echo)
        inside.wait_for_line("closed (end of stream)")
        self.assertNotIn("0.shutdown(1)", inside.calls)

    def test_never_reads(self) -> None:
        """It costs little memory and no CPU, and delays no other client; then it reads, late."""
        inside, sock, echo = self.flooded()
        eventually(inside.idle, "an idle server")
        self.assertLessEqual(inside.socks[0].most_kept, 65536)
        if not self.iterative:
            self.hello(inside)
        self.assertEqual(receive(sock, len(echo)), echo)
        self.assert_echo(sock, b"hello\n")
        eventually(inside.idle, "an idle server")

    def test_q_after_much(self) -> None:
        """Every last byte comes back, even if the client is slow and sends more after its q."""
        inside, data = self.inside(), NOISE[: 600_000] + b"\n"
        sock, text = self.hello(inside), data + b"q\n" + data
        inside.socks[0].most = 5000  # bytes that send() takes
        sent = flood(sock, text, len(text))
        threading.Thread(target=sock.sendall, args=[text[sent:]], daemon=True).start()
        self.assertEqual(receive(sock), data)
        sock.shutdown(socket.SHUT_RDWR)

    def test_reset(self) -> None:
        inside, greedy, _ = self.flooded()
        reset(greedy)
        with inside.gate:  # the server must wait: this one is gone before accept()
            reset(inside.connect())
        self.hello(inside).close()
        inside.wait_for_line("closed", 3)
        resets = inside.lines_with("reset by peer)") + inside.lines_with("roken pipe)")
        self.assertTrue(len(resets) == 2 or sys.platform != "linux", inside.lines)

    def test_errors(self) -> None:
        """Any OSError (reset or not) ends this client only, and is logged; a mistake is shown."""
        inside = self.inside()
        others = [] if self.iterative else [self.hello(inside)]
        calls = ("recv", b"hello\n"), ("send", b"hello\n"), ("shutdown", b"q\n")
        for name, (call, data) in itertools.product(("ECONNRESET", "ETIMEDOUT", "ENOBUFS"), calls):
            sock, error = self.hello(inside), OSError(getattr(errno, name), "a fault of the test")
            inside.socks[-1].instead[call] = error
            sock.sendall(data)
            inside.wait_for_line("{}:{}: closed ({})".format(*sock.getsockname(), error))
            for other in others:
                self.assert_echo(other, b"still there?\n")
        sock = self.hello(inside)
        inside.socks[-1].instead["recv"] = TypeError("a mistake of the program")
        sock.sendall(b"hello\n")
        eventually(lambda: inside.mistakes or inside.socks[-1].fileno() < 0, "an end")
        inside.mistakes.clear()
        self.assertEqual((inside.lines_with("a mistake"), inside.pauses()), ([], []))

    def test_no_leak(self) -> None:
        inside = self.inside()
        for data in (b"q\n", b"the echo is never read\n") * 20:
            with inside.connect() as sock:
                sock.sendall(data)
            self.hello(inside).close()
        eventually(lambda: all(spy.fileno() < 0 for spy in inside.socks), "all sockets closed")
        gc.collect()
        kinds = inside.module.Conversation, asyncio.Task
        self.assertLess(sum(isinstance(thing, kinds) for thing in gc.get_objects()), 5)

    @LINUX
    def test_idle(self) -> None:
        _, socks = self.start(self.crowd, "--quiet", *self.many)
        for sock in socks:
            sock.sendall(b"all together\n")
        for sock in socks:
            self.assertEqual(receive(sock, 19), b"hello\nall together\n")

    def test_accept_fails(self) -> None:
        """Out of resources, nobody inside: a second's pause. A client that is gone: nothing."""
        gone = ("ECONNABORTED", "ECONNRESET", "EPIPE", "no address", "EAGAIN")[: 5 - self.iterative]
        for step in ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM", "EPROTO", "EINVAL", *gone):
            inside, short = self.inside(None, step), step not in gone
            with self.hello(inside) as first:
                if short or self.iterative:
                    first.close()
                    inside.wait_for_line("closed")
                self.hello(inside)
            line = f"full ([Errno {getattr(errno, step, 0)}] a fault of the test): new clients will"
            found = inside.pauses(), inside.lines_with("full"), len(inside.lines_with("?:?: con"))
            expected = ["sleep(1)"] * short, [f"{line} have to wait"] * short, step == "no address"
            self.assertEqual(found, expected, step)

    @LINUX
    def test_no_descriptor_left(self, clients: int = 100, room: range = range(50, 64),
                                **more: Any) -> None:
        server, socks = self.start(clients, **{"files": 64, **more})
        full = server.log().count(b": connected")
        self.assertIn(full, range(1, 2) if self.iterative else room)
        lines = server.log().count(b" full ([Errno 24] Too many open files): new clients will h")
        self.assertTrue(self.retries or lines == 1)
        for sock in (socks.pop(full - 1), socks.pop(full - 1), *socks):
            self.assertEqual(receive(sock, 6), b"hello\n")
            sock.close()
        self.assertNotIn(b"Traceback", server.log())

    def test_main(self) -> None:
        """It listens at the address, with a backlog and without delay, says so, and serves."""
        no_delay = mock.call().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for options, host, port in ((), "127.0.0.1", 8088), (("--host=a", "--port=7"), "a", 7):
            did = self.run_main(*options)
            create = [mock.call((host, port), backlog=1024), no_delay]
            self.assertEqual((did.create.mock_calls[:2], did.served[0][0]), (create, did.create()))
            self.assertEqual(did.output.getvalue(), f"listening on {host}:{port} ({self.says})\n")
            self.assertEqual((did.line[5:], did.level), (":00.007 text", logging.INFO))
            runs = [mock.call(did.serve())] if self.name == "async" else []
            self.assertEqual((did.run.mock_calls, did.signal.called), (runs, False))
        did = self.run_main("--quiet", sys=changed(sys, platform="win32"))
        self.assertEqual(did.level, logging.WARNING)
        did.signal.assert_called_once_with(signal.SIGINT, signal.SIG_DFL)
        did = self.run_main("--help")
        self.assertIn(did.help.strip(), did.output.getvalue())
        for option, value in self.options:
            did = self.run_main(*option.split())
            found = did.status, did.served and did.served[0][1]
            self.assertEqual(found, (2, None) if value is None else (0, value), option)

    def test_cannot_serve(self) -> None:
        """What prevents listening is told in one line; a mistake later shows its traceback."""
        for host, port, said in ("192.0.2.1", 0, "Errno"), ("\udcff", 0, "enc"), ("", 65536, "0-6"):
            status = self.run_main(f"--host={host}", f"--port={port}", socket=socket).status
            self.assertRegex(status, rf"\Acannot serve on {host}:{port}: [^\n]*{said}[^\n]*\Z")
        with self.assertRaises(OSError):
            self.run_main(serve=mock.Mock(side_effect=OSError(errno.EBADF, "a mistake")))

    def assert_stops(self, server: Server) -> None:
        """Press Ctrl-C; fail unless it ends within a second, with status 0 and one line."""
        server.process.send_signal(signal.SIGINT)
        self.assertEqual(server.output(seconds=1), b"", "stdout has one line only")
        log, status = server.log(), server.process.returncode
        found = status, log.count(b"stopped"), log.count(b"Traceback"), log[-9:]
        self.assertEqual(found, (0, 1, 0, b" stopped\n"), log[-500:])

    @LINUX
    def test_ctrl_c(self) -> None:
        """With clients or without; then its port is free again. And with busy clients."""
        self.assert_stops(server := self.start(5)[0])
        self.assert_stops(self.start(0, "--quiet", "--port", str(server.port))[0])
        for _ in range(4 if self.many else self.name != "async" or sys.version_info >= (3, 11)):
            self.stop_at_work()

    def stop_at_work(self) -> None:
        server, _ = self.start(0, *self.many)
        options = f"--port={server.port}", "--clients=50", "--messages=99999"
        self.addCleanup(Process(CLIENT, *options).kill)
        eventually(lambda: server.log().count(b"received") > 500, "a server at work")
        self.assert_stops(server)


class ManyAtOnce(EveryServer):
    calls = """listener.setblocking(False) wait() listener.accept() 0.setblocking(False)
        wait() 0.recv(65536) 0.send(503) wait() 0.recv(65536) 0.send(0) 0.shutdown(1)
        wait() 0.recv(65536) wait() 0.recv(65536) 0.close() wait()"""

    def test_turns(self) -> None:
        """However much a client sends, and however many wait, another one has its turn."""
        for text in (b"hello\n", b"q\n"):
            inside = self.inside()
            busy, other = self.hello(inside), self.hello(inside)
            busy.sendall(text)
            receive(busy, 6)
            inside.socks[0].endless, inside.socks[1].most = True, 3  # three turns for a message
            busy.sendall(b"more\n")
            with inside.gate:  # the server must wait
                start, waiting = len(inside.calls), [inside.connect() for _ in range(8)]
                other.sendall(b"my turn\n")
            self.assertEqual(receive(other, 8), b"my turn\n")
            self.assert_echo(waiting[-1], b"hello\n")
            calls = [x for x in inside.calls[start:] if "would block" not in x]
            before = calls[: calls.index("1.recv(65536)")]
            self.assertLess(max(map(before.count, ("0.recv(65536)", "listener.accept()"))), 4)

    def test_shortage(self, room: int = 2, line: str = "[Errno 24] a fault of the test",
                      plan: tuple[str, ...] = ("EMFILE",), **changes: Any) -> None:
        """It has room for so many clients, serves them, and another one as one leaves."""
        need_files(self, room + 100)
        inside = self.inside(*["silent"] * (room - 1), None, *plan, **changes)
        last, waits = self.hello(inside), inside.connect()
        waits.sendall(b"waits\n")
        eventually(inside.idle, "an idle server")
        self.assert_echo(last, b"still inside\n")
        self.assertEqual(len(inside.socks), room + (self.retries or not line))
        last.close()
        self.assertEqual(receive(waits, 6), b"waits\n")
        lines = {f"full ({line}): new clients will have to wait"} if line else set()
        self.assertEqual({*inside.lines_with("full")}, lines)
        self.assertEqual(inside.pauses(), ["sleep(1)"] * self.retries)
        inside.stop()  # and its descriptors are free again


class BlockingServer(EveryServer):
    name, says = "blocking", "blocking, threads: 1"
    calls = """listener.accept() 0.recv(65536) 0.sendall(503) 0.recv(65536) 0.sendall(0)
        0.shutdown(1) 0.settimeout(1) 0.recv(65536) 0.recv(65536) 0.close()"""
    options = ("--threads=0", None), ("--threads=1001", None), ("--threads=many", None)
    many, crowd, iterative, retries = ("--threads=50",), 50, True, True
    arguments = staticmethod(lambda: [threading.Lock()])

    def test_threads(self) -> None:
        """1 to 1,000: the main thread and daemons, with the same listener and the same lock."""
        for threads in (1, 2, 1000):
            did = self.run_main(f"--threads={threads}")
            thread = {"target": did.serve, "args": [*did.served[0]], "daemon": True}
            start = [mock.call(**thread), mock.call().start()]
            self.assertEqual(did.thread.mock_calls, start * (threads - 1))
        none = changed(threading, Thread=mock.Mock(side_effect=RuntimeError("none left")))
        self.assertRegex(self.run_main("--threads=2", threading=none).status, ": none left")

    def test_one_thread_at_a_time_says_full(self) -> None:
        """It holds the lock while it sleeps. If another has it for a second, it only retries."""
        calls = [mock.call.acquire(timeout=1), mock.call.sleep(1), mock.call.release()]
        for free in (True, False):
            lock = mock.Mock(**{"acquire.return_value": free})
            inside = self.inside("EMFILE", arguments=[lock], time=lock)
            self.hello(inside)
            self.assertEqual(lock.mock_calls, calls if free else calls[:1])
            self.assertEqual(len(inside.lines_with("full")), free)


class NonblockingServer(ManyAtOnce):
    name, says = "nonblocking", "non-blocking, every 0.01 s"
    calls = ManyAtOnce.calls.replace("wait()", "")
    options = (("", 0.01), ("--interval=0", 0.0), ("--interval=3600", 3600.0),
               *((f"--interval={text}", None) for text in ("-0.001", "3600.1", "nan", "soon")))
    arguments = staticmethod(lambda: [0.001])

    def test_no_sleep_at_work(self) -> None:
        """It sleeps exactly the interval, and only after a round in which nothing was done."""
        for interval in (0.001, 0):
            inside = self.inside(arguments=[interval])
            sock = inside.connect()
            eventually(inside.idle, "an idle server")
            self.assertEqual(exchange(sock, bytes(300_000)), bytes(300_000))
            rounds = "\n".join(inside.calls).split("listener.accept()")[1:-1]
            self.assertGreater(len(rounds), 10)
            for calls in rounds:
                worked = calls[0] == "\n" or not re.search(r"block\s(sleep\S+\s)*\Z", calls)
                sleep = [f"sleep({interval})"] if interval and not worked else []
                self.assertEqual(re.findall(r"sleep\(.*", calls), sleep, calls)


class SelectServer(ManyAtOnce):
    name = says = "select"

    def test_limits(self) -> None:
        """1,024 descriptors, without raising the limit; on Windows 511 clients."""
        linux, windows = (changed(sys, platform=name) for name in ("linux", "win32"))
        for soft, hard, now in (1025, 4096, 1024), (1023, 9999, 1023):
            files = mock.Mock(**{"getrlimit.return_value": (soft, hard), "RLIMIT_NOFILE": "files"})
            self.hello(self.inside(resource=files, sys=linux))
            files.setrlimit.assert_called_once_with("files", (now, hard))
        self.test_shortage(511, "", (), sys=linux)
        self.test_shortage(511, "select: 512 sockets", (), sys=windows, resource=None)

    @LINUX
    def test_1300_clients(self) -> None:
        inherited = [os.dup(0) for _ in range(50)]
        clients = 1000 + min(300, int(Path("/proc/sys/net/core/somaxconn").read_text()) // 2)
        self.test_no_descriptor_left(clients, range(960, 972), files=1400, pass_fds=inherited)
        self.addCleanup(lambda: [*map(os.close, inherited)])


@unittest.skipUnless(hasattr(select, "epoll"), "this platform has no epoll")
class EpollServer(ManyAtOnce):
    name, says, crowd = "epoll", "epoll", 10_000

    def test_without_epoll_it_names_another_script(self) -> None:
        self.assertRegex(self.run_main(select=SimpleNamespace()).status, "use selectors_server.py")


class SelectorsServer(ManyAtOnce):
    name, says, crowd = "selectors", selectors.DefaultSelector.__name__, 2000
    options = ("--selector=default", None), ("--selector=best", None)
    arguments = staticmethod(lambda: [selectors.DefaultSelector()])

    def test_each_selector(self) -> None:
        for name in ("select", "poll", "epoll", "kqueue", "devpoll"):
            kind = getattr(selectors, f"{name.capitalize()}Selector", None)
            did = self.run_main("--selector", name)
            self.assertEqual(did.status, 0 if kind else 2)
            if kind:
                self.assertIs(type(did.served[0][1]), kind)
                self.test_calls([kind()])
                line = "500 clients for select" if name == "select" else ""
                self.test_shortage(500, line, (), arguments=[kind()])


class AsyncServer(ManyAtOnce):
    name, says, retries, crowd = "async", "asyncio", True, 2000
    calls = """listener.setblocking(False) sleep(0) listener.accept() 0.setblocking(False) sleep(0)
        0.recv(65536) 0.send(503) sleep(0) 0.recv(65536) 0.send(0) sleep(0) 0.shutdown(1)
        0.recv(65536) sleep(0) 0.recv(65536) 0.close()"""


del EveryServer, ManyAtOnce  # which are no tests themselves


class ConversationRule(unittest.TestCase):
    def test_known(self) -> None:
        """What is received, piece by piece, and at last the reply to the last piece."""
        alike = b"quit\nqq\n q\nQ\nq q\nq \nxq\nq\0\nq\r\r\n\tq\n"
        full = b"x" * 65536  # fills the buffer
        for *pieces, reply in (
            (bytes(range(256)), alike, b"Q", b"Q"), (b"one\nq\ntwo\n", b"one\n"),
            (b"a\nq\r", b"\nb", b""), (b"q", b""), (b"Iraq", b"\n", b"\n"), (full, b"q", b"q"),
            (full, b"q", b"q", b""), (full[1:], b"q", b""), (full[1:] + b"\n", b"q\n", b""),
        ):
            conversation = load("select").Conversation()
            expected, replies = [*pieces[:-1], reply], [*map(conversation.reply, pieces)]
            self.assertEqual((replies, conversation.finished), (expected, expected != pieces))
            self.assertLess(len(repr(vars(conversation))), 100, "it keeps a few bytes")

    def test_all_cuts(self) -> None:
        """However a text is split, all comes back but a q line, or the rest of it at its end."""
        ended = b"a\n|q\n", b"|q\r\n", b"\n\n|q\r\n", b"Iraq\nx\n|q\n"
        going = b"Iraq\nx", b"\nqu\n", b"a\nquit", b"q\rq\n", b"\rq\n", b"\r\nq q", b"qq\nq\t\n"
        new_conversation = load("select").Conversation
        for marked in (*ended, *going):
            text, quit_line = marked.replace(b"|", b""), marked.partition(b"|")[2]
            for places in itertools.product((False, True), repeat=len(text) - 1):
                ends = [*itertools.compress(range(1, len(text)), places), len(text)]
                pieces = [text[start:end] for start, end in zip([0, *ends], ends)]
                if b"q" not in pieces:  # which ends it on its own
                    conversation = new_conversation()
                    echo = b"".join(map(conversation.reply, pieces))
                    end = len(text) - min(len(quit_line), len(pieces[-1]))
                    expected = text[:end], end < len(text)
                    self.assertEqual((echo, conversation.finished), expected, pieces)


# ---- The client

ERRORS = [OSError(number, os.strerror(number)) for number in (
    errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENOBUFS, errno.ECONNRESET, errno.EPIPE)]


class World(dict[Any, Any]):
    """A clock, and a selector that moves it on to the next event: every time is exact."""

    now, selects = 100.0, 0
    get_map, unregister = dict.copy, dict.pop

    def register(self, peer: Any, events: int, data: object) -> Any:
        self[peer] = mock.Mock(events=events, data=data)
        return self[peer]
    modify = register

    def select(self, timeout: float) -> list[tuple[Any, int]]:
        self.selects += 1
        if self.selects > 9999 or not 0 < timeout <= 0.2:
            raise AssertionError(f"no end after {self.selects} waits, or a wrong one: {timeout}")
        due = {peer: min([when for when, _ in peer.inbox[:1] if key.events & selectors.EVENT_READ]
                         + [peer.connected_at if key.events & selectors.EVENT_WRITE else 1e9])
               for peer, key in self.items()}
        self.now = max(self.now, min(self.now + timeout, *due.values()))
        return [(self[peer], 0) for peer, when in due.items() if when <= self.now]


class Peer:
    """A client's socket: after 0.1 s it gets the answers, bytes or errors, to what it sends."""

    refused, room, connects_in, send_takes = 0, 1 << 30, 0.0, 0.0
    raises: Any = ()  # or {the number of a call: its error}
    echo: Any = staticmethod(lambda part: [part])
    end: Any = (b"",)  # what answers shutdown()
    setblocking = connect = mock.Mock()

    def __init__(self, world: World, **faults: Any) -> None:
        vars(self).update(faults)
        self.world, self.connected_at = world, world.now + self.connects_in
        self.log, self.inbox = list[Any](), list[Any]()  # calls and answers, each with its time
        self.getsockopt, self.close = mock.Mock(return_value=self.refused), mock.Mock()

    def note(self, argument: object) -> None:
        self.log.append((round(self.world.now, 6), argument))
        if len(self.log) in self.raises:
            raise self.raises[len(self.log)]

    def send(self, data: bytes) -> int:
        part = bytes(data[: self.room])
        self.note(part)
        self.inbox += [(self.world.now + 0.1, answer) for answer in self.echo(part)]
        self.world.now += self.send_takes
        return len(part)

    def shutdown(self, how: int) -> None:
        self.inbox += [(self.world.now + 0.1, answer) for answer in self.end]  # also if it fails
        self.note(how)

    def recv(self, _: int) -> Any:
        come = self.inbox and self.inbox[0][0] <= self.world.now
        data = self.inbox.pop(0)[1] if come else BlockingIOError()
        if isinstance(data, OSError):
            raise data
        return data


class ClientInside(unittest.TestCase):
    def run_peers(self, *faults: Any, messages: int = 2, size: int = 64, pause: float = 0) -> Any:
        """Run a client for each of these faults of a socket; return the clients."""
        world = World()
        peers = [Peer(world, **fault) for fault in faults]
        with mock.patch("socket.socket", side_effect=peers):
            clients = [client.Client(i, messages, size, pause) for i in range(1, len(peers) + 1)]
        with mock.patch("time.perf_counter", lambda: world.now), \
             mock.patch("client.DefaultSelector", return_value=world):
            client.run(clients, ("127.0.0.1", 8088), world.now)
        for one, peer in zip(clients, peers):
            peer.close.assert_called_once_with()
            self.assertTrue(one.problem or not peer.inbox, "read to the end")
        return clients

    def test_messages(self) -> None:
        """Messages differ and have their size; pauses and times are exact; progress is shown."""
        for size in 1, 2, 15, 64, 100_000:
            first, second = (x.sock.log for x in self.run_peers({}, {}, messages=12, size=size))
            sent = [data for _, data in first[:12] + second[:12]]
            self.assertEqual([(x.find(b"\n"), len(x)) for x in sent], [(size - 1, size)] * 24)
            self.assertEqual(len(set(sent)), {1: 1, 2: 9}.get(size, 24))  # 2: a digit of 1 to 9
            self.assertEqual([x for _, x in second[12:]], [b"q\n", socket.SHUT_WR])
        lines = r"1 s: 0 messages\r([2-6] s: [0-3] messages\r){8,10}7 s: 3 messages\r"
        for terminal, pattern in (True, lines), (False, ""):
            with contextlib.redirect_stderr(io.StringIO()) as said, \
                 mock.patch.object(said, "isatty", return_value=terminal):
                [one] = self.run_peers({"connects_in": 1, "send_takes": 0.5}, messages=3, pause=2)
            self.assertRegex(said.getvalue(), rf"\A{pattern}\Z")
            self.assertEqual([round(x, 6) for x in one.round_trips], [0.5] * 3)
            self.assertEqual([when for when, _ in one.sock.log], [101, 103.5, 106, 106.5, 107])
            self.assertEqual((round(one.first_echo_at, 6), round(one.closed_at, 6)), (101.5, 107.1))

    def test_problems(self) -> None:
        """Each client has the problem that it met, of any kind and anywhere; the others go on."""
        for error in ERRORS:
            table: list[tuple[str, dict[str, Any]]] = [
                ("", {"room": 10, "raises": {4: BlockingIOError()}}),  # the send buffer is full
                ("", {}), ("", {"echo": lambda part: [part[:1], part[1:]]}),
                ("", {"end": [b"x" * 99, b"y", b""]}),  # after the q, anything may come
                ("closed by the server", {"echo": lambda part: [part * part.startswith(b"1")]}),
                *(("the echo differs", {"echo": echo}) for echo in (
                    lambda part: [part[:-1] + b"x"], lambda part: [part + b"\n"],
                    lambda part: [part, b"x"], lambda part: [part[:1], part[:1]])),
                *((str(error), fault) for fault in (
                    {"echo": mock.Mock(return_value=[error])}, {"end": [error]},
                    {"echo": lambda part, error=error: [part, error]}, {"raises": {2: error}},
                    {"connects_in": 0.5, "refused": error.errno}, {"raises": {3: error}},  # the q
                    {"raises": {4: OSError("shutdown")}, "end": [error]})),
            ]
            clients = self.run_peers(*(fault for _, fault in table), pause=1)
            self.assertEqual([str(one.problem or "") for one in clients], [x for x, _ in table])
            with self.assertRaises(OSError):  # none is connected
                self.run_peers({"refused": error.errno}, {"connects_in": 9})

    def test_figures(self) -> None:
        """A row for each client: dots until its first echo, then # until its end."""
        picture = """. waiting for its first echo   # being served

client  0            1            2            3            4 s
        |------------|------------|------------|------------|
     1  .......###################
     2  ....................................................#
     3  ......................................."""
        self.assertEqual(client.chart([(0.58, 2.0), (4.0, 4.0), (0.0, 3.0)], 72), picture)
        for width, half in (74, 26), (120, 50), (200, 50), (0, 20):
            row = client.chart([(1799.95, 3599.9)], width).splitlines()[-1]
            self.assertEqual(row, "     1  " + "." * half + "#" * half)
        shown = [1, 3, 5, 7, 9, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 33, 35, 37, 39, 41]
        for number, rows in (41, shown), (20, [*range(1, 21)]), (3, [1, 2, 3]), (1, [1]):
            picture = client.chart([(1.0, 2.0)] * number, 72)
            self.assertEqual([int(row) for row in re.findall(r"(?m)^ +(\d+)  ", picture)], rows)
            self.assertEqual(f"\n20 of the {number} clients, ev" in picture, number > 20)
        times = [2.5] + [0.05] * 9 + [0.003] + [0.002] * 399 + [0.001] * 600
        spans = [(0.3, 0.5), (0.0, 1.0), (1.2, 2.0), (0.1, 1.5)]
        expected = """1,010 messages in 2 s: 505 per second
round-trip time: median 1.00 ms, 99th percentile 3.00 ms, maximum 2,500.00 ms
first echo after the start (3 of 4 clients): median 300.00 ms, maximum 1,200.00 ms"""
        self.assertEqual(client.figures(times, spans), expected)
        self.assertEqual(client.figures([], [(0, 0.5)]), "0 messages in 0.5 s: 0 per second")

    def main(self, *options: str, terminals: Any = "", **effects: Any) -> tuple[Any, str, Any]:
        """Call main() with all below it replaced; return its status, stderr and the calls."""
        below = "talk", "copy", "run_many"
        usual = {"gethostbyname": "ip of {}".format, **dict.fromkeys(below, SystemExit), **effects}
        fake = mock.MagicMock(**{f"{name}.side_effect": usual[name] for name in usual})
        stdin, stdout = (mock.Mock(**{"isatty.return_value": name in terminals,
                                      "fileno.side_effect": OSError}) for name in ("in", "out"))
        with mock.patch.multiple("client", socket=fake, **{x: getattr(fake, x) for x in below}), \
             mock.patch.multiple("sys", argv=["client.py", *options], stdin=stdin, stdout=stdout), \
             contextlib.redirect_stderr(io.StringIO()) as said, \
             self.assertRaises(SystemExit) as ended:
            client.main()
        return ended.exception.code, said.getvalue(), fake

    def test_options(self) -> None:
        """Each option arrives, up to both ends of its limits, and what is beyond is refused."""
        usual = {"host": "b", "port": 8088, "clients": 9, "messages": 100, "size": 64, "pause": 0}
        most = 512 if sys.platform == "win32" else 10**6
        for name, low, high in (("port", 1, 65535), ("clients", 1, most), ("messages", 1, 10**9),
                                ("size", 1, 10**9), ("pause", 0, 3600)):
            for value in low, high, low - 1, high + 1, "nan":
                options = "--clients=9", "--host=b", f"--{name}={value}"
                status, said, calls = self.main(*options, terminals="in out")
                if value in (low, high):
                    args, server = calls.run_many.call_args[0]
                    self.assertEqual((vars(args), server[0]), ({**usual, name: value}, "ip of b"))
                else:
                    self.assertEqual((status, calls.method_calls), (2, []), (name, value))
                    self.assertRegex(said, rf"error: .*--{name}\b")
        with mock.patch("client.Client") as made, mock.patch("client.run", side_effect=OSError), \
             self.assertRaises(OSError):
            client.run_many(mock.Mock(clients=2, messages=3, size=4, pause=5), ("", 0))
        self.assertEqual(made.call_args_list, [mock.call(1, 3, 4, 5), mock.call(2, 3, 4, 5)])
        for terminals in "", "in", "out", "in out":  # half a terminal is a pipe
            calls = self.main(terminals=terminals)[2]
            calls.create_connection.assert_called_once_with(("ip of 127.0.0.1", 8088))
            self.assertEqual((calls.talk if terminals == "in out" else calls.copy).call_count, 1)

    def test_errors(self) -> None:
        """A line says what failed, and what helps."""
        refused, no_port, no_file = (OSError(number, "reason") for number in (
            errno.ECONNREFUSED, errno.EADDRNOTAVAIL, errno.EMFILE))
        cannot, lost = "cannot connect to 127.0.0.1:7", "connection to 127.0.0.1:7 lost"
        for where, error, line in (
            ("gethostbyname", UnicodeError("no name"), f"{cannot}: no name"),
            ("create_connection", refused,
             f"{cannot}: {refused}; start one: python select_server.py --port 7"),
            ("run_many", no_port, f"{cannot}: {no_port}; perhaps no local port is free"),
            ("run_many", no_file, f"{cannot}: {no_file}; first run: ulimit -n 57"),
            ("run_many", MemoryError(), "out of memory"), ("copy", RuntimeError("no"), "no"),
            *(("copy", error, f"{lost}: {error}") for error in ERRORS),
        ):
            many = ["--clients=7"] if where == "run_many" else []
            self.assertEqual(self.main("--port=7", *many, **{where: error})[:2], (line, ""))
        for typed, message in (
            (OSError("broken"), "cannot read stdin: broken"), ("hello\n", "closed by the server"),
            ("\ud800\n", "cannot read stdin: .*surrogates not allowed"),
        ):
            stdin = mock.Mock(encoding="utf-8", readline=mock.Mock(side_effect=[typed]))
            with mock.patch.multiple("sys", stdin=stdin, stdout=io.StringIO()):
                with self.assertRaisesRegex((SystemExit, OSError), rf"\A{message}\Z"):
                    client.talk(mock.Mock(**{"makefile.return_value": io.BytesIO(b"hell")}))
                self.assertIsNotNone(sys.stdout)  # it could still be written

    def copy(self, data: bytes, **calls: Any) -> tuple[bytes, bytes]:
        """Let copy() send stdin, then receive; return what it sends, and its stdout."""
        sock = mock.Mock(**{f"{name}.side_effect": effect for name, effect in calls.items()})
        self.addCleanup(sock.shutdown.assert_called_with, socket.SHUT_WR)  # recv() needs it to end
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, \
             mock.patch.multiple("sys", stdin=stdin, stdout=stdout), \
             mock.patch("os.write", lambda file, data, write=os.write: write(file, data[:999])), \
             mock.patch("threading.Thread.start", threading.Thread.run):
            stdin.write(data)
            stdin.seek(0)
            client.copy(sock)
            stdout.seek(0)
            return b"".join(call[0][0] for call in sock.sendall.call_args_list), stdout.read()

    def test_copy(self) -> None:
        """Every byte is sent, up to a line that is just q, and each that comes is written."""
        odd = bytes(range(256)) + b"\r\n quit\n q\nqq\nwithout a newline"
        long = b"x" * 70_000 + b"q\n" + b"y" * 65_536 + b"q\nz"  # is read in pieces
        for data, echo, q in (
            (b"", b"", b""), (odd, odd, b""), (long, long, b""), (b"one\nq", b"one\n", b"q\n"),
            (b"one\nq\ntwo\n", b"one\n", b"q\n"), (b"one\r\nq\r\ntwo", b"one\r\n", b"q\n"),
        ):
            self.assertTrue(self.copy(data, recv=[echo, b""]) == (echo + q, echo), data[:20])
        self.copy(b"one\nq\n", sendall=[None, ERRORS[0]], recv=[b"one\n", b""])  # nothing is lost
        for error in ERRORS:  # is raised, wherever it comes
            for faults in {"recv": error}, {"sendall": [None, error]}, {"shutdown": error}:
                with self.assertRaisesRegex(OSError, re.escape(str(error))):
                    self.copy(b"one\ntwo\n", **{"recv": [b"one", b""], **faults})
        with self.assertRaisesRegex(ConnectionError, "closed by the server"):
            self.copy(b"one\ntwo\n", recv=[b"one\ntwo", b""])


@LINUX
class ClientProcess(unittest.TestCase):
    def setUp(self) -> None:
        self.server = Server(SCRIPTS["select"], "--quiet")
        self.addCleanup(self.server.kill)
        self.addCleanup(socket.setdefaulttimeout, None)
        socket.setdefaulttimeout(DEADLINE)

    def start(self, *options: str, clients: int = 0, **more: Any) -> Any:
        """Return a client of a real server, or play the server and return its connections, too."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1] if clients else self.server.port
            process = Process(CLIENT, f"--port={port}", *options, **more)
            self.addCleanup(process.kill)
            socks = [listener.accept()[0] for _ in range(clients)]
        self.addCleanup(lambda: [*map(socket.socket.close, socks)])
        return (process, *socks) if clients else process

    def interrupt(self, process: Process) -> tuple[bytes, bytes, int]:
        process.wait_for_rest()
        process.process.send_signal(signal.SIGINT)
        return process.result()

    def test_conversation(self) -> None:
        """It prompts and prints the echo; any byte can be typed; q, Ctrl-D or Ctrl-C ends it."""
        for codec, typed, shown, sent, ctrl_c in (
            ("utf-8", b"\x04", b"\n", b"", b""), ("latin-1", b"q\x04\x04", b"q", b"q\n", b""),
            ("utf-8", b"", b"", b"", b"\n"), ("utf-8", b"hi\n", b"hi\n", b"hi\n", b"\n"),
        ):
            environment = {**ENVIRONMENT, "PYTHONIOENCODING": codec}
            terminal, sock = self.start(env=environment, terminal=True, clients=1)
            terminal.expect(b">>> ")
            for line in b"hello\n", b"\n", b"gr\xc3\xbcn \xff\xe4\n", b"no newline":
                terminal.send(line if line.endswith(b"\n") else line + b"\x04\x04")
                terminal.expect(line)
                sock.sendall(receive(sock, len(line) - 1))
                terminal.wait_for_rest()  # for the last byte
                sock.sendall(receive(sock, 1))
                terminal.expect(line + b">>> ")
            terminal.send(typed)
            terminal.expect(shown)
            self.assertEqual(receive(sock, len(sent)), sent)
            result = self.interrupt(terminal) if ctrl_c else terminal.result()
            self.assertEqual(result, (b"", terminal.expected + ctrl_c, 0))
            self.assertEqual(receive(sock), b"")

    @LINUX
    def test_pipes(self) -> None:
        """Much passes in little memory, also if another program left the pipes non-blocking."""
        data = b"x" * (32 << 20) + b"\n"
        (source, fill), (sink, drain) = socket.socketpair(), socket.socketpair()
        with source, fill, sink, drain:  # they have a timeout, which makes them non-blocking
            process = self.start(stdin=source, stdout=sink)
            threading.Thread(target=fill.sendall, args=(data,)).start()
            self.assertTrue(receive(drain, len(data)) == data, process.log())
            self.assertRegex(process.proc("status"), r"VmHWM:\s+[12]?\d{4} kB")
            self.assertEqual(self.interrupt(process), (b"", b"\n", 130))

    def test_streams(self) -> None:
        """What cannot be read, or written, is named; closed streams are like empty ones."""
        with open(os.devnull, "rb") as readable, open(os.devnull, "wb") as writable:
            for options, unreadable in ([], rb"cannot read stdin: .+\n"), (["--clients=2"], b""):
                for more, pattern in (({"stdout": readable}, rb"cannot write to stdout: .+\n"),
                                      ({"stdin": writable}, unreadable),
                                      ({"prelude": "import sys; sys.stdin = None"}, b""),
                                      ({"prelude": "import sys; sys.stdout = None"}, b"")):
                    _, log, status = self.start(*options, **more).result(b"hello\n")
                    self.assertRegex(log, rb"\A" + pattern + rb"\Z")
                    self.assertEqual(status, 1 if pattern else 0)

    def test_many(self) -> None:
        """Messages that fill all buffers come back; clients that end too early are counted."""
        options = "--clients=3", "--messages=2", "--size=9000000"
        terminal = self.start(*options, terminal=True, env={**ENVIRONMENT, "COLUMNS": "100"})
        self.assertRegex(terminal.result()[1], rb"\|(-{19}\|){4}\n(.*\n)+6 messages in .*\n"
                                               rb"round-.*\n.* \(3 of 3 clients\): .*\n\Z")
        for begin, end, ctrl_c in (b"", b"2", 0), (b"\n", rb"1\), interrupted \(1", 130):
            process, *gone, last = self.start("--clients=4", "--messages=2", clients=4)
            for sock, leave in zip(gone, (reset, socket.socket.close, reset)):
                receive(sock, 64)
                leave(sock)
            last.sendall(receive(last, 64))
            self.assertIn(b"2, client 4.", receive(last, 64))
            if not ctrl_c:
                last.close()
            output, log, status = self.interrupt(process) if ctrl_c else process.result()
            self.assertEqual(status, ctrl_c or 1)
            self.assertRegex(log, rb"\A%b4 of 4 clients did not finish: .+ \(2\), closed by the "
                                  rb"server \(%b\)\n\Z" % (begin, end))
            chart = rb"\n {8}(\|-{12}){4}\|\n( +\d  \.*\n){3} +4  \.{0,52}#+\n\n1 messages in "
            self.assertRegex(output, chart)


# ---- The pages

class Pages(unittest.TestCase):
    def test_pages(self) -> None:
        """Each stands alone, with its model in front; what they share is the same text."""
        calls = ("listener.accept()", "connection.handle()", "select.select(readers, writers",
                 "in epoll.poll()", "in selector.select()", "loop.sock_accept(listener")
        of_options = r"(?m)^.*(thread|interval|epoll|selector| full =|finally|handlers|try:|" \
            r"text =|address =|serve\(|listening on|except \().*\n"
        lines = r'RECV_SIZE = .*|Half-close: .*|log = .*|host, port = .*|"full \(%s\): .*'
        pages = [SCRIPTS[name].read_text(encoding="utf-8-sig") for name in NAMES]
        model: dict[int, object] = {}
        for name, call, page in zip(NAMES, calls, pages):
            self.assertRegex(page, r'"""\n(\n|(import|from|if|   |log =).*\n)+# ---- The model')
            modules = {*re.findall(r"(?m)^ *(?:import|from) (\w+)", page)}
            self.assertLessEqual(modules, {*getattr(sys, "stdlib_module_names", modules)}, name)
            self.assertLess(page.index(call), len(page) / 2, name)
            self.assertIn(f"\n    python {name}_server.py  ", page)
            text = re.sub(r"(?s)# ---- The limit .+?(?=# ----)", "", page)  # select's
            _, *parts = re.split(r"(?m)^# ---- (.+)\n", text)  # titles and sections, by turns
            found = {*re.findall(lines, re.sub(r"\n +# ", " ", text))}
            same = [parts[0], *parts[4:7], re.sub(of_options, "", parts[7]), len(parts), found]
            same += [] if parts[2] == "After a q" else parts[2:4]
            for key, part in enumerate(same):
                self.assertEqual(part, model.setdefault(key, part), name)
        self.assertEqual(re.findall(r"Read next: (\w+)_server", "".join(pages)), [*NAMES[1:]])


# ---- README.md

class Readme(unittest.TestCase):
    text = (HERE / "README.md").read_text(encoding="utf-8-sig")
    programs = re.findall(r"(?s)```python\n(.*?)```", text)
    on_free_port = """import socket
listener = socket.create_server(("127.0.0.1", 0))
print("listening on {}:{} (README)".format(*listener.getsockname()), flush=True)
socket.create_server = lambda address: listener
"""

    def test_programs(self) -> None:
        """Each program serves client.py and, unless it blocks, several clients at a time."""
        self.assertEqual(len(self.programs), self.text.count('("127.0.0.1", 8088)'))
        for program in self.programs:
            if re.search("epoll|fcntl", program) and not hasattr(signal, "sigwaitinfo"):
                continue  # they need CPython on Linux
            several = "import socket\n" not in program
            if "fcntl" in program:  # the queue of signals overflows
                program = "from resource import *\nsetrlimit(RLIMIT_SIGPENDING, (2, 2))\n" + program
            with self.subTest(program[:300]):
                server = Server(Path(), prelude=self.on_free_port + program)  # and no script
                self.addCleanup(server.kill)
                process = Process(CLIENT, f"--port={server.port}", "--clients=10", "--messages=20")
                self.addCleanup(process.kill)
                self.assertEqual(process.result()[1:], (b"", 0), server.log()[-500:])
                with server.connect() as first, server.connect() as second:
                    self.assertEqual(exchange(first, b"first\n"), b"first\n")
                    second.sendall(b"second\n")
                    echoes = select.select([second], [], [], 5 if several else 0.1)[0]
                    self.assertEqual(echoes, [second] if several else [])
                    if "try:" in program:  # the bare ones end
                        reset(second)
                    self.assertEqual(exchange(first, b"x" * 1000), b"x" * 1000)

    @LINUX
    def test_misbehaving_clients(self) -> None:
        """Each client that breaks the bare loop of select breaks it as the README says."""
        need_files(self, 2000)
        program = next(text for text in self.programs if "select.select(socks" in text)
        errors = dict(re.findall(r"(?m)^\| (\d)\. `(.+?)`", self.text))
        cases = re.findall(r'(?m)^    # (\d)\. .*\n    (?:python -c "(.+)"|'
                           r"\(ulimit -n (\d+); .*\n.*clients (\d+).*)$", self.text)
        self.assertEqual(len(cases), 4)
        for number, code, files, clients in cases:
            server = Server(Path(), prelude=self.on_free_port + program, files=int(files or 0))
            self.addCleanup(server.kill)
            with self.subTest(number), contextlib.ExitStack() as stack, self.assertRaises(OSError):
                for _ in range(int(clients or 1)):
                    sock = stack.enter_context(server.connect())
                    exchange(sock, b"x")
                stack.callback(Process(Path(), prelude=code.replace("8088", str(server.port))).kill)
                sock.settimeout(0.5)
                for _ in range(99_999):  # echoes: then there are no more
                    sock.sendall(b"x")
                    sock.recv(1)
            server.wait_for_log(re.escape(errors.get(number, "").encode()))

    def test_exercises(self) -> None:
        """Each test of the table "Break it" fails in a copy with the change, and only there."""
        row = r"(?m)^\| `(\w+\.py)` \| `(.+?)` \| `(.+?)` \| .+ \| (none: )?`(.+)` \|$"
        rows = re.findall(row, self.text)
        self.assertEqual(len(rows), len(re.findall(r"(?m)^\| `\w+_server\.py` \|", self.text)))
        rows.insert(0, ("", "", "", "none", " ".join({row[4] for row in rows})))  # no change
        with ThreadPoolExecutor(4) as pool:
            for row, said in zip(rows, pool.map(lambda row: self.run_copy(*row), rows)):
                self.assertFalse(said and self.run_copy(*row), row)  # on a busy machine, again

    def run_copy(self, script: str, old: str, new: str, none: str, tests: str) -> str:
        """Run tests in a copy with a change; return what they say, "" if the table is right."""
        with tempfile.TemporaryDirectory() as folder:
            for path in (*HERE.glob("*.py"), HERE / "README.md"):
                text = path.read_text("utf-8-sig").replace("DEADLINE = 10.0", "DEADLINE = 2.0")
                if path.name == script:
                    self.assertEqual(text.count(old), 1, f"{old} in {script}")
                    text = text.replace(old, new)
                Path(folder, path.name).write_text(text.replace("1 << 28", "1 << 24"), "utf-8")
            said = subprocess.run([sys.executable, f"{folder}/test_all.py", *tests.split()],
                                  check=False, capture_output=True, text=True, timeout=60).stderr
        right = r"\nOK" if none else r"\nFAILED|\nOK \(skipped"
        return "" if re.search(right, said) and "SyntaxError" not in said else said


# ---- The measurement

HEAD = """\
100 clients send 200 messages of 64 bytes each, the next one after the echo (99%: 99th percentile).
CPU idle: while 100 clients are silent. Last column: 10 clients send 500 messages each, beside 900
silent ones. All but CPU idle: medians of 3 runs.
                            messages  round-trip  longest wait   CPU per    CPU  10 beside 900:
                          per second  time (99%)  (first echo)   message   idle      per second"""


def measure(server: Server, clients: int, messages: int) -> list[float]:
    """Return medians of three runs: messages per second, and times. Raise OSError if one fails."""
    runs = []
    for _ in range(3):
        crowd = [client.Client(number, messages, 64, 0) for number in range(1, clients + 1)]
        before, start = server.cpu(), time.perf_counter()
        client.run(crowd, ("127.0.0.1", server.port), start)
        cpu = server.cpu() - before
        if problems := [one.problem for one in crowd if one.problem]:
            raise OSError(f"{len(problems)} of {clients} clients failed: {problems[0]}")
        times = sorted(seconds for one in crowd for seconds in one.round_trips)
        rate = len(times) / (max(one.closed_at for one in crowd) - start)
        first = max(one.first_echo_at for one in crowd) - start
        runs.append((rate, times[(len(times) * 99 - 1) // 100], first, cpu / len(times)))
    return [statistics.median(figures) for figures in zip(*runs)]


@contextlib.contextmanager
def running(name: str, silent: int) -> Iterator[Server]:
    """Start a server, a name with options, and silent clients; then end both. Raise OSError."""
    script, *options = name.split()
    server = Server(SCRIPTS[script], "--quiet", *options)
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        for number in range(1, silent + 1):
            sock = stack.enter_context(server.connect())
            if number % 100 == 0 and name != "blocking":  # wait until all so far are accepted
                exchange(sock, b"hello\n")
        yield server
        server.connect().close()  # it is still there


def table_row(name: str) -> str:
    """Measure a server, a name with its options; return its figures as a row of the table."""
    with running(name, 100) as server:
        before, start = server.cpu(), time.monotonic()
        time.sleep(1)
        idle = (server.cpu() - before) / (time.monotonic() - start)
    with running(name, 0) as server:
        rate, slow, first, cpu = measure(server, 100, 200)
    row = f"{rate:12,.0f}{slow * 1000:9.1f} ms{first * 1000:11,.1f} ms"
    row += f"{cpu * 1e6:7.1f} us{idle:7.1%}  ".replace("nan us", "     -").replace("nan%", "   -")
    if name == "blocking":
        return row + " one at a time"
    never_sleep = " --interval 0" if name == "nonblocking" else ""
    with running(name + never_sleep, 900) as server:
        return f"{row}{measure(server, 10, 500)[0]:14,.0f}{never_sleep}"


def benchmark(names: str = "blocking, blocking --threads 1000, nonblocking, select, epoll, "
              "selectors, selectors --selector poll, async") -> None:
    """Measure servers; print each row, or why there is none, as soon as it is known."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Python {platform.python_version()}, {platform.platform()}, cores: {cores}\n{HEAD}")
    for name in names.split(", "):
        try:
            row = table_row(name)
        except (AssertionError, OSError, RuntimeError) as error:
            row = "  " + str(error).strip().rpartition("\n")[2]
        print(f"{name:26}{row}", flush=True)


class Benchmark(unittest.TestCase):
    def test_table(self) -> None:
        """Known times give known figures, and each run is made as the head of the table says."""
        world, asked = mock.MagicMock(), []

        def run(crowd: list[client.Client], _: object, start: float) -> None:
            asked.append((len(crowd), {(one.messages, one.size, one.pause) for one in crowd}))
            pace = (1, 2, 9)[len(asked) % 3]  # the median is 2
            crowd[7].problem = OSError("no echo") if len(asked) == 16 else None
            for one in crowd:
                one.sock.close()
                one.closed_at = start + (5 if one.number == 7 else 1) * pace
                one.first_echo_at = start + (0.3 if one.number == 3 else 0.1) * pace
                one.round_trips = [pace * (i / 1e4 + one.number / 1e6) for i in range(one.messages)]

        cpu = itertools.chain([0.451 * i for i in range(28)], itertools.repeat(float("nan")))
        world.Server.return_value.cpu.side_effect, world.run.side_effect = cpu, run
        with mock.patch.multiple(__name__, Server=world.Server, exchange=world.exchange), \
                mock.patch("client.run", world.run), mock.patch("time.sleep", world.sleep), \
                mock.patch("time.monotonic", side_effect=itertools.count(0, 10)), \
                mock.patch("os.sched_getaffinity", return_value={5}, create=True), \
                contextlib.redirect_stdout(io.StringIO()) as output:
            benchmark("nonblocking, blocking --threads 2, blocking, select")
            world.Server.side_effect = AssertionError("it does not listen:\nusage\nno thread")
            benchmark("async")
        head, table, last = output.getvalue().split(HEAD + "\n")
        self.assertEqual((head[-9:], last), ("cores: 1\n", f"async{'':23}no thread\n"))
        self.assertEqual(table.partition("nonblocking")[2].partition("\nPython")[0], """\
                      2,000     39.6 ms      600.0 ms   22.6 us   4.5%             500 --interval 0
blocking --threads 2             2,000     39.6 ms      600.0 ms   22.6 us   4.5%             500
blocking                         2,000     39.6 ms      600.0 ms         -      -   one at a time
select                      1 of 100 clients failed: no echo""")
        self.assertEqual(asked[:6], [(100, {(200, 64, 0)})] * 3 + [(10, {(500, 64, 0)})] * 3)
        self.assertRegex(HEAD, r"^100 .* 200 .* 64 .*\n.* 100 .* 10 .* 500 .* 900\n.* 3 runs")
        self.assertEqual(world.Server.call_args_list[2].args[1:], ("--quiet", "--interval", "0"))
        calls = " ".join(re.sub(r".*\.", "", name) for name, *_ in world.mock_calls)
        runs, crowd = "cpu run cpu " * 3 + "connect close", "connect __enter__ " * 100
        steps = f"Server {crowd}exchange cpu sleep cpu connect close {'__exit__ ' * 100}kill " \
            f"Server {runs} kill Server {(crowd + 'exchange ') * 9}{runs} {'__exit__ ' * 900}kill"
        self.assertEqual(calls[: len(steps)], steps)


# ---- The tools: a server inside this process

class Spy(socket.socket):
    """A socket of a server that notes each call, and fails as told."""

    most = 1 << 30  # bytes that one send() takes
    kept = most_kept = 0  # bytes that were received and are not sent yet
    endless = False  # receives the same again and again, and nobody gets the echo

    def __init__(self, inside: Inside, name: str, fileno: int | None = None) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM, fileno=fileno)
        self.inside, self.name = inside, name
        self.instead: dict[str, Any] = {}  # by call: an error to raise, or a value to return

    def call(self, name: str, *args: Any) -> Any:
        self.inside.pass_gate()
        sizes: list[Any] = [len(x) if hasattr(x, "__len__") else x for x in args]
        call = f"{name}({', '.join(map(str, sizes))})"
        if name == "recv" and self.endless:
            args = (*args, socket.MSG_PEEK)
        elif name == "send":
            args = (b"" if self.endless else args[0][: self.most],)
        try:
            result = getattr(super(), name)(*args)
        except BlockingIOError:
            self.inside.calls.append(f"{self.name}.{call} would block")
            raise
        self.inside.calls.append(f"{self.name}.{call}")
        if name == "send" and self.endless:
            result = sizes[0]
        self.inside.pass_gate()
        for key in {call, name.replace("all", "")} & set(self.instead):
            result = self.instead.pop(key)
            if isinstance(result, BaseException):
                raise result
        self.kept += len(result) if name == "recv" else 0
        self.kept -= {"send": result, "sendall": sizes and sizes[0]}.get(name, 0)
        self.most_kept = max(self.most_kept, self.kept)
        return result

    def accept(self) -> tuple[socket.socket, Any]:
        """Follow the plan: accept a client, or fail with the error that it names."""
        self.inside.pass_gate()
        waiting = select.select([self], [], [], None if self.getblocking() else 0)[0]
        self.inside.pass_gate()
        self.inside.calls.append("listener.accept()" + " would block" * (not waiting))
        if not waiting:
            raise BlockingIOError(errno.EAGAIN, "no client waits")
        step = next(self.inside.plan, "")
        if hasattr(errno, step):
            raise OSError(getattr(errno, step), "a fault of the test")
        mute = step == "silent"  # nobody ever sends to it
        sock, address = (socket.socket(type=socket.SOCK_DGRAM), None) if mute else super().accept()
        self.inside.socks.append(Spy(self.inside, str(len(self.inside.socks)), sock.detach()))
        return self.inside.socks[-1], None if step == "no address" else address


for method in ("recv", "send", "sendall", "shutdown", "settimeout", "setblocking", "close"):
    setattr(Spy, method, functools.partialmethod(Spy.call, method))


class Inside:
    """A server without a process: serve() in a thread, with spies, and with pauses only noted."""

    def __init__(self, name: str, plan: Any, arguments: Any, changes: dict[str, Any]) -> None:
        self.calls: list[str] = []
        self.lines: list[str] = []  # of the log
        self.socks: list[Spy] = []  # of the clients, and their ends:
        self.clients: list[socket.socket] = []
        self.plan, self.arguments = (step or "" for step in plan), arguments
        self.gate, self.stopping = threading.Lock(), False
        self.listener = Spy(self, "listener")
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)  # soon full
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)  # several recv()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.address = self.listener.getsockname()
        if name == "selectors":
            arguments[0].select = self.spied(arguments[0].select, 0)
        self.module = load(name)
        self.module.log = SimpleNamespace(info=lambda *args: self.lines.append(args[0] % args[1:]))
        self.module.asyncio = changed(asyncio, sleep=self.pause)
        self.module.time = changed(time, sleep=self.sleep)
        self.module.select = changed(select, select=self.spied(select.select, 3), epoll=self.epoll)
        self.module.resource = mock.Mock(**{"getrlimit.return_value": (9, 9)})  # not the test's
        vars(self.module).update(changes)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.mistakes: list[Any] = vars(self.thread).setdefault("mistakes", [])
        self.thread.start()

    def run(self) -> None:
        coroutine = self.module.serve(self.listener, *self.arguments)
        if asyncio.iscoroutine(coroutine):
            asyncio.run(coroutine)

    def stop(self) -> None:
        """End serve(); fail if it does not end, or if it had a mistake."""
        self.stopping, end = True, time.monotonic() + DEADLINE
        for sock in self.clients:
            sock.close()
        while self.thread.is_alive() and time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(self.address):  # wakes it
                self.thread.join(0.02)
        for spy in (self.listener, *self.socks):
            socket.socket.close(spy)
        for mistake in (*self.mistakes, *[AssertionError("no end")] * self.thread.is_alive()):
            raise mistake

    def connect(self) -> socket.socket:
        sock = socket.create_connection(self.address, DEADLINE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
        self.clients.append(sock)
        return sock

    def pass_gate(self) -> None:
        with self.gate:  # a test that has it holds the server
            if self.stopping:
                raise asyncio.CancelledError  # it passes each `except`, and ends a task

    def sleep(self, seconds: float) -> None:
        self.pass_gate()
        self.calls.append(f"sleep({seconds})")
        time.sleep(0.001)

    async def pause(self, seconds: float) -> None:
        self.calls.append(f"sleep({seconds})")
        await asyncio.sleep(0)

    def spied(self, function: Callable[..., Any], lists: int) -> Callable[..., Any]:
        """Return a function that waits for sockets, and notes what it gets beside their lists."""

        def wait(*args: Any, **named: Any) -> Any:
            self.pass_gate()
            self.calls.append(f"wait({', '.join(map(str, (*args[lists:], *named.values())))})")
            result = function(*args, **named)
            self.pass_gate()
            return result

        return wait

    def epoll(self) -> Any:
        epoll = vars(select)["epoll"]()
        return changed(epoll, poll=self.spied(epoll.poll, 0))

    def made(self) -> list[str]:
        return [x for x in self.calls if x != "sleep(0.001)" and not x.endswith("would block")]
    def pauses(self) -> list[str]:
        return [x for x in self.made() if x.startswith("sleep") and x != "sleep(0)"]

    def idle(self) -> bool:
        before = len(self.made())
        time.sleep(0.05)
        return len(self.made()) == before
    def lines_with(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]
    def wait_for_line(self, text: str, number: int = 1) -> None:
        eventually(lambda: len(self.lines_with(text)) >= number or self.mistakes, text)


def changed(original: Any, **changes: Any) -> Any:
    names = {name: getattr(original, name) for name in dir(original) if name[0] != "_"}
    return SimpleNamespace(**{**names, **changes})


def load(name: str) -> Any:
    spec: Any = importlib.util.spec_from_file_location(f"{name}_server", SCRIPTS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- The tools: scripts as processes

ENVIRONMENT = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
PRELUDE = "{}\nimport runpy, sys\ndel sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')"


def setUpModule() -> None:
    """Give the scripts a Ctrl-C even if we were started without, and us enough files."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger("asyncio").disabled = True
    threading.excepthook = lambda failed: (  # keep the error of a thread for its test
        vars(failed.thread).setdefault("mistakes", []).append(failed.exc_value)
        if issubclass(failed.exc_type, Exception) else None)
    if sys.platform == "win32":  # the other event loop does not call accept() and recv()
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    else:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not tell
            wanted = min(most, 10_400) if most > 0 else 10_400
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        sys.exit(f"test_all.py: {error}")


def need_files(test: unittest.TestCase, number: int) -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else number
    if files < number:
        test.skipTest(f"needs {number} open files, and a process may have {files} here")


def eventually(condition: Callable[[], object], what: str, log: Callable[[], Any] = str) -> None:
    """Return as soon as the condition is true. Raise AssertionError at the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen: {what} {log()[-500:]!r}")
        time.sleep(0.001)


class Process:
    """A script as a subprocess: after a prelude, with so many open files, in a terminal or not."""

    def __init__(self, script: Path, *options: str, prelude: str = "", files: int = 0,
                 terminal: bool = False, **more: Any) -> None:
        if files and resource:
            more["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        command = ["-c", PRELUDE.format(prelude), str(script)] if prelude else [str(script)]
        screen, theirs = vars(os)["openpty"]() if terminal else os.pipe()
        others = theirs if terminal else subprocess.PIPE
        more = {"stdin": others, "stdout": others, "stderr": theirs, "env": ENVIRONMENT, **more}
        self.process = subprocess.Popen([sys.executable, *command, *options], bufsize=0, **more)
        os.close(theirs)
        self.screen = io.FileIO(screen, "r+" if terminal else "r")
        self.said: list[bytes] = []
        self.expected = b""
        self.reader = threading.Thread(target=self.read_screen, daemon=True)
        self.reader.start()

    def read_screen(self) -> None:
        with self.screen, contextlib.suppress(OSError):  # the end of a terminal is an error
            while data := self.screen.read(65536):
                self.said.append(data)

    def log(self) -> bytes:
        if self.process.poll() is not None:
            self.reader.join(DEADLINE)
        return b"".join(self.said).replace(b"\r\n", b"\n")

    def wait_for_log(self, pattern: bytes) -> None:
        eventually(lambda: re.search(pattern, self.log()), repr(pattern), self.log)
    def expect(self, text: bytes) -> None:
        self.expected += text
        eventually(lambda: self.log().startswith(self.expected), repr(self.expected), self.log)

    def proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()
    def wait_for_rest(self) -> None:
        """Wait until it sleeps in a call; Python notices a signal just before that too late."""
        if sys.platform == "linux" and os.path.exists("/proc/self/stat"):
            eventually(lambda: ") S" in self.proc("stat"), "a process that sleeps")
    def send(self, data: bytes) -> None:
        (self.process.stdin or self.screen).write(data)

    def output(self, data: bytes = b"", seconds: float = DEADLINE) -> bytes:
        return self.process.communicate(data, seconds)[0] or b""
    def result(self, data: bytes = b"") -> tuple[bytes, bytes, int]:
        return self.output(data), self.log(), self.process.returncode

    def kill(self) -> None:
        with self.process:
            self.process.kill()
        self.reader.join(DEADLINE)


class Server(Process):
    def __init__(self, script: Path, *options: str, **more: Any) -> None:
        super().__init__(script, *(() if "--port" in options else ("--port=0",)), *options, **more)
        watchdog = threading.Timer(DEADLINE, self.process.kill)
        watchdog.start()
        self.line = self.process.stdout.readline().decode() if self.process.stdout else ""
        watchdog.cancel()
        match = re.match(r"listening on 127\.0\.0\.1:(\d+) ", self.line)
        if not match:
            self.kill()
            raise AssertionError(f"{self.line!r} is not 'listening':\n{self.log().decode()[-500:]}")
        self.port = int(match[1])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), DEADLINE)

    def cpu(self) -> float:
        if sys.platform != "linux":
            return float("nan")
        fields = self.proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def idle(self) -> bool:
        """Return whether it makes no call for an eighth of a second, or few of them if it polls."""
        cpu, switches = self.cpu(), re.findall(r"switches:\t\d+", self.proc("status"))
        time.sleep(0.12)
        same = switches == re.findall(r"switches:\t\d+", self.proc("status"))
        polls = "every" in self.line and self.cpu() - cpu < 0.06
        return ") S" in self.proc("stat") and (same or polls)


def flood(sock: socket.socket, data: bytes = b"x" * 65536, most: int = 1 << 28) -> int:
    """Send data repeatedly, without reading, until no more goes; return how many bytes went."""
    sent = 0
    sock.setblocking(False)
    while sent < most and select.select([], [sock], [], 0.1)[1]:
        with contextlib.suppress(BlockingIOError):
            start = sent % len(data)
            sent += sock.send(memoryview(data)[start : start + most - sent])
    sock.settimeout(DEADLINE)
    return sent


def receive(sock: socket.socket, size: int = sys.maxsize) -> bytes:
    """Return the next size bytes, or what comes before the connection ends."""
    data = bytearray()
    while len(data) < size and (part := sock.recv(min(size - len(data), 65536))):
        data += part
    return bytes(data)


def exchange(sock: socket.socket, data: bytes) -> bytes:
    threading.Thread(target=sock.sendall, args=[data], daemon=True).start()
    return receive(sock, len(data))


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


if __name__ == "__main__":
    if sys.argv[1:] != ["--benchmark"]:
        unittest.main()
    setUpModule()
    benchmark()
