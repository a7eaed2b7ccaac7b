"""Echo server, model 1 of 5: blocking I/O.

A call returns when it is done: accept() waits until a client connects, recv() until data
arrives, sendall() until the kernel has taken all the bytes.

    application                         kernel
    recv() -------------------------->  no data yet    -+
      |  waits                                          |  1. waiting for data
      |                                 data arrives   -+
    data <----------------------------  copies it          2. copying it

Cost: while the server waits for one client it cannot serve another; the kernel keeps the
next ones in the backlog, a queue. The classical remedy is threads: with --threads 4, four
threads run the same loop, and serve four clients at a time.

    python blocking_server.py           and in a second terminal: python client.py
    Read next: nonblocking_server.py, where one thread serves all clients.
"""

import argparse
import errno
import logging
import re
import signal
import socket
import sys
import threading
import time

RECV_SIZE = 65536  # bytes: the most that one recv() returns
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # from accept()
QUIT_LINE = re.compile(rb"\n(q\r?\n)")  # a line that is just q
log = logging.getLogger(__name__)


# ---- The model

def serve(listener: socket.socket) -> None:
    """Serve the clients of a listening socket, one after another, without end."""
    while True:
        try:
            sock, address = listener.accept()  # waits for a client; sock is a new socket for it
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                log.info("full (%s): the next clients wait in the backlog", error)
                time.sleep(1)  # a shortage can pass: try again
            continue  # any other error: that client has gone
        with sock:
            if address:  # macOS: None if that client has gone
                handle_client(sock, "{}:{}".format(*address))


def handle_client(sock: socket.socket, name: str) -> None:
    """Echo what a client sends until it quits, ends its stream or breaks the connection off."""
    log.info("%s: connected", name)
    conversation = Conversation()
    try:
        while not conversation.finished:
            data = sock.recv(RECV_SIZE)  # waits for data, copies it
            log.info("%s: read %d bytes: %r", name, len(data), data[:50])
            if not data:  # the end of its stream
                break
            sock.sendall(conversation.reply(data))  # waits while its send buffer is full
        # Half-close: shutdown() ends our direction only. The client gets every reply, then
        # the end of stream, and closes. After close(), what it still sends would cause a
        # reset: the kernel breaks the connection off; replies on their way can be lost.
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(1)  # or a client that now stays silent would keep the next one waiting
        while sock.recv(RECV_SIZE):
            pass
        log.info("%s: closed (%s)", name, "quit" if conversation.finished else "end of stream")
    except OSError as error:  # a reset by the client, or its second of silence is over
        log.info("%s: closed (%s)", name, error)


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
    parser.add_argument("--threads", type=int, default=1, help="clients at once (%(default)s)")
    args = parser.parse_args()
    if not 1 <= args.threads <= 1000:
        parser.error("--threads must be from 1 to 1000")
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # else Ctrl-C waits until a client comes (cpython issue 85609)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with socket.create_server((args.host.encode(), args.port), backlog=1024) as listener:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # send replies at once
            host, port = listener.getsockname()
            print(f"listening on {host}:{port} (blocking, threads: {args.threads})", flush=True)
            for _ in range(args.threads - 1):
                threading.Thread(target=serve, args=[listener], daemon=True).start()
            serve(listener)
    except KeyboardInterrupt:
        log.warning("stopped")
    except RuntimeError as error:
        sys.exit(f"cannot start {args.threads} threads: {error}")
    except (OSError, OverflowError, UnicodeError) as error:
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")


if __name__ == "__main__":
    main()
