"""A process that claims to serve a reward and lies, one way at each path. Says its port; standard library alone."""

import json
import socketserver
import sys
import time

ABOUT = json.dumps({"protocol": 1, "name": "liar", "differentiable": False, "version": "0"}).encode()
HEAD = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def reply(body: bytes, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    return HEAD % (status, len(body) if length is None else length) + body


LIES = {
    "few": reply(b'{"scores": [1.0]}'),
    "many": reply(b'{"scores": [1, 2, 3, 4]}'),
    "none": reply(b"{}"),
    "texts": reply(b'{"scores": ["1", 2, 3]}'),
    "bools": reply(b'{"scores": [true, 2, 3]}'),
    "nan": reply(b'{"scores": [1, NaN, 3]}'),
    "infinite": reply(b'{"scores": [1, 2, 1e999]}'),
    "whole": reply(b'{"scores": [1, 2, 1' + b"0" * 400 + b"]}"),
    "nested": reply(b"[" * 100_000),
    "array": reply(b"[1, 2, 3]"),
    "page": reply(b"<html><body>Bad gateway</body></html>", b"502 Bad Gateway"),
    "error": reply(b'{"error": "two\\nlines \\u001b[31mred"}', b"422 No"),
    "empty": reply(b""),
    "short": reply(b'{"scores": [1, 2, 3]}', length=500),
    "long": reply(b'{"scores": [1, 2, 3]}', length=5),
    "huge": reply(b" " * 2_000_000),
    "endless": b"HTTP/1.1 200 OK\r\n\r\n" + b"1" * 3_000_000,
    "garbage": b"\x00\xff" * 500 + b"\r\n\r\n",
    "closes": b"",
    "moved": b"HTTP/1.1 302 Found\r\nLocation: /good/score\r\nContent-Length: 0\r\n\r\n",
    "good": reply(b'{"scores": [1, 2, 3]}'),
}
STALLS = {"stalls": b"", "stalls-inside": LIES["short"]}  # what is sent before nothing comes any more


class Liar(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        method, path, _ = self.rfile.readline().decode().split()
        length = 0
        while (header := self.rfile.readline().decode().strip()) != "":
            if header.lower().startswith("content-length:"):
                length = int(header.split(":")[1])
        self.rfile.read(length)
        lie = path.split("/")[1]
        try:
            if method == "GET":
                protocol = ABOUT.replace(b'"protocol": 1', b'"protocol": 2') if lie == "newer" else ABOUT
                self.wfile.write(reply(protocol))
            elif lie in STALLS:
                self.wfile.write(STALLS[lie])
                self.rfile.read(1)  # until the client goes
            elif lie == "drips":
                for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            else:
                self.wfile.write(LIES[lie])
        except OSError:
            pass


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Liar) as server:
        sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}/\n")
        sys.stdout.flush()
        server.serve_forever()
