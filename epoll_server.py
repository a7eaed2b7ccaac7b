"""Echo server, model 3 of 5: I/O multiplexing, with epoll (Linux).

One call waits for many sockets, as in select_server.py. But the kernel keeps the list of
them: the application reports only changes of the list, and gets only the ready sockets.

    application                         kernel             A    B    C  (receive buffers)
    register A, B and C ------------->  keeps the list
    poll() -------------------------->  waits              -    -    -  -+
      |                                                    -   data  -   |  1. waiting for data
    [B] <-----------------------------  B is readable      -   data  -  -+
    recv(B) ------------------------->  copies the data    -    -    -      2. copying it
    send(B) ------------------------->  copies it into the send buffer of B
    poll() -------------------------->  waits: it has the list

Cost: a system call for each change of the list. A silent client costs no CPU time, and
there can be as many clients as the process may have file descriptors.

    python epoll_server.py              and in a second terminal: python client.py
    Read next: selectors_server.py, which does the same on every platform.
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
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    while True:
        # Level-triggered: poll() reports a socket each time, as long as it is ready. So one read
        # is enough, and then it is the next client's turn. (Edge-triggered, with EPOLLET, it
        # would report new data once: what is left unread would wait for more to arrive.)
        for fd, event in epoll.poll():  # waits, in spite of its name
            if fd == listener.fileno():
                try:
                    if new := accept(listener):
                        epoll.register(new.sock, select.EPOLLIN)
                        connections[new.sock.fileno()] = new
                except OSError as error:
                    log.info("full (%s): the next clients wait in the backlog", error)
                    if connections:
                        epoll.modify(listener, 0)  # not watched, until a client leaves
                    else:
                        time.sleep(1)  # a shortage can pass: try again
            else:
                connection = connections[fd]
                connection.on_ready()
                # A socket is nearly always writable: its send buffer has room. If epoll watched
                # all of them for that, it would never wait. So it watches only those with
                # unsent bytes. (event is what this one was watched for, or an error.)
                wanted = select.EPOLLOUT if connection.unsent else select.EPOLLIN
                if connection.closed:
                    del connections[fd]
                    connection.sock.close()  # and the kernel takes it off the list
                    log.info("%s: closed (%s)", connection.name, connection.closed)
                    epoll.modify(listener, select.EPOLLIN)  # watched again, if it was not
                elif wanted != event:
                    epoll.modify(fd, wanted)


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
    if not hasattr(select, "epoll"):
        sys.exit("this platform has no epoll: use selectors_server.py")
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # else Ctrl-C waits until a client comes (cpython issue 85609)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with socket.create_server((args.host.encode(), args.port), backlog=1024) as listener:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # send replies at once
            host, port = listener.getsockname()
            print(f"listening on {host}:{port} (epoll)", flush=True)
            serve(listener)
    except KeyboardInterrupt:
        log.warning("stopped")
    except (OSError, OverflowError, UnicodeError) as error:
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")


if __name__ == "__main__":
    main()
