"""Echo server with I/O multiplexing, by selectors: model 3 of Stevens' five I/O models.

Receiving has two phases, (1) waiting for data and (2) copying it from the kernel to the program.
For the waiting, selectors uses the platform's best call: epoll on Linux, kqueue on macOS, select
on Windows. Each socket is registered with a callback, the function to call when it is ready. A
loop that blocks until sockets are ready and calls their callbacks, one by one, is an event loop.

    application                         kernel               A     B     C    (receive buffers)
    selector.select() --------------->  no data yet          -     -     -   -+
      |  blocked                        data for B arrives   -   data    -    |  (1) waiting
    [B] <-----------------------------  B is readable        -   data    -   -+  for data
    callback(B)
      recv(B) ----------------------->  copies it            -     -     -      (2) copying it
      send(B) ----------------------->  copies it into the send buffer of B
    selector.select() --------------->  no data yet          -     -     -

Cost: that of the underlying call, plus a little Python code per event.

    python selectors_server.py          and in a second terminal: python client.py
    Read next: async_server.py, where the event loop runs coroutines instead of callbacks.
"""

import argparse
import errno
import logging
import re
import select
import selectors
import signal
import socket
import sys
import time

log = logging.getLogger(__name__)


# ---- The model

def serve(listener: socket.socket, selector: selectors.BaseSelector) -> None:
    """Serve all clients of a listening socket from one event loop, forever."""
    listener.setblocking(False)  # ready is a hint: the client may be gone, and accept() could block
    connections: dict[socket.socket, Connection] = {}

    def on_accept(listener: socket.socket, event: int) -> None:
        """Accept a client. Called when the listener is readable: a client is in the backlog."""
        new, full = accept_client(listener, len(connections))
        if new:
            connections[new.sock] = new
            selector.register(new.sock, selectors.EVENT_READ, on_client)
            # 500 is below both limits of select(): 512 sockets on Windows, else descriptor 1023.
            if isinstance(selector, selectors.SelectSelector) and len(connections) == 500:
                log.info("full (500 clients for select): new clients will have to wait")
                full = True
        if full:
            selector.unregister(listener)  # it stays readable: ignore it until a client leaves

    def on_client(sock: socket.socket, event: int) -> None:
        """Serve a client. Called when its socket is ready, for reading or for writing."""
        connection = connections[sock]
        connection.handle()
        if connection.end_reason:
            del connections[sock]
            selector.unregister(sock)  # the selector has a list of its own
            connection.close()
            if listener not in selector.get_map():
                selector.register(listener, selectors.EVENT_READ, on_accept)
        elif connection.unsent:
            # A socket is nearly always writable: send() takes some bytes or, after a reset, fails.
            # If all were watched for writing, selector.select() would never block.
            selector.modify(sock, selectors.EVENT_WRITE, on_client)
        elif event & selectors.EVENT_WRITE:
            selector.modify(sock, selectors.EVENT_READ, on_client)  # all has been sent

    selector.register(listener, selectors.EVENT_READ, on_accept)
    while True:
        for key, event in selector.select():  # blocks until any is ready
            callback = key.data  # the function registered with key.fileobj, the socket
            callback(key.fileobj, event)


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
    names = [n for n in ("select", "poll", "epoll", "kqueue", "devpoll") if hasattr(select, n)]
    text = "use this one, not the best"
    parser.add_argument("--selector", choices=names, default="default", help=text)
    args = parser.parse_args()
    selector = getattr(selectors, f"{args.selector.capitalize()}Selector")()
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # a blocking call on a socket ignores Ctrl-C there
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # now Ctrl-C ends us (cpython issue 85609)
    try:
        listener = socket.create_server((args.host, args.port), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no Nagle delay; inherited
        host, port = listener.getsockname()
        print(f"listening on {host}:{port} ({type(selector).__name__})", flush=True)
    except (OSError, OverflowError, TypeError) as error:  # TypeError: bad --host
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")
    with listener:
        serve(listener, selector)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        log.warning("stopped")  # clients see the end of the stream, or a reset
