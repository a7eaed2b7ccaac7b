"""Echo server, model 3 of 5: I/O multiplexing, with select.

One call, select(), waits for many sockets at once, and returns those that are ready:
recv() and send() on them do not wait. So one thread serves all clients.

    application                         kernel             A    B    C  (receive buffers)
    select([A, B, C]) --------------->  waits              -    -    -  -+
      |                                                    -   data  -   |  1. waiting for data
    [B] <-----------------------------  B is readable      -   data  -  -+
    recv(B) ------------------------->  copies the data    -    -    -      2. copying it
    send(B) ------------------------->  copies it into the send buffer of B
    select([A, B, C]) --------------->  waits: the whole list again

Cost: application and kernel go through the whole list each time, even if only one socket
is ready. And there is a limit: select() cannot watch a file descriptor of 1024 or above.

    python select_server.py             and in a second terminal: python client.py
    Read next: epoll_server.py, where the kernel keeps the list.
"""

import argparse
import errno
import logging
import re
import select
import signal
import socket
import sys
import time

RECV_SIZE = 65536  # bytes: the most that one recv() returns
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # from accept()
QUIT_LINE = re.compile(rb"\n(q\r?\n)")  # a line that is just q
log = logging.getLogger(__name__)


# ---- The model

def serve(listener: socket.socket) -> None:
    """Serve all clients of a listening socket from one loop, without end."""
    listener.setblocking(False)
    connections: dict[int, Connection] = {}  # by file descriptor
    full = False  # no room for another client: the next ones wait in the backlog
    while True:
        # A socket is nearly always writable: its send buffer has room. If select() watched all
        # of them for that, it would never wait. So it watches only those with unsent bytes.
        readers = [fd for fd, connection in connections.items() if not connection.unsent]
        writers = [fd for fd, connection in connections.items() if connection.unsent]
        if not full:
            readers.append(listener.fileno())
        readable, writable, _ = select.select(readers, writers, [])  # waits
        for fd in readable + writable:
            if fd == listener.fileno():
                try:
                    check_limit([fd, *connections])
                    if new := accept(listener):
                        connections[new.sock.fileno()] = new
                except (OSError, ValueError) as error:
                    log.info("full (%s): the next clients wait in the backlog", error)
                    if connections:
                        full = True  # until a client leaves
                    else:
                        time.sleep(1)  # a shortage can pass: try again
            else:
                connection = connections[fd]
                connection.on_ready()
                if connection.closed:
                    del connections[fd]
                    connection.sock.close()
                    log.info("%s: closed (%s)", connection.name, connection.closed)
                    full = False


def check_limit(fds: list[int]) -> None:
    """Raise ValueError if select() cannot watch these file descriptors and a new one."""
    # It cannot watch one of 1024 or above (on Windows, more than 512 sockets). A new one is
    # the lowest that is free: the probe gets the number that the next client will get.
    with socket.socket() as probe:
        select.select([*fds, probe.fileno()], [], [], 0)


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
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # else Ctrl-C waits until a client comes (cpython issue 85609)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with socket.create_server((args.host.encode(), args.port), backlog=1024) as listener:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # send replies at once
            host, port = listener.getsockname()
            print(f"listening on {host}:{port} (select)", flush=True)
            serve(listener)
    except KeyboardInterrupt:
        log.warning("stopped")
    except (OSError, OverflowError, UnicodeError) as error:
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")


if __name__ == "__main__":
    main()
