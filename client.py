"""Client for the echo servers: one client in conversation, or many at once.

    python client.py                    a line goes out, its echo comes back; q ends it
    python client.py < file             sends the file, and writes what comes back
    python client.py --clients 100      100 clients at once: draws when each was served

Start a server first, in another terminal: python select_server.py
"""

import argparse
import shutil
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, suppress
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector

CHUNK = 65536  # bytes: the most that is read at once


# One client


def says_q(line: bytes) -> bool:
    """Return whether a line, with its newline if it has one, ends the conversation."""
    return line in (b"q\n", b"q\r\n", b"q")


def receive(sock: socket.socket, size: int) -> bytes:
    """Return the next size bytes, in however many pieces they arrive.

    Raises ConnectionError if the server closes before.
    """
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionError("it closed the connection")
        data += piece
    return data


def talk(sock: socket.socket) -> None:
    """Talk to the server at the terminal: a line goes out, its echo is printed.

    Raises OSError if the server goes away.
    """
    while True:
        print(">>> ", end="", flush=True)
        line = sys.stdin.buffer.readline()
        if not line:  # Ctrl-D
            print()
            return
        if says_q(line):
            sock.sendall(b"q\n")
            return
        sock.sendall(line)
        sys.stdout.buffer.write(receive(sock, len(line)))


def copy(sock: socket.socket) -> None:
    """Send stdin, up to a line that says q, and meanwhile write what comes back to stdout.

    To send it all and then read would be a deadlock: when the buffers on the way are full,
    neither side reads. So a thread sends. Raises OSError if the server goes away.
    """
    sent = received = 0
    complete = False

    def send() -> None:
        nonlocal sent, complete
        with open(sys.stdin.fileno(), "rb", closefd=False) as stdin, suppress(OSError):
            for line in stdin:
                if says_q(line):
                    complete = True
                    sock.sendall(b"q\n")
                    break
                sent += len(line)
                sock.sendall(line)
            complete = True
            sock.shutdown(socket.SHUT_WR)

    threading.Thread(target=send, daemon=True).start()
    while data := sock.recv(CHUNK):
        received += len(data)
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
        except OSError as error:
            sys.stdout = None  # with what it could not write
            sys.exit(f"cannot write what came back: {error}")
    if not complete or received < sent:
        raise ConnectionError("it closed the connection")


# Many clients at once

DONE, PAUSE = -1, 0  # what a client may want besides the events of its socket
Steps = Generator[int, None, None]  # a client: does a step, yields what it waits for


class Crowd:
    """Many clients in one process, and what they saw; all times are in seconds."""

    def __init__(self, clients: int, messages: int, size: int, pause: float) -> None:
        self.clients = clients
        self.messages = messages
        self.size = size
        self.pause = pause
        self.start = 0.0
        self.first_echo = [0.0] * clients  # after the start; 0: there was none
        self.end = [0.0] * clients  # after the start
        self.echo_times: list[float] = []  # from each message to its echo
        self.different = 0  # echoes that were not what was sent
        self.lost = 0  # connections that broke

    def run(self, address: tuple[str, int], progress: bool = False) -> None:
        """Be all the clients of the server at address, until they are through.

        Raises ConnectionRefusedError if there is no server, and another OSError if this
        process may not open so many files.
        """
        with ExitStack() as stack:
            selector = stack.enter_context(DefaultSelector())
            socks = [stack.enter_context(socket.socket()) for _ in range(self.clients)]
            self.start = time.perf_counter()
            pausing = deque(  # until when, and who; at first everybody, until now
                (self.start, sock, self.steps(number, sock, address))
                for number, sock in enumerate(socks)
            )

            def go_on(sock: socket.socket, steps: Steps, awaited: int) -> None:
                """Let a client do its next step, and see that it gets what it wants then."""
                wanted = next(steps, DONE)
                if wanted == awaited:
                    return
                if awaited != PAUSE:
                    selector.unregister(sock)
                if wanted == PAUSE:
                    pausing.append((time.perf_counter() + self.pause, sock, steps))
                elif wanted == DONE:
                    sock.close()
                else:
                    selector.register(sock, wanted, (sock, steps, wanted))

            report_at = self.start + 1
            while pausing or selector.get_map():
                now = time.perf_counter()
                while pausing and pausing[0][0] <= now:
                    _, sock, steps = pausing.popleft()
                    go_on(sock, steps, PAUSE)
                if progress and now >= report_at:
                    report_at = now + 0.2
                    self.report(now)
                timeout = min(0.2, pausing[0][0] - now) if pausing else 0.2
                for key, _ in selector.select(timeout):
                    go_on(*key.data)
            if report_at > self.start + 1:
                print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)

    def steps(self, number: int, sock: socket.socket, address: tuple[str, int]) -> Steps:
        """Be one of the clients: connect, send the messages, say q, wait for the close."""
        text = b"client %d, " % number * (self.size // 8 + 2)
        try:
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.connect(address)
            yield EVENT_WRITE
            for count in range(self.messages):
                if count and self.pause:
                    yield PAUSE
                message = text[count % 8 : count % 8 + self.size - 1] + b"\n"
                sent_at = time.perf_counter()
                echo = yield from exchange(sock, message)
                echo_at = time.perf_counter()
                if echo != message:
                    self.different += 1
                    return
                self.echo_times.append(echo_at - sent_at)
                if not count:
                    self.first_echo[number] = echo_at - self.start
            sock.send(b"q\n")
            yield EVENT_READ
            if sock.recv(CHUNK):
                self.different += 1
        except ConnectionRefusedError:
            raise
        except OSError:
            self.lost += 1
        finally:
            self.end[number] = time.perf_counter() - self.start

    def report(self, now: float) -> None:
        """Write the line of progress to the terminal, over the one before."""
        messages = f"{len(self.echo_times)} of {self.clients * self.messages} messages"
        print(f"\r{now - self.start:.0f} s: {messages} ", end="", file=sys.stderr, flush=True)

    def picture(self, width: int) -> str:
        """Return the picture, width columns wide: a row a client, time from left to right."""
        title = ". waits for its first echo   # is served"
        shown = list(range(self.clients))
        if self.clients > 20:
            shown = [round(i * (self.clients - 1) / 19) for i in range(20)]
            title += f"\n20 of the {self.clients} clients, evenly chosen"
        seconds = max(self.end)
        quarter = max(8, (width - 18) // 4)  # columns
        ticks = "".join(f"{seconds * i / 4:<{quarter}.4g}" for i in range(4))
        ruler = ("|" + "-" * (quarter - 1)) * 4 + "|"
        rows = [title, "", f"client  {ticks}{seconds:.4g} s", " " * 8 + ruler]
        for number in shown:
            first, end = self.first_echo[number], self.end[number]
            waits = int((first or end) / seconds * 4 * quarter)
            served = max(1, round(end / seconds * 4 * quarter) - waits) if first else 0
            rows.append(f"{number + 1:6}  " + "." * waits + "#" * served)
        return "\n".join(rows)

    def figures(self) -> str:
        """Return the number of messages, their rate, and how long an echo took."""
        count, seconds = len(self.echo_times), max(self.end)
        lines = [f"{count:,} messages in {seconds:.4g} s: {count / seconds:,.0f} a second"]
        if count:
            times = sorted(self.echo_times)
            lines.append(
                f"time to an echo: median {statistics.median(times) * 1000:,.2f} ms,"
                f" 99th percentile {times[count * 99 // 100] * 1000:,.2f} ms,"
                f" maximum {times[-1] * 1000:,.2f} ms"
            )
        return "\n".join(lines)


def exchange(sock: socket.socket, message: bytes) -> Generator[int, None, bytes]:
    """Send a message and return its echo; yield the events to wait for.

    Raises OSError if the connection breaks.
    """
    sent = sock.send(message)
    echo = b""
    while len(echo) < len(message):
        yield EVENT_READ if sent == len(message) else EVENT_READ | EVENT_WRITE
        if sent < len(message):
            with suppress(BlockingIOError):
                sent += sock.send(memoryview(message)[sent:])
        try:
            data = sock.recv(CHUNK)
        except BlockingIOError:
            continue
        if not data:
            raise ConnectionError("it closed the connection")
        echo += data
    return echo


def be_many(address: tuple[str, int], crowd: Crowd) -> None:
    """Be a crowd at address, and print what it saw.

    Raises OSError if there is no server. Exits if this process may not open so many files,
    or, at the end, with status 1 if an echo was wrong or a connection lost.
    """
    try:
        crowd.run(address, progress=sys.stderr.isatty())
    except ConnectionRefusedError:
        raise
    except (OSError, ValueError) as error:
        more = crowd.clients + 50
        sys.exit(f"cannot be {crowd.clients} clients: {error}; first say: ulimit -n {more}")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 72
    print(crowd.picture(width), crowd.figures(), sep="\n\n")
    if crowd.lost or crowd.different:
        sys.exit(f"connections lost: {crowd.lost}, echoes that differ: {crowd.different}")


# The command line


def port(text: str) -> int:
    """Return the port number that text says. Raises ValueError."""
    number = int(text)
    if not 1 <= number <= 65535:
        raise ValueError(text)
    return number


def count(text: str) -> int:
    """Return the number, 1 or more, that text says. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def seconds(text: str) -> float:
    """Return the number of seconds, 0 to 3600, that text says. Raises ValueError."""
    number = float(text)
    if not 0 <= number <= 3600:
        raise ValueError(text)
    return number


def main() -> None:
    """Be one client or many, as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # a mistake gets one line
    )
    parser.add_argument("--host", default="127.0.0.1", help="of the server (%(default)s)")
    parser.add_argument("--port", type=port, default=8088, help="of the server (%(default)s)")
    many = parser.add_argument_group("many clients at once")
    for option, kind, default, meaning in (
        ("--clients", count, None, "how many"),
        ("--messages", count, 100, "that each client sends (%(default)s)"),
        ("--size", count, 64, "of a message, in bytes (%(default)s)"),
        ("--pause", seconds, 0, "of a client between its messages, in seconds (%(default)s)"),
    ):
        many.add_argument(option, type=kind, default=default, help=meaning)
    args = parser.parse_args()
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not args.clients
    try:
        if args.clients:
            address = socket.gethostbyname(args.host), args.port
            be_many(address, Crowd(args.clients, args.messages, args.size, args.pause))
        else:
            with socket.create_connection((args.host, args.port)) as sock:
                talk(sock) if at_terminal else copy(sock)
    except (OSError, UnicodeError) as error:
        hint = f"start one: python select_server.py --port {args.port}"
        sys.exit(f"no server answers at {args.host}:{args.port}: {error}; {hint}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        if not at_terminal:
            sys.exit(130)  # cut short


if __name__ == "__main__":
    main()
