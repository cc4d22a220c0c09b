"""Sends bad requests to the local page of search.py: bytes that are no HTTP, paths that lead out of the folder, numbers
of no picture, texts that are too long or no text, other hosts and methods, connections that break off. After each block
a good request must be answered. Nothing may be written, nothing of a file outside may come back, no traceback may be
printed.

    python tests/campaigns/fuzz_search.py 2000                  requests of the seeds 0 .. 1999
    python tests/campaigns/fuzz_search.py 1 --seed 57           one request

200 of them run in tests/test_search.py.
"""
import argparse
import contextlib
import dataclasses
import io
import os
import pathlib
import random
import re
import socket
import sys
import tempfile
import threading
import urllib.parse

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch                                                                 # noqa: E402

import data                                                                  # noqa: E402
import search                                                                # noqa: E402
import serve                                                                 # noqa: E402
from demo import emoji                                                       # noqa: E402
from model import CCLM, PRESETS                                              # noqa: E402

SECRET = b"this must not be read"
FORM = re.compile(rb"(?P<page>HTTP/1.0 200 )|(?P<refused>HTTP/1.0 (?:400|403|404|414|431|501|505) )|"
                  rb"(?P<HTTP_09>4\d\d |5\d\d |<!doc|\xff\xd8)|(?P<nothing>$)")
OUT = ["../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "/etc/passwd", "//etc/passwd", "....//secret.txt",
       "..\\secret.txt", "secret.txt%00.png", "file:///etc/passwd", "picture/../../secret.txt", "picture/1/../../secret.txt"]
NUMBERS = ["-1", "6", "999999999", "9" * 40, "1e3", "0x1", "1.5", "", " ", "٣", "1;ls", "nan", "0/..", "00000000000001"]
TEXTS = ["%ff%fe", "%00", "a" * 999, "a" * 1001, "%ed%a0%80", "🐕" * 300, "<script>alert(1)</script>", "'\"--", "%", "%zz",
         "\u202e\u0007", "{}{0}%s%n", "%0d%0aSet-Cookie:%20a=b", "a&q=b&like=1", "&" * 50, "   "]
HEADS = [b"Host: evil.example\r\n", b"", b"Host: 127.0.0.1\r\n", b"Host: localhost:1\r\n", b"Host:\r\n",
         b"Host: 127.0.0.1:%d\r\nHost: evil.example\r\n", b"Host: %d\r\n", b"X: " + b"a" * 70000 + b"\r\n",
         b"A: b\r\n" * 200, b"Content-Length: 99999999\r\n", b"Transfer-Encoding: chunked\r\n", b": :\r\n", b"\xff\r\n"]
METHODS = ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PATCH", "get", "GET GET", ""]


def bad_request(draw, port):
    """-> bytes. Most are nearly right: one thing is wrong in them, or two."""
    method, head, version = "GET", b"Host: 127.0.0.1:%d\r\n", draw.choice(["HTTP/1.0", "HTTP/1.1"])
    target = draw.choice(["/", "/?q=dog", "/picture/0", "/look/1?q=dog", "/cosine/1?q=dog", "/attention/2?q=dog"])
    for _ in range(draw.choice([1, 1, 2])):
        kind = draw.randrange(8)
        if kind == 0:
            target = draw.choice(["/", "", "/picture/", "/look/"]) + draw.choice(OUT)
        elif kind == 1:
            target = draw.choice(["/picture/", "/like/", "/look/", "/cosine/", "/attention/"]) + draw.choice(NUMBERS)
        elif kind == 2:
            target = draw.choice(["/?q=", "/look/1?q=", "/cosine/1?q=", "/attention/1?q=", "/like/1?q="]) + draw.choice(TEXTS)
        elif kind == 3:
            head = draw.choice(HEADS)
        elif kind == 4:
            method = draw.choice(METHODS)
        elif kind == 5:
            version = draw.choice(["HTTP/9.9", "HTTP/1.1 x", "", "HTTP/a.b", "XTTP/1.1", "HTTP/0.9"])
        elif kind == 6:
            return draw.randbytes(draw.choice([0, 1, 30, 3000])) + b"\r\n\r\n"
        else:
            target = "/" + "".join(map(chr, draw.choices(range(1, 0x250), k=draw.choice([3, 30, 70000]))))
    head = head.replace(b"%d", str(port).encode())
    raw = f"{method} {target} {version}\r\n".encode("utf-8", "surrogatepass") + head + b"\r\n"
    return raw[:draw.randrange(len(raw))] if draw.random() < 0.1 else raw


def ask(port, raw, patience=5):
    """-> all bytes of the answer. The other side may close while we still send."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), patience) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                answer += part
    return answer


def get(port, target, host=None):
    """A good request -> (status, headers, body)."""
    head, _, body = ask(port, f"GET {target} HTTP/1.1\r\nHost: {host or f'127.0.0.1:{port}'}\r\n\r\n".encode()).partition(
        b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), body


@contextlib.contextmanager
def running(library):
    """A server in a thread -> its port."""
    with serve.open_server(0, library) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def tree(folder):
    """Every file below a folder, with its size and time."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in pathlib.Path(folder).rglob("*")}


def fuzz(library, folder, seeds):
    """-> (how many answers of each form, what is wrong in words)."""
    (pathlib.Path(folder).parent / "secret.txt").write_bytes(SECRET)
    before, wrong, counts, printed = tree(pathlib.Path(folder).parent), [], {}, io.StringIO()
    with running(library) as port, contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        for seed in seeds:
            draw = random.Random(seed)
            raw = bad_request(draw, port)
            try:
                answer = ask(port, raw)
            except OSError as error:
                wrong.append(f"seed {seed}: {error!r} to {raw[:80]}")
                continue
            kind = FORM.match(answer)
            if not kind:
                wrong.append(f"seed {seed}: {answer[:80]} to {raw[:80]}")
                continue
            counts[kind.lastgroup] = counts.get(kind.lastgroup, 0) + 1
            if SECRET in answer or b"root:" in answer or b"Traceback" in answer or b"<script>alert" in answer:
                wrong.append(f"seed {seed}: {raw[:80]} got {answer[:300]}")
            if seed % 20 == 0 and get(port, "/?q=" + urllib.parse.quote("ein Hund"))[0] != 200:
                wrong.append(f"seed {seed}: no longer alive")
    if printed.getvalue():
        wrong.append(f"printed: {printed.getvalue()[:500]}")
    if tree(pathlib.Path(folder).parent) != before:
        wrong.append("the folder changed")
    return counts, wrong


def tiny_library(folder):
    """Six drawings and a random model."""
    tokenizer = data.demo_tokenizer(4000)
    config = dataclasses.replace(PRESETS["demo"], vocabulary=tokenizer.size, width=32, embedding=16, image_size=32)
    for i, row in enumerate(emoji.split("val")[:6]):
        row["image"].save(f"{folder}/{i}.png")
    pictures = search.find_pictures(folder)
    model = CCLM(config).eval()
    vectors = [torch.from_numpy(vector) for _, vector in search.encode_pictures(model, pictures, [])]
    return search.Library(model, tokenizer, pictures, torch.stack(vectors))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = os.path.join(place, "pictures")
        os.mkdir(folder)
        counts, wrong = fuzz(tiny_library(folder), folder, range(args.seed, args.seed + args.requests))
    print(*wrong, sep="\n")
    print(f"{args.requests} requests, answers {dict(sorted(counts.items()))}: {len(wrong)} things are wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
