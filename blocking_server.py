"""Echo server with blocking I/O: model 1 of Stevens' five I/O models.

Receiving has two phases, (1) waiting for data and (2) copying it from the kernel to the program.
A blocking recv() does both: it returns only when data has arrived and has been copied.

    application                         kernel                   A     B    (receive buffers)
    recv(A) ------------------------->  no data yet              -     -   -+
      |  blocked                                                 -    data  |  (1) waiting for data
      |  blocked                        data for A arrives     data   data -+
    data <----------------------------  copies it                -    data     (2) copying it
    recv(A) ------------------------->  no data yet              -    data
      |  blocked, and nobody reads the data of B until A has left

Cost: a thread can wait for only one client. Others wait in the backlog, the kernel's queue of
connections that have not been accepted. The classic remedy is threads: with --threads 4, four
threads run this loop, and each new client wakes one that is blocked in accept(). (For that, each
thread needs a file descriptor, the number of an open socket; a process may have only so many.)

    python blocking_server.py           and in a second terminal: python client.py
    Read next: nonblocking_server.py, where one thread serves all clients.
"""

import argparse
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


def serve(listener: socket.socket, retry: threading.Lock) -> None:
    """Serve the clients of a listening socket, one after another, forever."""
    while True:
        try:
            sock, address = listener.accept()  # blocks until a client connects
        except ConnectionError:
            continue  # that client is already gone
        except OSError as error:  # usually out of resources, such as file descriptors
            if retry.acquire(timeout=1):  # a lock: only one thread per second says so
                log.info("full (%s): new clients will have to wait", error)
                time.sleep(1)
                retry.release()
            continue
        host, port = address or ("?", "?")  # macOS: no address if the client is already gone
        handle_client(sock, f"{host}:{port}")


def handle_client(sock: socket.socket, name: str) -> None:
    """Echo what a client sends until it quits, closes, or resets the connection."""
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
    """End our direction, and wait until the client closes. Raise OSError if it is silent."""
    # Half-close: shutdown() ends only our direction. The client gets every reply, then the
    # end of stream, and closes. After close(), data that it still sends, or that we did not
    # receive, would cause a reset, and replies in transit could be lost.
    sock.shutdown(socket.SHUT_WR)
    sock.settimeout(1)  # second per recv(), so that a silent client does not hold up the next
    while sock.recv(RECV_SIZE):
        pass


# ---- The conversation: the same in all servers

class Conversation:
    """The echo protocol without any I/O (sans-I/O): bytes in, bytes out, until a q."""

    def __init__(self) -> None:
        self.tail = b"\n"  # the last bytes received; at first, as if a line had just ended
        self.filled = False  # True if the last recv() returned its maximum: a message may go on
        self.finished = False  # True after a q line, or a q alone

    def reply(self, data: bytes) -> bytes:
        """Return the bytes to send back for the bytes of one recv()."""
        if data == b"q" and not self.filled:  # alone, from a client that sends no newlines
            self.finished = True
            return b""
        # TCP may split a q line: b"a\nq" was echoed already, and now b"\n" arrives. Together with
        # the tail, b"a\nq", it is found. The part of data before the q is then empty.
        text = self.tail + data
        if b"q" in text and (quit_line := re.search(rb"\n(q\r?\n)", text)):
            self.finished = True
            return data[: max(0, quit_line.start(1) - len(self.tail))]
        self.tail = text[-3:]  # as long as an unfinished q line can be: b"\nq\r"
        self.filled = len(data) == RECV_SIZE
        return data


# ---- The command line: the same in all servers

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
    retry = threading.Lock()
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # a blocking call on a socket ignores Ctrl-C there
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # (cpython issue 85609)
    try:
        listener = socket.create_server((args.host, args.port), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited: no send delay
        for _ in range(args.threads - 1):
            threading.Thread(target=serve, args=[listener, retry], daemon=True).start()
        address = "{}:{}".format(*listener.getsockname())
        print(f"listening on {address} (blocking, threads: {args.threads})", flush=True)
    except (OSError, OverflowError, RuntimeError, TypeError) as error:  # TypeError: an odd --host
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")
    with listener:
        try:
            serve(listener, retry)
        finally:  # the other threads may still log: hold the log's lock while Python exits
            logging.getLogger().handlers[0].acquire()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        log.warning("stopped")
