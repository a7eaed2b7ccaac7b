"""Echo server, model 3 of 5: I/O multiplexing, with selectors.

The selectors module takes the best of epoll, kqueue, poll and select that the platform
has. Each socket is registered with a callback, the function to call when the socket is
ready. A loop that waits and calls callbacks is an event loop.

    application                         kernel             A    B    C  (receive buffers)
    select() ------------------------>  waits              -    -    -  -+
      |                                                    -   data  -   |  1. waiting for data
    [B] <-----------------------------  B is readable      -   data  -  -+
    callback of B: recv(B), send(B) ->  copies the data    -    -    -      2. copying it

Cost: that of the call underneath, and a little more Python code for each event.

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

RECV_SIZE = 65536  # bytes: the most that one recv() returns
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # from accept()
QUIT_LINE = re.compile(rb"\n(q\r?\n)")  # a line that is just q
log = logging.getLogger(__name__)


# ---- The model

def serve(listener: socket.socket, selector: selectors.BaseSelector) -> None:
    """Serve all clients of a listening socket from one loop, without end."""

    def on_accept(_key: selectors.SelectorKey) -> None:  # called when the listener is readable
        try:
            if isinstance(selector, selectors.SelectSelector):  # it cannot watch 1024 and above
                with socket.socket() as probe:  # gets the file descriptor that new will get
                    select.select([*selector.get_map(), probe.fileno()], [], [], 0)
            if new := accept(listener):
                selector.register(new.sock, selectors.EVENT_READ, lambda key: on_client(new, key))
        except (OSError, ValueError) as error:
            log.info("full (%s): the next clients wait in the backlog", error)
            if len(selector.get_map()) > 1:
                selector.unregister(listener)  # not watched, until a client leaves
            else:
                time.sleep(1)  # a shortage can pass: try again

    def on_client(connection: Connection, key: selectors.SelectorKey) -> None:  # when it is ready
        connection.on_ready()
        # A socket is nearly always writable: its send buffer has room. If the selector watched
        # all of them for that, it would never wait. So it watches only those with unsent bytes.
        wanted = selectors.EVENT_WRITE if connection.unsent else selectors.EVENT_READ
        if connection.closed:
            selector.unregister(connection.sock)
            connection.sock.close()
            log.info("%s: closed (%s)", connection.name, connection.closed)
            if listener not in selector.get_map():
                selector.register(listener, selectors.EVENT_READ, on_accept)
        elif wanted != key.events:
            selector.modify(connection.sock, wanted, key.data)

    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ, on_accept)
    while True:
        for key, _ in selector.select():  # waits
            callback = key.data  # what was registered with this socket
            callback(key)


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
    names = [n for n in ("select", "poll", "epoll", "kqueue", "devpoll") if hasattr(select, n)]
    parser.add_argument("--selector", choices=names, default="default", help="which one (the best)")
    args = parser.parse_args()
    selector = getattr(selectors, f"{args.selector.capitalize()}Selector")()
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # else Ctrl-C waits until a client comes (cpython issue 85609)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with socket.create_server((args.host.encode(), args.port), backlog=1024) as listener:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # send replies at once
            host, port = listener.getsockname()
            print(f"listening on {host}:{port} ({type(selector).__name__})", flush=True)
            serve(listener, selector)
    except KeyboardInterrupt:
        log.warning("stopped")
    except (OSError, OverflowError, UnicodeError) as error:
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")


if __name__ == "__main__":
    main()
