"""Echo server with I/O multiplexing, by epoll (Linux): model 3 of Stevens' five I/O models.

Receiving has two phases, (1) waiting for data and (2) copying it from the kernel to the program.
One call does the waiting for many sockets, as in select_server.py. But here the kernel keeps the
list of sockets, and the application only tells it what changes. When data arrives, the kernel
marks its socket as ready, so nobody goes through the list.

    application                         kernel               A     B     C    (receive buffers)
    register A, B and C ------------->  keeps the list
    epoll_wait() -------------------->  no data yet          -     -     -   -+
      |  blocked                        data for B arrives   -   data    -    |  (1) waiting
    [B] <-----------------------------  B is readable        -   data    -   -+  for data
    recv(B) ------------------------->  copies it            -     -     -      (2) copying it
    send(B) ------------------------->  copies it into the send buffer of B
    epoll_wait() -------------------->  has the list already

A silent client costs no CPU time, as a call goes through the ready sockets only. The limits are
memory and the number of file descriptors (numbers of open sockets) that a process may have.
Cost: a system call per change to the list.

    python epoll_server.py              and in a second terminal: python client.py
    Read next: selectors_server.py, which uses each platform's best such call.
"""

import argparse
import errno
import logging
import re
import select
import socket
import sys
import time

log = logging.getLogger(__name__)


# ---- The model

def serve(listener: socket.socket) -> None:
    """Serve all clients of a listening socket from one loop, forever."""
    listener.setblocking(False)  # ready is a hint: the client may be gone, and accept() could block
    connections: dict[int, Connection] = {}  # by file descriptor
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    while True:
        # Level-triggered: epoll reports a socket every time, for as long as it is ready. So we
        # receive once, and then it is the next client's turn. (Edge-triggered, with EPOLLET, it
        # would report new data only once, and what we left unread only when more arrives.)
        for fd, event in epoll.poll():  # epoll_wait() blocks until any is ready
            if fd == listener.fileno():  # it is readable: a client is in the backlog
                new, full = accept_client(listener, len(connections))
                if new:
                    connections[new.sock.fileno()] = new
                    epoll.register(new.sock, select.EPOLLIN)
                elif full:
                    epoll.modify(listener, 0)  # it stays readable: ignore it until a client leaves
            else:
                connection = connections[fd]
                connection.handle()  # errors are reported, too: recv() or send() raises them
                if connection.end_reason:
                    del connections[fd]
                    connection.close()  # the kernel then drops it from its list
                    epoll.modify(listener, select.EPOLLIN)  # in case we had stopped watching it
                elif connection.unsent:
                    # A socket is nearly always writable: send() takes some bytes or, after a
                    # reset, fails. If all were watched for writing, epoll.poll() would never block.
                    epoll.modify(fd, select.EPOLLOUT)
                elif event & select.EPOLLOUT:
                    epoll.modify(fd, select.EPOLLIN)  # all has been sent


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
    args = parser.parse_args()
    if not hasattr(select, "epoll"):
        sys.exit("this platform has no epoll: use selectors_server.py")
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        listener = socket.create_server((args.host, args.port), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no Nagle delay; inherited
        host, port = listener.getsockname()
        print(f"listening on {host}:{port} (epoll)", flush=True)
    except (OSError, OverflowError, TypeError) as error:  # TypeError: bad --host
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")
    with listener:
        serve(listener)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        log.warning("stopped")  # clients see the end of the stream, or a reset
