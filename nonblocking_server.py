"""Echo server with non-blocking I/O: model 2 of Stevens' five I/O models.

Receiving has two phases, (1) waiting for data and (2) copying it from the kernel to the program.
A non-blocking recv() does only the second: if there is no data, it raises BlockingIOError (the
kernel says EAGAIN). accept() and send() never block either, so one thread can try every socket in
turn, again and again. This is polling.

    application                         kernel               A     B     C    (receive buffers)
    recv(A), recv(B), recv(C) ------->  no data yet          -     -     -   -+
    BlockingIOError, three times <----                                        |  (1) waiting
      |  sleeps                         data for B arrives   -   data    -   -+  for data
      |                                                      -   data    -      then a delay,
    recv(A) ------------------------->  no data yet          -   data    -      the cost of polling
    BlockingIOError <-----------------
    recv(B) ------------------------->  copies it            -     -     -      (2) copying it
    send(B) ------------------------->  copies it into the send buffer of B
    recv(C), and so on

Cost: one system call per silent client per round, and data that arrives while the server sleeps
has to wait. With --interval 0 the server never sleeps (busy-waiting) and keeps one core busy.

    python nonblocking_server.py        and in a second terminal: python client.py
    Read next: select_server.py, where one call blocks until any of the sockets is ready.
"""

import argparse
import errno
import logging
import re
import socket
import sys
import time

log = logging.getLogger(__name__)


# ---- The model

def serve(listener: socket.socket, interval: float) -> None:
    """Serve all clients of a listening socket, forever; sleep interval seconds when idle."""
    listener.setblocking(False)
    connections: list[Connection] = []
    full = False  # True while there is no room: new clients then wait in the backlog
    while True:
        idle = True  # until something happens in this round
        if not full:
            new, full = accept_client(listener, len(connections))
            if new:
                connections.append(new)
                idle = False
        for connection in list(connections):  # a copy, because some may be removed
            if connection.handle():  # False if recv() or send() raised BlockingIOError
                idle = False
            if connection.end_reason:
                connections.remove(connection)
                connection.close()
                full = False
        if idle and interval:
            time.sleep(interval)  # data that arrives now has to wait


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
    text = "seconds to sleep after a round in which no socket was ready (%(default)s)"
    parser.add_argument("--interval", type=float, default=0.01, help=text)
    args = parser.parse_args()
    if not 0 <= args.interval <= 3600:
        parser.error("--interval must be from 0 to 3600 seconds")
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        listener = socket.create_server((args.host, args.port), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no Nagle delay; inherited
        host, port = listener.getsockname()
        print(f"listening on {host}:{port} (non-blocking, every {args.interval} s)", flush=True)
    except (OSError, OverflowError, TypeError) as error:  # TypeError: bad --host
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")
    with listener:
        serve(listener, args.interval)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        log.warning("stopped")  # clients see the end of the stream, or a reset
