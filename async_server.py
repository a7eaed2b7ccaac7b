"""Echo server with coroutines, by asyncio: model 3 on Linux and macOS, model 5 on Windows.

A coroutine is a function that can pause at an await, keeping its variables and its place; the event
loop resumes it. Each client has one, which looks like blocking_server.py, with an await before
each call that would block. While one is paused, others run. The event loop does both phases of
receiving, (1) waiting for data and (2) copying it from the kernel. On Linux and macOS it uses a
selector and recv():

    coroutine of B           event loop               kernel                   (B's receive buffer)
    await sock_recv(B) --->  recv(B) -------------->  no data yet            -   -+
      |  paused              selector.select() ---->  no data yet            -    |  (1) waiting
      |                        |  blocked             data for B arrives   data   |      for data
      |                      [B] <------------------  B is readable        data  -+
    data <-----------------  recv(B) -------------->  copies it              -      (2) copying it

On Windows it asks the kernel to receive. This is asynchronous I/O, model 5 of Stevens' five:

    await sock_recv(B) --->  start recv(B) -------->  no data yet            -   -+  (1) and (2):
      |  paused              waits for completions    data for B arrives   data   |  the event loop
      |                        |  blocked             copies it              -    |  is told when
    data <-----------------  recv(B) is complete <--                             -+  both are done

Cost: CPU time, above all when a coroutine pauses. On Linux and macOS, the event loop then registers
the socket with its selector, and unregisters it when data arrives.

    python async_server.py              and in a second terminal: python client.py
    Model 4, signal-driven I/O, is rarely used; the README has an example.
"""

import argparse
import asyncio
import logging
import re
import socket
import sys

log = logging.getLogger(__name__)


# ---- The model

RECV_SIZE = 65536  # bytes: the most that one recv() returns


async def serve(listener: socket.socket) -> None:
    """Serve all clients of a listening socket, each in a task of its own, forever."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)  # as asyncio requires
    tasks: set[asyncio.Task[None]] = set()  # asyncio has only weak references to tasks
    while True:
        await asyncio.sleep(0)  # let the clients' tasks run, even if accepting never pauses
        try:
            sock, address = await loop.sock_accept(listener)  # sock is non-blocking
        except ConnectionError:
            continue  # that client is already gone
        except OSError as error:  # usually out of resources (EMFILE: no descriptor left)
            log.info("full (%s): trying again in a second", error)
            if tasks:  # or once a client leaves
                await asyncio.wait(tasks, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(1)
            continue
        host, port = address or ("?", "?")  # macOS: no address if the client is already gone
        task = loop.create_task(handle_client(sock, f"{host}:{port}"))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        del task  # asyncio shows an exception in a task when the last reference to it is gone


async def handle_client(sock: socket.socket, name: str) -> None:
    """Echo data until the client quits, closes (recv() returns b""), or resets the connection."""
    log.info("%s: connected", name)
    loop = asyncio.get_running_loop()
    conversation = Conversation()
    with sock:
        try:
            while not conversation.finished and (data := await loop.sock_recv(sock, RECV_SIZE)):
                log.info("%s: received %d bytes: %r", name, len(data), data[:50])
                await loop.sock_sendall(sock, conversation.reply(data))  # backpressure: may pause
                await asyncio.sleep(0)  # let others run: awaiting a ready socket does not
            if conversation.finished:
                await half_close(sock)
            log.info("%s: closed (%s)", name, "quit" if conversation.finished else "end of stream")
        except OSError as error:  # often a reset by the client
            log.info("%s: closed (%s)", name, error)


# ---- After a q

async def half_close(sock: socket.socket) -> None:
    """End our direction and wait until the client closes. Raise OSError on reset."""
    # Half-close: shutdown() ends only our direction. The client gets every reply, then the
    # end of stream, and closes when it likes. If we closed instead, data that is unread or
    # still to come could cause a reset (an abort), and replies in transit could be lost.
    sock.shutdown(socket.SHUT_WR)
    while await asyncio.get_running_loop().sock_recv(sock, RECV_SIZE):
        await asyncio.sleep(0)  # let others run, if the client sends without a pause


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
    try:
        listener = socket.create_server((args.host, args.port), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no Nagle delay; inherited
        host, port = listener.getsockname()
        print(f"listening on {host}:{port} (asyncio)", flush=True)
    except (OSError, OverflowError, TypeError) as error:  # TypeError: bad --host
        sys.exit(f"cannot serve on {args.host}:{args.port}: {error}")
    with listener:
        asyncio.run(serve(listener))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        log.warning("stopped")  # clients see the end of the stream, or a reset
