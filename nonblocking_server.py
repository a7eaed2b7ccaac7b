"""Echo server, model 2 of 5: non-blocking I/O.

No call waits: accept(), recv() and send() do what is possible at once, or else raise
BlockingIOError (EAGAIN). So one thread can ask all sockets, again and again. This is
called polling.

    application                         kernel             A    B    C  (receive buffers)
    recv(A), recv(B), recv(C) ------->  no data yet        -    -    -  -+
    BlockingIOError, three times <----                                   |  1. waiting for data
      |  sleeps for the interval                           -   data  -   |
    recv(A) ------------------------->  no data yet        -   data  -   |
    BlockingIOError <-----------------                                  -+
    recv(B), send(B) ---------------->  copies the data    -    -    -      2. copying it
    recv(C) ------------------------->  no data yet        -    -    -
    BlockingIOError <-----------------

Cost: a system call for each silent client in each round. While the server sleeps between
two rounds, data waits; with --interval 0 it never sleeps (busy-waiting), and one CPU core
is never idle.

    python nonblocking_server.py        and in a second terminal: python client.py
    Read next: select_server.py, where the kernel waits for all sockets at once.
"""

import argparse
import errno
import logging
import re
import signal
import socket
import sys
import time

RECV_SIZE = 65536  # bytes: the most that one recv() returns
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # from accept()
QUIT_LINE = re.compile(rb"\n(q\r?\n)")  # a line that is just q
log = logging.getLogger(__name__)


# ---- The model

def serve(listener: socket.socket, interval: float) -> None:
    """Serve all clients of a listening socket from one loop, without end.

    Sleeps for interval seconds after a round in which no socket was ready.
    """
    listener.setblocking(False)
    connections: list[Connection] = []
    full = False  # no room for another client: the next ones wait in the backlog
    while True:
        idle = True
        if not full:
            try:
                if new := accept(listener):  # None if no client waits
                    connections.append(new)
                    idle = False
            except OSError as error:
                log.info("full (%s): the next clients wait in the backlog", error)
                if connections:
                    full = True  # until a client leaves
                else:
                    time.sleep(1)  # a shortage can pass: try again
        for connection in list(connections):  # a copy, because some may be removed
            if connection.on_ready():  # False if recv() or send() raised BlockingIOError
                idle = False
            if connection.closed:
                connections.remove(connection)
                connection.sock.close()
                log.info("%s: closed (%s)", connection.name, connection.closed)
                full = False
        if idle and interval:
            time.sleep(interval)  # data that arrives now has to wait


# ---- A client: the same in nonblocking, select, epoll and selectors

class Connection:
    """One client: its non-blocking socket, its conversation, and the bytes still unsent."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.name = name
        self.conversation = Conversation()
        self.unsent = b""  # the part of the last reply that did not fit into the send buffer
        self.closed = ""  # empty while the connection is open, then the reason why it is not

    def on_ready(self) -> bool:
        """Send what is unsent, else read once and reply. Returns False if a call would wait."""
        try:
            # Backpressure: while bytes are unsent, the client is not read. So what it sends fills
            # the kernel's buffers, not our memory, until its own send() has to wait.
            if not self.unsent:
                data = self.sock.recv(RECV_SIZE)  # copies the data
                log.info("%s: read %d bytes: %r", self.name, len(data), data[:50])
                if not data:
                    self.closed = "quit" if self.conversation.finished else "end of stream"
                if not data or self.conversation.finished:  # what follows a q is ignored
                    return True
                self.unsent = self.conversation.reply(data)
            if self.unsent:
                sent = self.sock.send(self.unsent)  # copies as much as the send buffer takes
                self.unsent = self.unsent[sent:]
            if self.conversation.finished and not self.unsent:
                # Half-close: shutdown() ends our direction only. The client gets every reply, then
                # the end of stream, and closes. After close(), what it still sends would cause a
                # reset: the kernel breaks the connection off; replies on their way can be lost.
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return False  # used only by nonblocking_server.py
        except OSError as error:  # a reset: the client has broken the connection off
            self.closed = str(error)
        return True


def accept(listener: socket.socket) -> "Connection | None":
    """Return the next client's connection, or None if none waits. Raises OSError if full."""
    try:
        sock, address = listener.accept()
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise
        return None  # BlockingIOError: no client waits; any other: that client has gone
    if not address:  # macOS: None if that client has gone
        sock.close()
        return None
    sock.setblocking(False)  # or send() would wait until there is room for the whole reply
    log.info("%s:%d: connected", *address)
    return Connection(sock, "{}:{}".format(*address))


# ---- The conversation: the same in all servers

class Conversation:
    """The rule of the conversation, sans-I/O (bytes in, bytes out, no socket): echo until q."""

    def __init__(self) -> None:
        self.tail = b"\n"  # the end of what was read; at first, as if a line had just ended
        self.cut = False  # True if the last read was RECV_SIZE long: a message may go on after it
        self.finished = False  # True after a quit line, or a q alone

    def reply(self, data: bytes) -> bytes:
        """Take the bytes of one read, and return the bytes to send back."""
        if data == b"q" and not self.cut:  # alone: from a client that sends no newlines
            self.finished = True
            return b""
        text = self.tail + data
        quit_line = QUIT_LINE.search(text) if text.find(b"q") >= 0 else None  # find() is quick
        if quit_line:
            self.finished = True
            return data[: max(0, quit_line.start(1) - len(self.tail))]  # what is before the q
        self.tail = text[-3:]  # may hold the start of a quit line that TCP has cut
        self.cut = len(data) == RECV_SIZE
        return data


# ---- The command line: the same in all servers

def main() -> None:
    """Listen where the command line says, and serve until Ctrl-C."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8088, help="0: any free port (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="do not log clients")
    text = "how long to sleep after a round in which no socket was ready (%(default)s s)"
    parser.add_argument("--interval", type=float, default=0.01, help=text)
    args = parser.parse_args()
    if not 0 <= args.interval <= 3600:
        parser.error("--interval must be from 0 to 3600 seconds")
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # else Ctrl-C waits until a client comes (cpython issue 85609)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with socket.create_server((args.host.encode(), args.port), backlog=1024) as listener:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # send replies at once
            host, port = listener.getsockname()
            print(f"listening on {host}:{port} (non-blocking, every {args.interval} s)", flush=True)
            serve(listener, args.interval)
    except KeyboardInterrupt:
        log.warning("stopped")
    except (OSError, OverflowError, UnicodeError) as error:
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")


if __name__ == "__main__":
    main()
