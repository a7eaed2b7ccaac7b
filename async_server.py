"""Echo server, model 5: asynchronous IO, with asyncio.

The program hands over the read and is told when the data has arrived *and* is
copied. Meanwhile it does something else: each client has a coroutine, which reads
like the blocking server, with an await before what waits.

    application                         kernel
    await sock_recv() ----------------> no data yet  -+
      |                                               |  1. waiting for the data
      |  the others' coroutines run     data is here -+
      |                                               |  2. copying it
    data <----------------------------- copied       -+

Honestly: so it is on Windows (IOCP). On Linux and macOS the event loop is a selector,
as in selectors_server.py; it waits, then copies, and only the coroutine does not see it.
What it costs: the loop's bookkeeping, so more CPU for a message than a bare selector.

    python async_server.py              and in a second terminal: python client.py
"""

import argparse
import asyncio
import errno
import functools
import logging
import math
import re
import signal
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


async def converse(connection: socket.socket, name: str) -> None:
    """Echo what a client sends until it says q, ends its stream or is lost; then close."""
    loop = asyncio.get_running_loop()
    conversation = Conversation()
    reason = "end of stream"
    with connection:
        try:
            while not conversation.over:
                data = await loop.sock_recv(connection, CHUNK)
                if log.level <= logging.INFO:  # with --quiet, not even a call
                    log.info("%s read %d bytes: %.50r", name, len(data), data)
                if not data:
                    break
                await loop.sock_sendall(connection, conversation.answer(data))
                await asyncio.sleep(0)  # who had no need to wait lets the others go on
            # Tell the client the end, and let it close. To close first, on bytes that are
            # not read yet, would reset the connection: the last echo could be lost.
            connection.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(connection, CHUNK):
                await asyncio.sleep(0)
        except OSError as error:
            reason = str(error)
    log.info("%s left: %s", name, "said q" if conversation.over else reason)


async def serve(args: argparse.Namespace) -> None:
    """Listen, and serve all clients, each by a task of its own, for ever.

    Raises OSError if no file descriptor is left, not even for one client.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    room = math.inf  # how many clients fit in; known as soon as one does not
    # Ctrl-C would stop whichever coroutine is at work; let the loop stop between two steps.
    interrupt = functools.partial(signal.default_int_handler, signal.SIGINT, None)
    signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(interrupt))
    with listen(args, "asyncio") as listener:
        listener.setblocking(False)
        while True:
            if len(tasks) >= room:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            try:
                connection, (host, port) = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in FULL:
                    log.info("full (%s): the next clients wait in the queue", error)
                    if not tasks:
                        raise
                    room = len(tasks)
                continue  # else: that client has left already
            name = f"{host}:{port}"
            log.info("%s connected", name)
            task = loop.create_task(converse(connection, name))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if len(tasks) % 100 == 0:
                await asyncio.sleep(0)  # those who are in have their turn


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
        asyncio.run(serve(args))
    except KeyboardInterrupt:
        log.warning("stopped")
    except OSError as error:
        sys.exit(f"cannot go on: {error}")


if __name__ == "__main__":
    main()
