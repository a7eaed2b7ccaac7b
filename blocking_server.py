"""Echo server with blocking I/O: model 1 of Stevens' five I/O models.

Receiving has two phases, (1) waiting for data and (2) copying it from the kernel to the program.
A blocking recv() blocks its thread through both. (The kernel is the core of the operating system.)

    application                         kernel                   A     B    (receive buffers)
    recv(A) ------------------------->  no data yet              -     -   -+
      |  blocked                        data for B arrives       -    data  |  (1) waiting for data
      |  blocked                        data for A arrives     data   data -+
    data <----------------------------  copies it                -    data     (2) copying it
    sendall(A) ---------------------->  copies it into the send buffer of A
    recv(A) ------------------------->  no data yet              -    data
      |  blocked, and nobody reads the data of B until A leaves

Cost: a thread serves one client at a time. With one thread the server is iterative: other clients
wait in the backlog, the kernel's queue of connections not yet accepted. (They are connected and
can send, but get no reply.) The classic remedy is threads (a concurrent server): with --threads 4,
four run this loop, each new client wakes one blocked in accept(), and a fifth client waits. Threads
cost memory, and clients cost file descriptors (numbers of open sockets). Both are limited.

    python blocking_server.py           and in a second terminal: python client.py
    Read next: nonblocking_server.py, where one thread serves all clients.
"""

import argparse
import contextlib
import logging
import re
import signal
import socket
import sys
import threading
import time

log = logging.getLogger(__name__)


# ---- The model

RECV_SIZE = 65536  # bytes: the most that one recv() returns


def serve(listener: socket.socket) -> None:
    """Serve the clients of a listening socket, one after another, forever."""
    while True:
        try:
            sock, address = listener.accept()  # blocks until a client connects
        except ConnectionError:
            continue  # that client is already gone
        except OSError as error:  # usually out of resources (EMFILE: no descriptor left)
            log.info("full (%s): trying again in a second", error)
            time.sleep(1)
            continue
        host, port = address or ("?", "?")  # macOS: no address if the client is already gone
        handle_client(sock, f"{host}:{port}")


def handle_client(sock: socket.socket, name: str) -> None:
    """Echo data until the client quits, closes (recv() returns b""), or resets the connection."""
    log.info("%s: connected", name)
    conversation = Conversation()
    with sock:
        try:
            while not conversation.finished and (data := sock.recv(RECV_SIZE)):  # blocks
                log.info("%s: received %d bytes: %r", name, len(data), data[:50])
                sock.sendall(conversation.reply(data))  # blocks while the send buffer is full
            if conversation.finished:
                half_close(sock)
            log.info("%s: closed (%s)", name, "quit" if conversation.finished else "end of stream")
        except OSError as error:  # often a reset by the client
            log.info("%s: closed (%s)", name, error)


# ---- After a q

def half_close(sock: socket.socket) -> None:
    """End our direction and wait until the client closes. Raise OSError on a reset or silence."""
    # Half-close: shutdown() ends only our direction. The client gets every reply, then the
    # end of stream, and closes when it likes. If we closed instead, data that is unread or
    # still to come could cause a reset (an abort), and replies in transit could be lost.
    sock.shutdown(socket.SHUT_WR)
    # After a second without data, recv() raises OSError, so that silence holds up nobody else. If
    # the client then sends, the connection is reset, and the replies in our send buffer are lost.
    sock.settimeout(1)
    while sock.recv(RECV_SIZE):
        pass


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
    parser.add_argument("--threads", type=int, default=1, help="one client each (%(default)s)")
    args = parser.parse_args()
    if not 1 <= args.threads <= 1000:
        parser.error("--threads must be from 1 to 1000")
    layout = "%(asctime)s.%(msecs)03d %(message)s"
    logging.basicConfig(format=layout, datefmt="%H:%M:%S", force=True)  # the last run's is locked
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # a blocking call on a socket ignores Ctrl-C there
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # now Ctrl-C ends us (cpython issue 85609)
    try:
        listener = socket.create_server((args.host, args.port), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no Nagle delay; inherited
        for _ in range(args.threads - 1):
            threading.Thread(target=serve, args=[listener], daemon=True).start()  # or RuntimeError
        host, port = listener.getsockname()
        print(f"listening on {host}:{port} (blocking, threads: {args.threads})", flush=True)
    except (OSError, OverflowError, RuntimeError, TypeError) as error:  # TypeError: bad --host
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")
    with listener:
        try:
            serve(listener)
        finally:
            logging.getLogger().handlers[0].acquire()  # from here on, only this thread logs
            with contextlib.suppress(OSError):  # fails on macOS
                listener.shutdown(socket.SHUT_RDWR)  # frees the port in python -i, too


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        log.warning("stopped")  # clients see the end of the stream, or a reset
