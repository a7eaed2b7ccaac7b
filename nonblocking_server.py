"""Echo server, model 2: non-blocking IO.

No call ever sleeps: accept(), recv() and send() do what can be done at once, or
raise BlockingIOError. So one loop can ask everybody in turn, again and again.

    application                         kernel
    recv() ---------------------------> no data yet  -+
    BlockingIOError <------------------               |
      |  pauses                                       |  1. waiting for the data
    recv() ---------------------------> no data yet   |
    BlockingIOError <------------------               |
      |  pauses                         data is here -+
    recv() --------------------------->               |  2. copying it
    data <----------------------------- copied       -+

What it costs: every silent client is asked in every round. With a pause between
the rounds, data waits for as long as the pause lasts; without, a core is never idle.

    python nonblocking_server.py        and in a second terminal: python client.py
"""

import argparse
import errno
import logging
import math
import re
import socket
import sys
import time
from collections.abc import Iterator

CHUNK = 65536  # bytes: the most that is read at once, and so the most that a client is owed
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # accept: not one client more
Q = ord("q")  # bytes consist of numbers
QUIT = re.compile(rb"\nq\r?\n")  # a line that is just q

log = logging.getLogger(__name__)


class Conversation:
    """The rule of the conversation, apart from all IO: an echo, until the client says q."""

    def __init__(self) -> None:
        self.past = b"\n"  # the end of what was read; the first line starts like any other
        self.over = False

    def answer(self, data: bytes) -> bytes:
        """Take the bytes of one read; return those to send back, and set over after a q."""
        if self.over:  # what follows a q is ignored
            return b""
        if Q not in data and Q not in self.past:  # nearly always: no line can be just q
            self.past = data[-1:]
            return data
        if data == b"q":  # from a client that sends no newlines
            self.over = True
            return b""
        text = self.past + data
        said_q = QUIT.search(text)
        if said_q:
            self.over = True
            return data[: max(0, said_q.start() + 1 - len(self.past))]
        self.past = text[-3:]  # QUIT is four bytes at most, so three are all that it can need
        return data


class Connection:
    """One client: its socket, the conversation with it, and what it is still owed."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.name = name
        self.conversation = Conversation()
        self.owed = b""  # empty: it waits to be readable; else to be writable, and is not read
        self.left = False

    def step(self) -> bool:
        """Send what is owed, or else read once and answer; set left when the client has left.

        Never sleeps. Returns False if the kernel was not ready, so that nothing could be done.
        """
        try:
            if not self.owed:
                data = self.sock.recv(CHUNK)  # copies the data, if there is any
                if log.level <= logging.INFO:  # with --quiet, not even a call
                    log.info("%s read %d bytes: %.50r", self.name, len(data), data)
                if not data:
                    raise ConnectionError("end of stream")
                self.owed = self.conversation.answer(data)
            if self.owed:
                sent = self.sock.send(self.owed)  # as much as the kernel has room for
                self.owed = self.owed[sent:]
            if self.conversation.over and not self.owed:
                # The client is told the end, and closes. To close first, on bytes that are
                # not read yet, would reset the connection: the last echo could be lost.
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return False
        except OSError as error:
            self.left = True
            log.info("%s left: %s", self.name, "said q" if self.conversation.over else error)
        return True


def accept(listener: socket.socket) -> Iterator[Connection]:
    """Take the clients that wait in the listener's queue, and yield their connections.

    Never sleeps. Raises OSError if no file descriptor is left for the next one.
    """
    for _ in range(100):  # no more in one turn: those who are in have theirs
        try:
            sock, (host, port) = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in FULL:
                log.info("full (%s): the next clients wait in the queue", error)
                raise
            continue  # that client has left already
        sock.setblocking(False)
        connection = Connection(sock, f"{host}:{port}")
        log.info("%s connected", connection.name)
        yield connection


def serve(listener: socket.socket, interval: float) -> None:
    """Serve all clients of a listening socket from one loop, for ever.

    Pauses for interval seconds after a round that found nothing to do. Raises OSError if
    no file descriptor is left, not even for one client.
    """
    listener.setblocking(False)
    connections: list[Connection] = []
    room = math.inf  # how many clients fit in; known as soon as one does not
    while True:
        idle = True
        if len(connections) < room:
            try:
                for newcomer in accept(listener):
                    idle = False
                    connections.append(newcomer)
                    if len(connections) >= room:
                        break
            except OSError:
                if not connections:
                    raise
                room = len(connections)
        for connection in connections:
            if connection.step():
                idle = False
            if connection.left:
                connection.sock.close()
        connections = [connection for connection in connections if not connection.left]
        if idle and interval:  # sleep(0) would sleep too, for a moment
            time.sleep(interval)


def seconds(text: str) -> float:
    """Return the number of seconds, 0 to 3600, that text says. Raises ValueError."""
    number = float(text)
    if not 0 <= number <= 3600:
        raise ValueError(text)
    return number


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the options that all the servers have."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # a mistake gets one line
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8088, help="0 is any free one (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no log")
    return parser


def listen(args: argparse.Namespace, model: str) -> socket.socket:
    """Return the listening socket that the command line asks for, and say so on stdout.

    Exits with one line on stderr if the address cannot be had.
    """
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        listener = socket.create_server((args.host, args.port), backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        sys.exit(f"cannot listen on {args.host}:{args.port}: {error}")
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # for all it accepts
    host, port = listener.getsockname()
    try:
        print(f"listening on {host}:{port} ({model})", flush=True)
    except OSError:
        sys.stdout = None  # nobody reads it, and the clients shall not notice
    return listener


def main() -> None:
    """Listen where the command line says, and serve until Ctrl-C."""
    parser = command_line()
    parser.add_argument(
        "--interval",
        type=seconds,
        default=0.01,
        help="pause after a round in vain, in seconds (%(default)s)",
    )
    args = parser.parse_args()
    try:
        with listen(args, f"non-blocking IO, asks every {args.interval:g} s") as listener:
            serve(listener, args.interval)
    except KeyboardInterrupt:
        log.warning("stopped")
    except OSError as error:
        sys.exit(f"cannot go on: {error}")


if __name__ == "__main__":
    main()
