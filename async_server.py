"""Echo server, model 5 of 5: asynchronous I/O, with asyncio.

A coroutine is a function that can pause at an await, and go on later. Each client has one;
it reads like blocking_server.py, with an await before each call that waits. While it is
paused, the event loop runs the others. (A task is a coroutine that the event loop runs.)

    coroutine of B           event loop              kernel           A    B    C
    await sock_recv(B) --->  select() ------------>  waits            -    -    -  -+ (1)
      |                                                               -   data  -   |
      |  paused              [B] <-----------------  B is readable    -   data  -  -+
      |                      recv(B) ------------->  copies the data  -    -    -     (2)
    data <-----------------  resumes the coroutine

On Linux and macOS the event loop does both: (1) waiting for data, with a selector, and
then (2) copying it, with recv(). On Windows (I/O completion ports) it asks the kernel for both,
and the kernel reports when the data has been copied: this is asynchronous I/O in the strict
sense. The coroutine is the same.

Cost: more CPU time for a message. The event loop tries recv() first; if there is no data, it
adds the socket to its selector, waits, removes it, and calls recv() again.

    python async_server.py              and in a second terminal: python client.py
    Model 4, signal-driven I/O, is rarely used: the README shows it.
"""

import argparse
import asyncio
import errno
import logging
import re
import signal
import socket
import sys

RECV_SIZE = 65536  # bytes: the most that one recv() returns
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # from accept()
QUIT_LINE = re.compile(rb"\n(q\r?\n)")  # a line that is just q
log = logging.getLogger(__name__)


# ---- The model

async def serve(listener: socket.socket) -> None:
    """Serve all clients of a listening socket, each in a task of its own, without end."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    tasks: set[asyncio.Task[None]] = set()  # the event loop itself does not keep them alive
    client_left = asyncio.Event()

    def on_done(task: asyncio.Task[None]) -> None:
        """Called when the task of a client is done."""
        tasks.remove(task)
        client_left.set()

    while True:
        await asyncio.sleep(0)  # lets the clients' tasks run, even if accepting never waits
        try:
            sock, address = await loop.sock_accept(listener)  # sock is non-blocking
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                log.info("full (%s): the next clients wait in the backlog", error)
                client_left.clear()
                await (client_left.wait() if tasks else asyncio.sleep(1))
            continue  # any other error: that client has gone
        if not address:  # macOS: None if that client has gone
            sock.close()
            continue
        task = loop.create_task(handle_client(sock, "{}:{}".format(*address)))
        tasks.add(task)
        task.add_done_callback(on_done)


async def handle_client(sock: socket.socket, name: str) -> None:
    """Echo what a client sends until it quits, ends its stream or breaks the connection off."""
    log.info("%s: connected", name)
    loop = asyncio.get_running_loop()
    conversation = Conversation()
    with sock:
        try:
            while not conversation.finished:
                data = await loop.sock_recv(sock, RECV_SIZE)  # waits for data, copies it
                log.info("%s: read %d bytes: %r", name, len(data), data[:50])
                if not data:
                    break
                await loop.sock_sendall(sock, conversation.reply(data))
                await asyncio.sleep(0)  # lets the others run: an await on a ready socket does not
            # Half-close: shutdown() ends our direction only. The client gets every reply, then
            # the end of stream, and closes. After close(), what it still sends would cause a
            # reset: the kernel breaks the connection off; replies on their way can be lost.
            sock.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(sock, RECV_SIZE):
                await asyncio.sleep(0)
            log.info("%s: closed (%s)", name, "quit" if conversation.finished else "end of stream")
        except OSError as error:  # a reset: the client has broken the connection off
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
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)
    if sys.platform == "win32":  # else Ctrl-C waits until a client comes (cpython issue 85609)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with socket.create_server((args.host.encode(), args.port), backlog=1024) as listener:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # send replies at once
            host, port = listener.getsockname()
            print(f"listening on {host}:{port} (asyncio)", flush=True)
            asyncio.run(serve(listener))
    except KeyboardInterrupt:
        log.warning("stopped")
    except (OSError, OverflowError, UnicodeError) as error:
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")


if __name__ == "__main__":
    main()
