"""Client for the echo servers.

Start a server first, in another terminal: python select_server.py

    python client.py                    type a line and its echo comes back; q ends it
    python client.py < file             sends it up to a q line, and writes its echo to stdout
    python client.py --clients 100      100 clients at the same time, and a chart of them
"""

import argparse
import errno
import io
import os
import shutil
import signal
import socket
import sys
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from statistics import median

RECV_SIZE = 65536  # bytes: the most that one recv() returns
QUIT_LINES = (b"q\n", b"q\r\n", b"q")  # the last one without a newline


# ---- One client

def talk(sock: socket.socket) -> None:
    """Send each typed line and print its echo, until a q. Raise OSError if that fails."""
    encoding = sys.stdin.encoding  # in IDLE and Thonny, stdin has text only: no buffer with bytes
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a terminal: also pass on bytes that are no text
            stream.reconfigure(errors="surrogateescape")
    with sock.makefile("rb") as echoes:
        while True:
            print(">>> ", end="", flush=True)
            line = sys.stdin.readline().encode(encoding, "surrogateescape")
            if not line:  # Ctrl-D
                print()  # the cursor is still at the prompt
                break
            if line in QUIT_LINES:
                sock.sendall(b"q\n")
                break
            sock.sendall(line)
            echo = echoes.read(len(line))  # blocks until all of it is there
            if len(echo) < len(line):
                raise ConnectionError("closed by the server")
            print(echo.decode(encoding, "surrogateescape"), end="", flush=True)


def copy(sock: socket.socket) -> None:
    """Send stdin, up to a q line, and write the echo to stdout. Raise OSError, or exit."""
    # A thread does the sending, because not every selector can watch a file. Sending everything
    # before reading anything would deadlock: once the buffers were full, neither side would read.
    expected = sys.maxsize  # bytes of echo; unknown until the end of stdin
    quit_line = b""
    failure: BaseException = ConnectionError("closed by the server")  # or an error of the thread

    def send() -> None:
        nonlocal expected, quit_line, failure
        sent = 0
        at_line_start = True
        try:
            for piece in read_stdin():
                if at_line_start and piece in QUIT_LINES:
                    quit_line = b"q\n"
                    break
                at_line_start = piece.endswith(b"\n")
                sent += len(piece)
                sock.sendall(piece)
            expected = sent  # set before the q: the server may close immediately
            sock.sendall(quit_line)
        except (OSError, MemoryError, SystemExit) as error:
            failure = error
        with suppress(OSError):  # raised if the connection is lost
            sock.shutdown(socket.SHUT_WR)  # the server then ends its stream, too

    try:
        threading.Thread(target=send, daemon=True).start()
    except RuntimeError as error:  # out of resources
        sys.exit(str(error))
    received = 0
    with sock.makefile("rb") as echoes:
        while received < expected and echoes.peek():  # blocks until bytes are there, or the end
            data = echoes.read1(max(0, expected - received))
            received += len(data)
            write(data)
        if received < expected:
            raise failure
        data = echoes.read(len(quit_line))  # some servers send it back, or the q alone
        if not quit_line.startswith(data):
            write(data)
        while data := echoes.read1():  # more than an echo
            write(data)


def read_stdin() -> Iterator[bytes]:
    """Yield the lines of stdin, long ones in pieces. Exit if stdin cannot be read."""
    try:
        # A duplicate, because Python cannot close sys.stdin at exit while a thread is reading it.
        source = os.dup(sys.stdin.fileno()) if sys.stdin else os.devnull
        with open(source, "rb") as stdin:
            while piece := stdin.readline(RECV_SIZE):
                yield piece
    except OSError as error:
        sys.exit(f"cannot read stdin: {error}")


def write(data: bytes) -> None:
    """Write bytes to stdout, and leave none in a buffer. Exit if that fails."""
    try:
        while data and sys.stdout:  # None if it is closed
            written = os.write(sys.stdout.fileno(), data)
            data = data[written:]
    except OSError as error:
        sys.exit(f"cannot write to stdout: {error}")


# ---- Many clients at the same time

class Client:
    """One of many clients: its conversation, and what it measures."""

    def __init__(self, number: int, messages: int, size: int, pause: float) -> None:
        self.number = number
        self.messages = messages
        self.size = size  # bytes
        self.pause = pause  # seconds
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.conversation = self.converse()  # a generator: next() runs it until it has to wait
        self.events = next(self.conversation)  # what it waits for
        self.problem: OSError | None = None  # if the conversation ended too early
        self.resume_at = self.first_echo_at = self.closed_at = 0.0  # perf_counter(); 0: not yet
        self.round_trips = array("d")  # seconds from each message to its echo

    def converse(self) -> Iterator[int]:
        """Talk to the server; yield the events to wait for. The steps raise OSError."""
        try:
            yield from self.connect()
            for i in range(1, self.messages + 1):
                text = b"%d, client %d" % (i, self.number)
                yield from self.exchange(text.ljust(self.size, b".")[: self.size - 1] + b"\n")
                if self.pause and i < self.messages:
                    yield from self.take_pause()
            yield from self.quit()
        except OSError as problem:
            self.problem = problem

    def connect(self) -> Iterator[int]:
        """Wait until the socket is connected."""
        yield EVENT_WRITE  # a socket becomes writable when connecting has succeeded or failed
        if error := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            if sys.platform == "win32":
                import ctypes  # os.strerror() does not know the errors of sockets there
                raise OSError(0, ctypes.FormatError(error).rstrip("."), None, error)
            raise OSError(error, os.strerror(error))

    def exchange(self, message: bytes) -> Iterator[int]:
        """Send a message and receive its echo."""
        unsent = memoryview(message)  # slicing it copies nothing
        received = 0
        sent_at = time.perf_counter()
        while received < len(message):
            if unsent:
                with suppress(BlockingIOError):  # raised if the send buffer is full
                    sent = self.sock.send(unsent)
                    unsent = unsent[sent:]
            # Receive even if bytes are unsent: until we do, the server may not receive either.
            yield EVENT_READ | EVENT_WRITE if unsent else EVENT_READ
            received += self.receive(message, received)
        now = time.perf_counter()
        self.first_echo_at = self.first_echo_at or now
        self.round_trips.append(now - sent_at)

    def receive(self, message: bytes, received: int) -> int:
        """Receive more of the echo of a message; return how many bytes came."""
        try:
            data = self.sock.recv(RECV_SIZE)
        except BlockingIOError:  # none: the socket was writable, or the pause is over
            return 0
        if not data or data != message[received : received + len(data)]:
            raise ConnectionError("the echo differs" if data else "closed by the server")
        return len(data)

    def take_pause(self) -> Iterator[int]:
        """Pause. Raise OSError if the server sends anything before, or ends its stream."""
        self.resume_at = time.perf_counter() + self.pause
        yield EVENT_READ  # run() continues here then, or as soon as the socket is readable
        self.receive(b"", 0)

    def quit(self) -> Iterator[int]:
        """Send a q, and receive until the server ends its stream."""
        self.sock.send(b"q\n")
        with suppress(OSError):  # after a reset, recv() tells more
            self.sock.shutdown(socket.SHUT_WR)  # ends our direction: the server may not know the q
        yield EVENT_READ
        while self.sock.recv(RECV_SIZE):  # perhaps an echo of the q
            yield EVENT_READ


def run(clients: list[Client], server: tuple[str, int], start: float) -> None:
    """Let all clients talk to a server at the same time. Raise OSError if connecting fails."""
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
            events = next(client.conversation, 0)  # 0: it has ended
            if not events:
                client.closed_at = time.perf_counter()
                selector.unregister(client.sock)
                client.sock.close()
            elif events != client.events:
                client.events = events
                selector.modify(client.sock, events, client)
            if events and client.resume_at > now:
                pausing.append(client)
        if now > shown_at + 0.5 and sys.stderr.isatty():
            shown_at = now
            done = sum(len(client.round_trips) for client in clients)
            print(f"{now - start:.0f} s: {done} messages", end="\r", file=sys.stderr, flush=True)
    if clients[0].problem and all(client.events == EVENT_WRITE for client in clients):
        raise clients[0].problem  # like all others, it never got past connecting


def chart(spans: list[tuple[float, float]], width: int) -> str:
    """Draw a row for each client: dots until its first echo (0: none came), then # to its end."""
    seconds = max(end for _, end in spans)  # the length of the longest row
    quarter = max(10, (min(width, 120) - 20) // 4)  # columns; 10 are enough for a number above it
    scale = 4 * quarter / seconds  # columns per second
    numbers = "".join(f"{seconds * i / 4:<{quarter}.4g}" for i in range(4))
    lines = [". waiting for its first echo   # being served"]
    shown = list(range(len(spans)))
    if len(spans) > 20:
        lines.append(f"20 of the {len(spans)} clients, evenly spaced")
        shown = [round(i * (len(spans) - 1) / 19) for i in range(20)]  # from the first to the last
    lines += ["", f"client  {numbers}{seconds:.4g} s", " " * 8 + "|".ljust(quarter, "-") * 4 + "|"]
    for i in shown:
        first_echo, end = spans[i]
        length = max(1, round(end * scale))  # a row is never empty
        dots = min(round(first_echo * scale), length - 1) if first_echo else length  # leaves a #
        lines.append(f"{i + 1:6}  " + "." * dots + "#" * (length - dots))
    return "\n".join(lines)


def figures(times: list[float], spans: list[tuple[float, float]]) -> str:
    """Summarize a run: messages, their rate, round-trip times, and first echoes."""
    seconds = max(end for _, end in spans)
    text = f"{len(times):,} messages in {seconds:.4g} s: {len(times) / seconds:,.0f} per second"
    if times:
        times = sorted(times)
        percentile = times[(len(times) * 99 - 1) // 100]  # 99% of all times are not above it
        firsts = [first_echo for first_echo, _ in spans if first_echo]
        text += f"\nround-trip time: median {median(times) * 1000:,.2f} ms, 99th percentile "
        text += f"{percentile * 1000:,.2f} ms, maximum {times[-1] * 1000:,.2f} ms"
        text += f"\nfirst echo after the start ({len(firsts)} of {len(spans)} clients): "
        text += f"median {median(firsts) * 1000:,.2f} ms, maximum {max(firsts) * 1000:,.2f} ms"
    return text


def run_many(args: argparse.Namespace, server: tuple[str, int]) -> None:
    """Run many clients and print what they saw. Raise OSError if none can connect, or exit."""
    options = args.messages or 100, args.size or 64, args.pause or 0
    clients = [Client(number, *options) for number in range(1, args.clients + 1)]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    status = 1  # if a client does not finish
    start = time.perf_counter()
    try:
        run(clients, server, start)
    except KeyboardInterrupt:
        status = 130
    except SystemExit:  # SIGTERM
        status = 143
    finally:
        end = time.perf_counter()
        if end > start + 0.5 and sys.stderr.isatty():  # wipe the progress
            print("\r" + " " * 30, end="\r", file=sys.stderr, flush=True)
    spans = [(max(0, x.first_echo_at - start), (x.closed_at or end) - start) for x in clients]
    times = [seconds for client in clients for seconds in client.round_trips]
    width = shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else 72
    try:
        print(chart(spans, width), figures(times, spans), sep="\n\n", flush=True)
    except OSError as error:
        sys.stdout = None  # otherwise Python would try to write again at exit
        sys.exit(f"cannot write to stdout: {error}")
    problems = [str(x.problem or "interrupted") for x in clients if x.problem or not x.closed_at]
    if problems:
        kinds = ", ".join(f"{kind} ({number})" for kind, number in Counter(problems).items())
        print(f"{len(problems)} of {len(clients)} clients did not finish: {kinds}", file=sys.stderr)
        sys.exit(status)


# ---- The command line

def main() -> None:
    """Run one client or many, as the command line says."""
    if sys.stderr is None:  # it is closed, and print() would write to stdout instead
        sys.stderr = io.StringIO()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--host", default="127.0.0.1", help="the server's address (%(default)s)")
    parser.add_argument("--port", type=int, default=8088, help="the server's port (%(default)s)")
    parser.add_argument("--clients", type=int, help="how many, at the same time")
    parser.add_argument("--messages", type=int, help="sent by each (100); 70 bytes of memory each")
    parser.add_argument("--size", type=int, help="bytes in a message (64)")
    parser.add_argument("--pause", type=float, help="seconds to pause after each echo (0)")
    args = parser.parse_args()
    if args.clients is None and (args.messages, args.size, args.pause) != (None, None, None):
        parser.error("--messages, --size and --pause need --clients")
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
                what = f"conversation with {args.host}:{args.port} failed"
                if talks:
                    talk(sock)
                else:
                    copy(sock)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(0 if talks else 130)  # 130: interrupted
    except (OSError, UnicodeError, MemoryError) as error:
        start_one = f"python select_server.py --host {args.host} --port {args.port}"
        hints = {errno.ECONNREFUSED: f"; start one there: {start_one}",
                 errno.EADDRNOTAVAIL: "; perhaps no local port is free",
                 errno.EMFILE: f"; first run: ulimit -n {(args.clients or 1) + 50}"}
        hint = hints.get(getattr(error, "errno", 0), "")
        sys.exit(f"{what}: {str(error) or 'out of memory'}{hint}")


if __name__ == "__main__":
    main()
