"""Client for the echo servers: a conversation with one of them, or many clients at once.

    python client.py                    type a line, and its echo comes back; q ends it
    python client.py < file             sends the file, and writes what comes back
    python client.py --clients 100      100 clients at once, and a picture of when each is served

Start a server first, in another terminal: python select_server.py
"""

import argparse
import errno
import io
import math
import os
import shutil
import socket
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector, DefaultSelector

RECV_SIZE = 65536  # bytes: the most that one recv() returns
QUIT_LINES = (b"q\n", b"q\r\n", b"q")  # the last one without a newline
Address = tuple[str, int]  # a host and a port


# ---- One client

def talk(sock: socket.socket) -> None:
    """Send each line that is typed, and print its echo. Raises OSError if the server leaves."""
    encoding = sys.stdin.encoding  # reads text, because in IDLE and Thonny stdin has no bytes
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a terminal, where any byte can be typed
            stream.reconfigure(errors="surrogateescape")
    with sock.makefile("rb") as echoes:
        while True:
            print(">>> ", end="", flush=True)
            line = sys.stdin.readline().encode(encoding, "surrogateescape")
            if not line:  # Ctrl-D
                print()
                return
            if line in QUIT_LINES:
                sock.sendall(b"q\n")
                return
            sock.sendall(line)
            echo = echoes.read(len(line))  # waits until all of it is there
            if len(echo) < len(line):
                raise ConnectionError("closed by the server")
            print(echo.decode(encoding, "surrogateescape"), end="")


def copy(sock: socket.socket) -> None:
    """Send stdin, up to a line that is just q, and write what comes back. Raises OSError."""
    # A thread sends, because not every selector can watch a file. To send everything and only then
    # read would be a deadlock: as soon as the buffers are full, both sides wait.
    sent, received, complete, failure = 0, 0, False, ""

    def send() -> None:
        nonlocal sent, complete, failure
        at_line_start = True
        try:
            # A duplicate: at exit, Python could not close sys.stdin while a thread reads it.
            with open(os.dup(sys.stdin.fileno()) if sys.stdin else os.devnull, "rb") as stdin:
                while piece := stdin.readline(RECV_SIZE):  # a long line comes in pieces
                    if at_line_start and piece in QUIT_LINES:
                        break
                    at_line_start = piece.endswith(b"\n")
                    sent += len(piece)
                    sock.sendall(piece)
            complete = True  # set before the q: the server may close at once
            if piece:  # a q, not the end of stdin
                sock.sendall(b"q\n")
            sock.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # recv() below reports it
        except OSError as error:
            failure = f"cannot read stdin: {error}"
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # ends recv() below

    threading.Thread(target=send, daemon=True).start()
    while data := sock.recv(RECV_SIZE):
        received += len(data)
        try:
            while data and sys.stdout:  # None if it is closed
                data = data[os.write(sys.stdout.fileno(), data) :]
        except OSError as error:
            sys.exit(f"cannot write to stdout: {error}")
    if failure:
        sys.exit(failure)
    if not complete or received < sent:
        raise ConnectionError("closed by the server")


# ---- Many clients at once

class Client:
    """One of many clients: sends a message, reads its echo, sends the next; at last a q."""

    def __init__(self, number: int, messages: int, size: int) -> None:
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.events = EVENT_WRITE  # what it waits for: at first, to be connected
        self.messages, self.size = messages, size
        self.text = (b"client %d, " % number) * (size // 8 + 2)  # a message is a slice of it
        self.message = b""  # the last one that was sent; empty after the q
        self.unsent = memoryview(b"")  # the part of it for which the send buffer had no room
        self.received = 0  # bytes of its echo
        self.problem = ""  # "lost" (the connection) or "different" (an echo)
        self.sent_at = self.first_echo_at = self.closed_at = 0.0  # perf_counter(); 0: not yet
        self.echo_times: list[float] = []  # seconds from each message to the end of its echo

    def on_ready(self) -> bool:
        """Send, then read. Returns True if a message is due. Raises OSError without a server."""
        if self.events == EVENT_WRITE:  # it is connected, or was refused
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error not in (0, errno.ECONNRESET):
                raise OSError(error, os.strerror(error))
            return True
        if self.unsent:  # then reads: until it does, the server may not read either
            self.send()
        try:
            data = self.sock.recv(RECV_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            return self.end("lost")
        if not data:
            return self.end("lost" if self.message else "")
        if data != self.message[self.received : self.received + len(data)]:
            return self.end("different")
        self.received += len(data)
        if self.received < self.size:
            return False
        now = time.perf_counter()
        self.first_echo_at = self.first_echo_at or now
        self.echo_times.append(now - self.sent_at)
        return True

    def send_next(self) -> None:
        """Send the next message or, after the last one, a q."""
        start = len(self.echo_times) % 8  # so that two messages in a row differ
        more = len(self.echo_times) < self.messages
        self.message = self.text[start : start + self.size - 1] + b"\n" if more else b""
        self.unsent = memoryview(self.message or b"q\n")
        self.received = 0
        self.sent_at = time.perf_counter()
        self.send()

    def send(self) -> None:
        """Send as much of what is unsent as fits into the send buffer."""
        try:
            self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.end("lost")
        self.events = EVENT_READ | EVENT_WRITE if self.unsent else EVENT_READ

    def end(self, problem: str) -> bool:
        """Note the end and its problem, if any. Returns False: no message is due."""
        self.closed_at = time.perf_counter()
        self.problem = problem
        return False


def run(clients: list[Client], selector: BaseSelector, server: Address, pause: float) -> float:
    """Let all clients talk to a server at once. Returns the start time; OSError: no server."""
    pausing: deque[tuple[float, Client]] = deque()  # (end of its pause, client), in order
    start = shown_at = now = time.perf_counter()
    for client in clients:
        with suppress(BlockingIOError):
            client.sock.connect(server)
        selector.register(client.sock, client.events, client)
    while selector.get_map():
        timeout = min(0.2, pausing[0][0] - now) if pausing else 0.2
        for key, _ in selector.select(timeout):
            client = key.data
            if client.on_ready():
                if pause and 0 < len(client.echo_times) < client.messages:
                    pausing.append((time.perf_counter() + pause, client))
                else:
                    client.send_next()
            if client.closed_at:
                selector.unregister(client.sock)
                client.sock.close()
            elif client.events != key.events:
                selector.modify(client.sock, client.events, client)
        now = time.perf_counter()
        while pausing and pausing[0][0] <= now:
            client = pausing.popleft()[1]
            if not client.closed_at:
                client.send_next()
                selector.modify(client.sock, client.events, client)
        if now > shown_at + 0.5 and sys.stderr and sys.stderr.isatty():
            shown_at = now
            done = sum(len(client.echo_times) for client in clients)
            print(f"{now - start:.0f} s: {done} messages", end="\r", file=sys.stderr, flush=True)
    return start


def picture(spans: list[tuple[float, float]], width: int) -> str:
    """Return a picture of when the first echo of each client came (0: never), and its end."""
    title = ". waits for its first echo   # is served"
    shown = list(range(len(spans)))
    if len(spans) > 20:
        shown = [round(i * (len(spans) - 1) / 19) for i in range(20)]
        title += f"\n20 of the {len(spans)} clients, evenly spaced"
    seconds = max(end for _, end in spans)
    quarter = max(10, (width - 18) // 4)  # columns
    ticks = "".join(f"{seconds * i / 4:<{quarter}.4g}" for i in range(4))
    ruler = ("|" + "-" * (quarter - 1)) * 4 + "|"
    rows = [title, "", f"client  {ticks}{seconds:.4g} s", " " * 8 + ruler]
    for number in shown:
        first, end = spans[number]
        waits = int((first or end) / seconds * 4 * quarter)
        served = max(1, round(end / seconds * 4 * quarter) - waits) if first else 0
        rows.append(f"{number + 1:6}  " + "." * waits + "#" * served)
    return "\n".join(rows)


def figures(times: list[float], seconds: float) -> str:
    """Return the number of messages, their rate, and how long an echo took, as a text."""
    text = f"{len(times):,} messages in {seconds:.4g} s: {len(times) / seconds:,.0f} a second"
    if times:
        slow = sorted(times)[math.ceil(len(times) * 0.99) - 1]
        text += f"\ntime to an echo: median {statistics.median(times) * 1000:,.2f} ms,"
        text += f" 99th percentile {slow * 1000:,.2f} ms, maximum {max(times) * 1000:,.2f} ms"
    return text


def run_many(args: argparse.Namespace) -> None:
    """Run many clients at once, and print what they saw. Raises OSError if there is no server."""
    address = socket.gethostbyname(args.host), args.port
    try:
        selector = DefaultSelector()
        clients = [Client(i, args.messages, args.size) for i in range(1, args.clients + 1)]
    except (MemoryError, OSError) as error:
        more = f"; first run: ulimit -n {args.clients + 50}" if errno.EMFILE in error.args else ""
        sys.exit(f"cannot run {args.clients} clients: {str(error) or 'out of memory'}{more}")
    start = run(clients, selector, address, args.pause)
    spans = [(max(0, client.first_echo_at - start), client.closed_at - start) for client in clients]
    end = max(end for _, end in spans)
    times = [seconds for client in clients for seconds in client.echo_times]
    width = shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else 72
    try:
        print(picture(spans, width), figures(times, end), sep="\n\n", flush=True)
    except OSError as error:
        sys.stdout = None  # or Python would try again at exit
        sys.exit(f"cannot write to stdout: {error}")
    problems = [client.problem for client in clients]
    if any(problems):
        lost, different = problems.count("lost"), problems.count("different")
        sys.exit(f"connections lost: {lost}, echoes that differ: {different}")


# ---- The command line

def main() -> None:
    """Run one client or many, as the command line says."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--host", default="127.0.0.1", help="the server's address (%(default)s)")
    parser.add_argument("--port", type=int, default=8088, help="the server's port (%(default)s)")
    many = parser.add_argument_group("many clients at once")
    many.add_argument("--clients", type=int, help="how many")
    many.add_argument("--messages", type=int, default=100, help="sent by each (%(default)s)")
    many.add_argument("--size", type=int, default=64, help="bytes in a message (%(default)s)")
    many.add_argument("--pause", type=float, default=0, help="seconds after an echo (%(default)s)")
    args = parser.parse_args()
    most = 512 if sys.platform == "win32" else 10**6  # the limit of select() on Windows
    limits = {"port": 65535, "clients": most, "messages": 10**9, "size": 10**9, "pause": 3600}
    for name, value in vars(args).items():
        low = 0 if name == "pause" else 1
        if name in limits and value is not None and not low <= value <= limits[name]:
            parser.error(f"--{name} must be {low} to {limits[name]}")
    talks = not args.clients and all(file and file.isatty() for file in (sys.stdin, sys.stdout))
    what = f"no server answers at {args.host}:{args.port}"
    hint = f"; start one: python select_server.py --port {args.port}"
    try:
        if args.clients:
            run_many(args)
        else:
            with socket.create_connection((args.host, args.port)) as sock:
                what, hint = f"connection to {args.host}:{args.port} lost", ""
                talk(sock) if talks else copy(sock)
    except KeyboardInterrupt:
        if sys.stderr:
            print(file=sys.stderr)
        sys.exit(0 if talks else 130)  # 130: interrupted
    except (OSError, UnicodeError) as error:
        sys.exit(f"{what}: {error}{hint}")


if __name__ == "__main__":
    main()
