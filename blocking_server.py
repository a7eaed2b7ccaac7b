"""Echo server, model 1: blocking IO.

Every call sleeps until it is done: accept() until a client is there, recv() until
data is there, sendall() until the kernel has taken all of it.

    application                         kernel
    recv() ---------------------------> no data yet  -+
      |                                               |  1. waiting for the data
      |  sleeps                         data is here -+
      |                                               |  2. copying it
    data <----------------------------- copied       -+

What it costs: nothing while it sleeps, but who sleeps for one client serves no
other. The kernel connects the others and queues them until this one has left.

    python blocking_server.py           and in a second terminal: python client.py
"""

import argparse
import errno
import logging
import re
import socket
import sys

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


def converse(connection: socket.socket, name: str) -> None:
    """Echo what a client sends until it says q, ends its stream or is lost; then close."""
    conversation = Conversation()
    reason = "end of stream"
    with connection:
        try:
            while not conversation.over:
                data = connection.recv(CHUNK)  # sleeps: waits for the data, copies it
                if log.level <= logging.INFO:  # with --quiet, not even a call
                    log.info("%s read %d bytes: %.50r", name, len(data), data)
                if not data:
                    break
                connection.sendall(conversation.answer(data))  # sleeps while the kernel has no room
            # Tell the client the end, and let it close. To close first, on bytes that are
            # not read yet, would reset the connection: the last echo could be lost.
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(1)  # the next one is waiting
            while connection.recv(CHUNK):
                pass
        except OSError as error:
            reason = str(error)
    log.info("%s left: %s", name, "said q" if conversation.over else reason)


def serve(listener: socket.socket) -> None:
    """Serve the clients of a listening socket, one after the other, for ever.

    Raises OSError if no file descriptor is left for a client.
    """
    while True:
        try:
            connection, (host, port) = listener.accept()  # sleeps until a client is there
        except OSError as error:
            if error.errno in FULL:
                raise
            continue  # that client has left already
        name = f"{host}:{port}"
        log.info("%s connected", name)
        converse(connection, name)


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
    args = command_line().parse_args()
    try:
        with listen(args, "blocking IO") as listener:
            serve(listener)
    except KeyboardInterrupt:
        log.warning("stopped")
    except OSError as error:
        sys.exit(f"cannot go on: {error}")


if __name__ == "__main__":
    main()
