"""A server behind Redis' protocol that answers every command with the same kind of error."""

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: What is answered to a command with its arguments.
Reply = Callable[[list[str]], str]


def repeating(arguments: list[str]) -> str:
    """As Redis answers where a command was renamed, or a proxy lacks it: with all its arguments."""
    rest = " ".join(f"'{each}'" for each in arguments[1:])
    return f"-ERR unknown command '{arguments[0]}', with args beginning with: {rest} "


@contextmanager
def refusing_redis(reply: Reply = repeating) -> Iterator[int]:
    """Its port."""

    class Handler(socketserver.StreamRequestHandler):
        timeout = 60

        def handle(self) -> None:
            while line := self.rfile.readline():
                arguments = [self._argument() for _ in range(int(line[1:]))]
                self.wfile.write(f"{reply(arguments)}\r\n".encode())

        def _argument(self) -> str:
            size = int(self.rfile.readline()[1:])
            return self.rfile.read(size + 2)[:size].decode()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
