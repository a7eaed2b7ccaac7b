"""Echo server with I/O multiplexing, by select: model 3 of Stevens' five I/O models.

Receiving has two phases, (1) waiting for data and (2) copying it from the kernel to the program.
One call, select(), does the waiting for many sockets: it blocks until at least one is ready. Then
recv() immediately returns data or, at the end of the stream, b"", or raises an error.

    application                         kernel               A     B     C    (receive buffers)
    select([A, B, C]) --------------->  no data yet          -     -     -   -+
      |  blocked                        data for B arrives   -   data    -    |  (1) waiting
    [B] <-----------------------------  B is readable        -   data    -   -+  for data
    recv(B) ------------------------->  copies it            -     -     -      (2) copying it
    send(B) ------------------------->  copies it into the send buffer of B
    select([A, B, C]) --------------->  the whole list again

Cost: application and kernel go through the whole list in each call, even if only one socket is
ready. And there is a limit, because select() uses tables of a fixed size (FD_SETSIZE): for file
descriptors (the numbers of open sockets or files) 0 to 1023; on Windows, for 512 sockets.

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

if sys.platform != "win32":
    import resource

log = logging.getLogger(__name__)


# ---- The model

def serve(listener: socket.socket) -> None:
    """Serve all clients of a listening socket from one loop, forever."""
    lower_file_limit()  # a file descriptor of 1024 or above would be too high for select()
    listener.setblocking(False)  # ready is a hint: the client may be gone, and accept() could block
    connections: dict[int, Connection] = {}  # by file descriptor
    full = False  # True while there is no room: new clients then wait in the backlog
    while True:
        # A socket is nearly always writable: send() takes some bytes or, after a reset, fails. If
        # all were in writers, select() would never block. So only those with unsent bytes are.
        readers = [fd for fd, connection in connections.items() if not connection.unsent]
        writers = [fd for fd, connection in connections.items() if connection.unsent]
        if not full:  # the listener of a full server stays readable, and select() would not block
            readers.append(listener.fileno())
        readable, writable, _ = select.select(readers, writers, [])  # blocks until any is ready
        for fd in readable + writable:  # none is in both: one turn each, so nobody waits long
            if fd == listener.fileno():  # it is readable: a client is in the backlog
                new, full = accept_client(listener, len(connections))
                if new:
                    connections[new.sock.fileno()] = new
                    full = select_is_full(len(connections))
            else:
                connection = connections[fd]
                connection.handle()
                if connection.end_reason:
                    del connections[fd]
                    connection.close()
                    full = False


# ---- A client: the same in nonblocking, select, epoll and selectors

RECV_SIZE = 65536  # bytes: the most that one recv() returns
# What accept() raises if no file descriptor or no memory is left:
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Connection:
    """One client: its non-blocking socket, its conversation, and the bytes still unsent."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.name = name
        self.conversation = Conversation()
        self.unsent = b""  # the part of the last reply that did not fit into the send buffer
        self.end_reason = ""  # empty while the connection is open

    def handle(self) -> bool:
        """Send unsent bytes or, if there are none, receive. Return False if that would block."""
        try:
            # Backpressure: while bytes for a client are unsent, we do not receive from it. Then
            # its data fills the kernel's buffers, not our memory, until the client's send() blocks.
            if self.unsent:
                self.send()
            else:
                self.receive()
        except BlockingIOError:
            return False  # only nonblocking_server.py uses the result
        except OSError as error:  # often a reset by the client
            self.end_reason = str(error)
        return True

    def receive(self) -> None:
        """Receive once and send the reply. Raise OSError if that would block or fails."""
        data = self.sock.recv(RECV_SIZE)  # (2) copies the data
        if not data:  # the client's end of stream
            self.end_reason = "quit" if self.conversation.finished else "end of stream"
        elif not self.conversation.finished:  # data after a q is ignored
            log.info("%s: received %d bytes: %r", self.name, len(data), data[:50])
            self.unsent = self.conversation.reply(data)
            self.send()  # even if the reply is empty: after a q, this ends our direction

    def send(self) -> None:
        """Send the unsent bytes that fit into the send buffer. Raise OSError if none do."""
        sent = self.sock.send(self.unsent)
        self.unsent = self.unsent[sent:]
        if self.conversation.finished and not self.unsent:
            # Half-close: shutdown() ends only our direction. The client gets every reply, then the
            # end of stream, and closes when it likes. If we closed instead, data that is unread or
            # still to come could cause a reset (an abort), and replies in transit could be lost.
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket, and log why."""
        self.sock.close()
        log.info("%s: closed (%s)", self.name, self.end_reason)


def accept_client(listener: socket.socket, clients: int) -> "tuple[Connection | None, bool]":
    """Return a new connection or None, and whether to stop accepting until a client leaves."""
    try:
        sock, address = listener.accept()
    except (BlockingIOError, ConnectionError):  # no client is waiting, or it is already gone
        return None, False
    except OSError as error:
        if clients and error.errno in OUT_OF_RESOURCES:
            log.info("full (%s): new clients will have to wait", error)
            return None, True
        log.info("cannot accept (%s): trying again in a second", error)
        time.sleep(1)  # stalls all clients, but a lasting error must not keep a core busy
        return None, False
    sock.setblocking(False)  # otherwise send() would block until there is room for the whole reply
    host, port = address or ("?", "?")  # macOS: no address if the client is already gone
    log.info("%s:%s: connected", host, port)
    return Connection(sock, f"{host}:{port}"), False


# ---- The limit of select()

def lower_file_limit() -> None:
    """Make the kernel refuse a file descriptor that is too high for select(): accept() fails."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))


def select_is_full(clients: int) -> bool:
    """On Windows, return whether select() can watch no more. Elsewhere, accept() then fails."""
    if sys.platform != "win32" or clients < 511:  # and the listener: 512
        return False
    log.info("full (select: 512 sockets): new clients will have to wait")
    return True


# ---- The conversation: the same in all servers

class Conversation:
    """The echo protocol without any I/O (sans-I/O): bytes in, bytes out, until a q."""

    def __init__(self) -> None:
        self.tail = b"\n"  # the last bytes received; at first, as if a line had just ended
        self.filled = False  # True if the last recv() returned its maximum: a q may end a message
        self.finished = False  # True after a q line, or a q alone

    def reply(self, data: bytes) -> bytes:
        """Return the reply to the bytes of one recv()."""
        if data == b"q" and not self.filled:  # alone: sent without newlines, or split off
            self.finished = True
            return b""
        # TCP may split a q line: b"a\nq" is already echoed, and in the tail, when b"\n" arrives.
        # Joined, they match, and nothing is sent back. Looking for b"q" is quicker than a search.
        joined = self.tail + data
        if b"q" in joined and (quit_line := re.search(rb"\n(q\r?\n)", joined)):
            self.finished = True
            return joined[len(self.tail) : quit_line.start(1)]
        self.tail = joined[-3:]  # as long as an unfinished q line can be: b"\nq\r"
        self.filled = len(data) == RECV_SIZE
        return data


# ---- The command line

def main() -> None:
    """Parse the command line, then listen and serve until Ctrl-C, which ends all connections."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8088, help="0: any free port (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="do not log clients")
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # a blocking call on a socket ignores Ctrl-C there
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # now Ctrl-C ends us (cpython issue 85609)
    try:
        listener = socket.create_server((args.host, args.port), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no Nagle delay; inherited
        host, port = listener.getsockname()
        print(f"listening on {host}:{port} (select)", flush=True)
    except (OSError, OverflowError, TypeError) as error:  # TypeError: bad --host
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")
    with listener:
        serve(listener)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        log.warning("stopped")  # clients see the end of the stream, or a reset
