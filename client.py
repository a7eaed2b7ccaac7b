"""Client for the echo servers. Start one first, in another terminal: python select_server.py

    python client.py                    type a line and its echo comes back; q ends it
    python client.py < file             sends the file and writes its echo to stdout
    python client.py --clients 100      100 clients at the same time, and a chart of them
"""

import argparse
import errno
import io
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from statistics import median

RECV_SIZE = 65536  # bytes: the most that one recv() returns
QUIT_LINES = (b"q\n", b"q\r\n", b"q")  # the last one without a newline


# ---- One client

def talk(sock: socket.socket) -> None:
    """Send each typed line and print its echo. Raise OSError if the connection is lost, or exit."""
    encoding = sys.stdin.encoding  # in IDLE and Thonny, stdin has text only: no buffer with bytes
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a terminal: pass on bytes that are no text, too
            stream.reconfigure(errors="surrogateescape")
    text = ""
    with sock.makefile("rb") as echoes:
        while True:
            with blame("cannot write to stdout"):
                print(text, end=">>> ", flush=True)  # the last echo, and the prompt
            with blame("cannot read stdin"):
                line = sys.stdin.readline().encode(encoding, "surrogateescape")
            if not line or line in QUIT_LINES:
                break
            sock.sendall(line)
            echo = echoes.read(len(line))  # blocks until all of it is there
            if len(echo) < len(line):
                raise ConnectionError("closed by the server")
            text = echo.decode(encoding, "surrogateescape")
    with blame("cannot write to stdout"):
        print(end="" if line else "\n", flush=True)  # Ctrl-D leaves the cursor at the prompt
    if line:
        sock.sendall(b"q\n")


def copy(sock: socket.socket) -> None:
    """Send stdin, up to a q line, and write the echo to stdout. Raise OSError, or exit."""
    # A thread does the sending, because not every selector can watch a file. Sending everything
    # before reading anything would deadlock: once the buffers were full, both sides would block.
    received, expected = 0, float("inf")  # bytes; the end of stdin tells how many to expect
    failure: BaseException = ConnectionError("closed by the server")  # or an error of the thread

    def send() -> None:
        nonlocal expected, failure
        sent, at_line_start = 0, True
        try:
            for piece in read_stdin():
                if at_line_start and piece in QUIT_LINES:
                    expected = sent  # set before the q: the server may close immediately
                    sock.sendall(b"q\n")
                    break
                at_line_start = piece.endswith(b"\n")
                sent += len(piece)
                sock.sendall(piece)
            expected = sent
            sock.shutdown(socket.SHUT_WR)
        except (OSError, MemoryError, SystemExit) as error:
            failure = error
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)  # the server then ends its stream, too

    threading.Thread(target=send, daemon=True).start()
    while data := sock.recv(RECV_SIZE):
        received += len(data)
        with blame("cannot write to stdout"):
            while data and sys.stdout:  # None if it is closed
                written = os.write(sys.stdout.fileno(), data)
                data = data[written:]
    if received < expected:
        raise failure


def read_stdin() -> Iterator[bytes]:
    """Yield the lines of stdin, long ones in pieces. Exit if stdin cannot be read."""
    with blame("cannot read stdin"):
        # A duplicate, because Python cannot close sys.stdin at exit while a thread is reading it.
        source = os.dup(sys.stdin.fileno()) if sys.stdin else os.devnull
        with open(source, "rb") as stdin:
            while piece := stdin.readline(RECV_SIZE):
                yield piece


# ---- Many clients at the same time

class Client:
    """One of many clients: its conversation, and what it measures."""

    def __init__(self, number: int, messages: int, size: int, pause: float) -> None:
        self.number, self.messages, self.size, self.pause = number, messages, size, pause
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.conversation = self.converse()  # a generator: next() runs it until it has to wait
        self.events = next(self.conversation)  # what it waits for
        self.problem: OSError | None = None  # if the conversation ended too early
        self.resume_at = self.first_echo_at = self.closed_at = 0.0  # perf_counter(); 0: not yet
        self.round_trips: list[float] = []  # seconds from each message to the end of its echo

    def converse(self) -> Iterator[int]:
        """Talk to the server; yield the events to wait for. Raise OSError if that goes wrong."""
        yield EVENT_WRITE  # a socket becomes writable when connecting has succeeded or failed
        sock, size = self.sock, self.size
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
        for i in range(1, self.messages + 1):
            message = (b"%d, client %d" % (i, self.number)).ljust(size, b".")[: size - 1] + b"\n"
            unsent, received, sent_at = memoryview(message), 0, time.perf_counter()
            while received < size or time.perf_counter() < self.resume_at:  # run() ends a pause
                if unsent:  # and read, too: until we do, the server may not read either
                    with suppress(BlockingIOError):  # raised if the send buffer is full
                        sent = sock.send(unsent)
                        unsent = unsent[sent:]
                yield EVENT_READ | EVENT_WRITE if unsent else EVENT_READ
                try:
                    data = sock.recv(RECV_SIZE)
                except BlockingIOError:
                    continue
                if not data or data != message[received : received + len(data)]:
                    raise ConnectionError("the echo differs" if data else "closed by the server")
                received += len(data)
                if received == size:
                    now = time.perf_counter()
                    self.first_echo_at = self.first_echo_at or now
                    self.round_trips.append(now - sent_at)
                    if self.pause and i < self.messages:
                        self.resume_at = now + self.pause
        sock.send(b"q\n")
        with suppress(OSError):  # after a reset, recv() tells more
            sock.shutdown(socket.SHUT_WR)  # ends our direction: the server may not know the q
        while data:  # the last echo, and then all up to the end of the stream
            yield EVENT_READ
            with suppress(BlockingIOError):
                data = sock.recv(RECV_SIZE)  # perhaps an echo of the q


def run(clients: list[Client], server: tuple[str, int], start: float) -> None:
    """Let all clients talk to a server at the same time. Raise OSError if they cannot start."""
    selector = DefaultSelector()
    pausing: deque[Client] = deque()  # in the order in which their pauses end
    shown_at = start
    for client in clients:
        with suppress(BlockingIOError):  # raised because connecting takes a while
            client.sock.connect(server)
        selector.register(client.sock, client.events, client)
    while selector.get_map():
        timeout = pausing[0].resume_at - time.perf_counter() if pausing else 0.2
        ready = [key.data for key, _ in selector.select(min(timeout, 0.2))]  # 0.2: for the progress
        now = time.perf_counter()
        while pausing and pausing[0].resume_at <= now:
            ready.append(pausing.popleft())
        for client in ready:
            if client.closed_at:  # it ended in its pause
                continue
            try:
                events = next(client.conversation, 0)  # 0: it has ended
            except OSError as problem:
                if all(client.events == EVENT_WRITE for client in clients):  # none is connected
                    raise
                events, client.problem = 0, problem
            if not events:
                client.closed_at = time.perf_counter()
                selector.unregister(client.sock)
                client.sock.close()
            elif events != client.events:
                client.events = selector.modify(client.sock, events, client).events
            if client.resume_at > now:
                pausing.append(client)
        if now > shown_at + 0.5 and sys.stderr and sys.stderr.isatty():
            shown_at = now
            done = sum(len(client.round_trips) for client in clients)
            print(f"{now - start:.0f} s: {done} messages", end="\r", file=sys.stderr, flush=True)


def chart(spans: list[tuple[float, float]], width: int) -> str:
    """Draw for each client when its first echo came (0: never) and when it ended, in seconds."""
    title = ". waiting for its first echo   # being served"
    title += f"\n20 of the {len(spans)} clients, evenly spaced" if len(spans) > 20 else ""
    seconds = max(end for _, end in spans)
    part = max(10, (min(width, 120) - 20) // 4)  # columns
    ticks = "".join(f"{seconds * i / 4:<{part}.4g}" for i in range(4))
    rows = [title, "", f"client  {ticks}{seconds:.4g} s", " " * 8 + "|".ljust(part, "-") * 4 + "|"]
    for number in sorted({round(i * (len(spans) - 1) / 19) for i in range(20)}):  # or all, if fewer
        first, end = spans[number]
        waiting = int((first or end) / seconds * 4 * part)
        served = max(1, round(end / seconds * 4 * part) - waiting) if first else 0
        rows.append(f"{number + 1:6}  " + "." * waiting + "#" * served)
    return "\n".join(rows)


def figures(times: list[float], spans: list[tuple[float, float]]) -> str:
    """Summarize a run: messages, rate, round-trip times, and when the first echoes came."""
    seconds = max(end for _, end in spans)
    text = f"{len(times):,} messages in {seconds:.4g} s: {len(times) / seconds:,.0f} per second"
    if times:
        ms = sorted(t * 1000 for t in times)
        text += f"\nround-trip time: median {median(ms):,.2f} ms, "
        text += f"99th percentile {ms[(len(ms) * 99 - 1) // 100]:,.2f} ms, maximum {ms[-1]:,.2f} ms"
        ms = sorted(first * 1000 for first, _ in spans if first)
        text += f"\nfirst echo after the start ({len(ms)} of {len(spans)} clients): "
        text += f"median {median(ms):,.2f} ms, maximum {ms[-1]:,.2f} ms"
    return text


def run_many(args: argparse.Namespace, server: tuple[str, int]) -> None:
    """Run many clients and print what they saw. Raise OSError if none can connect, or exit."""
    clients = [Client(i, args.messages, args.size, args.pause) for i in range(1, args.clients + 1)]
    start = time.perf_counter()
    try:
        run(clients, server, start)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the rest begins on a line of its own
    end = time.perf_counter()
    spans = [(max(0, x.first_echo_at - start), (x.closed_at or end) - start) for x in clients]
    times = [seconds for client in clients for seconds in client.round_trips]
    width = shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else 72
    with blame("cannot write to stdout"):
        print(chart(spans, width), figures(times, spans), sep="\n\n", flush=True)
    problems = [str(x.problem or "interrupted") for x in clients if x.problem or not x.closed_at]
    if problems:
        kinds = ", ".join(f"{kind} ({number})" for kind, number in Counter(problems).items())
        print(f"{len(problems)} of {len(clients)} clients did not finish: {kinds}", file=sys.stderr)
        sys.exit(130 if "interrupted" in problems else 1)


# ---- The command line, and what can fail

def main() -> None:
    """Run one client or many, as the command line says."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--host", default="127.0.0.1", help="the server's address (%(default)s)")
    parser.add_argument("--port", type=int, default=8088, help="the server's port (%(default)s)")
    parser.add_argument("--clients", type=int, help="how many, at the same time")
    parser.add_argument("--messages", type=int, default=100, help="sent by each (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="bytes in a message (%(default)s)")
    parser.add_argument("--pause", type=float, default=0, help="seconds after echoes (%(default)s)")
    args = parser.parse_args()
    most = 512 if sys.platform == "win32" else 10**6  # the limit of select() on Windows
    limits = {"port": 65535, "clients": most, "messages": 10**9, "size": 10**9, "pause": 3600}
    for name, value in vars(args).items():
        low = 0 if name == "pause" else 1
        if name in limits and value is not None and not low <= value <= limits[name]:
            parser.error(f"--{name} must be {low} to {limits[name]}")
    talks = not args.clients and all(file and file.isatty() for file in (sys.stdin, sys.stdout))
    what = f"cannot connect to {args.host}:{args.port}"
    try:
        for stream in (sys.stdin, sys.stdout):  # another program may have made them non-blocking
            if stream and hasattr(os, "set_blocking"):
                with suppress(OSError):  # in IDLE they have no file descriptor
                    os.set_blocking(stream.fileno(), True)
        server = socket.gethostbyname(args.host), args.port
        if args.clients:
            run_many(args, server)
        else:
            with socket.create_connection(server) as sock:
                what = f"connection to {args.host}:{args.port} lost"
                talk(sock) if talks else copy(sock)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(0 if talks else 130)  # 130: interrupted
    except (MemoryError, RuntimeError) as error:  # RuntimeError: no thread can be started
        sys.exit(str(error) or "out of memory")
    except (OSError, UnicodeError) as error:
        hint = {errno.ECONNREFUSED: f"; start one: python select_server.py --port {args.port}",
                errno.EADDRNOTAVAIL: "; perhaps no local port is free",
                errno.EMFILE: f"; first run: ulimit -n {args.clients + 50}" if args.clients else ""}
        sys.exit(f"{what}: {error}{hint.get(getattr(error, 'errno', 0), '')}")


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Exit with a line that says what failed, if the block raises an error."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        if "stdout" in what:
            sys.stdout = None  # otherwise Python would try to write again at exit
        sys.exit(f"{what}: {error}")


if __name__ == "__main__":
    main()
