"""A stand-in for S3 that gives away pictures: several processes on one port.

``python -m benchmarks.gpu.stub_s3 PORT PROCESSES SIZE...``: keys begin with one of the sizes. It
knows no signatures and no errors: what S3 does is tested elsewhere, here it must be out of the way.
"""

import asyncio
import hashlib
import os
import socket
import sys

from benchmarks.gpu.pictures import BASES, drawn, picture


class _Connection(asyncio.Protocol):
    """Answers GET and HEAD of ``/bucket/key``, one after the other."""

    def __init__(self) -> None:
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while b"\r\n\r\n" in self._unread:
            head, _, self._unread = self._unread.partition(b"\r\n\r\n")
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        method, path, _ = head.split(b"\r\n", 1)[0].split(b" ", 2)
        _, _, key = path.partition(b"?")[0].lstrip(b"/").partition(b"/")
        body = picture(key.decode())
        tag = hashlib.md5(key, usedforsecurity=False).hexdigest()
        lines = [
            "HTTP/1.1 200 OK",
            "Content-Type: image/jpeg",
            f"Content-Length: {len(body)}",
            f'ETag: "{tag}"',
            "Last-Modified: Fri, 27 Nov 2026 12:00:00 GMT",
        ]
        answer = "\r\n".join(lines).encode() + b"\r\n\r\n"
        self._transport.write(answer if method == b"HEAD" else answer + body)  # type: ignore[attr-defined]


async def _serve(port: int) -> None:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(("127.0.0.1", port))
    server = await asyncio.get_running_loop().create_server(
        _Connection, sock=listening, backlog=512
    )
    await server.serve_forever()


def main(port: int, processes: int, sizes: list[str]) -> None:
    """Draws the pictures once, then serves them from so many processes. Does not return."""
    for size in sizes:
        for seed in range(BASES[size]):
            drawn(size, seed)
    for _ in range(processes - 1):
        if os.fork() == 0:
            break
    asyncio.run(_serve(port))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
