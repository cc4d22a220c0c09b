"""Records of files on disk, by byte offset: what a file holds, found without unpacking, copying or keeping it.

    Tar          webdataset: KEY.jpg|jpeg|png|webp beside KEY.json {"captions": C} or KEY.txt
    ImageLines   {"image" | "binary" | "img_path": path or base64, "captions" | "caption" | "desc" | "sentences": C}
                 C: {language: text or [texts]}, a list of such, a text, or a list of texts
    PairLines    {"text": {language: text}}, or the official {"source_text": text, "target_text": text}
    Columns      two columns with a tab between; or three, WikiMatrix's score first
    PlainText    NAME.en NAME.de ...: line i says the same in each

record(i) -> (bytes of the image, or what identifies a pair; {language: [texts]}), or an exception. One fast
pass notes where each record starts. The notes, 8 bytes a line, lie in .FILE.index (or in the cache folder) and are
read like the records, a few bytes at an offset: neither a million records nor a thousand shards cost memory.
"""
import base64
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import struct
import sys
import tarfile
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

IMAGE_KEYS, CAPTION_KEYS = ("image", "binary", "img_path"), ("captions", "caption", "desc", "sentences")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LARGEST = 1 << 28                                     # bytes of a record: longer is no record but a broken file
TOLERATED, WINDOW = 10, 1000                          # bad records among a process's last ones, before training stops


class BadRecord(Exception):
    """A record cannot be read: file, record and reason in one line."""


@contextlib.contextmanager
def reading(reader, i):
    """The one place where what is wrong with record i becomes a BadRecord."""
    try:
        yield
    except Exception as error:                  # broad: damaged bytes make json, base64 and Pillow
        raise BadRecord(f"{reader.where(i)}: {reason(error)}") from error       # raise anything


# ------------------------------------------------------------------------------------------------------------------
# The index: where records start
# ------------------------------------------------------------------------------------------------------------------

VERSION = 0x324D4C4343                                                       # also tells an index from another file


@functools.lru_cache(64)                                                     # a process may open about a thousand files
def opened(path, size=None, time=None, version=None):
    """A file, for os.pread; OSError when it is no longer the one that was indexed. A deleted one is readable while it
    is open. version: only tells an index from the one before it in this cache."""
    file = open(path, "rb", buffering=0)
    status = os.fstat(file.fileno())
    if size is not None and (status.st_size, status.st_mtime_ns) != (size, time):
        raise OSError("the file changed since it was indexed: start again")
    return file


class Index:
    """int64 numbers on disk, read a few at a time: no memory, no open file for each of thousands of shards."""

    def __init__(self, place, stamp):
        self.place, self.stamp, self.length = place, stamp, os.path.getsize(place) // 8 - 4

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.read(i, 1)[0]

    def read(self, start, count):
        file = opened(self.place, version=tuple(self.stamp))
        return struct.unpack(f"{count}q", os.pread(file.fileno(), 8 * count, 8 * (4 + start)))


def indexed(path, scan, cache=None, label=""):
    """The Index of what scan(open file, size) yields: (how far it is, array). Made once, and again when the file's size
    or time changed; other processes wait for the one that is at it. Written beside its place and renamed."""
    path = os.path.abspath(path)
    status = os.stat(path)
    head = [VERSION, status.st_size, status.st_mtime_ns]
    name = f".{os.path.basename(path)}{label}.index"                         # hidden: `train.*` shall not name it
    place = os.path.join(cache, hashlib.sha1(path.encode()).hexdigest()[:12] + name) if cache else (
        os.path.join(os.path.dirname(path), name))

    def ready():
        with contextlib.suppress(OSError):
            found = np.fromfile(place, np.int64, 4).tolist()
            return found[:3] == head and os.path.getsize(place) == 8 * (4 + found[3])

    if not ready():
        with open(path, "rb") as file:
            with contextlib.suppress(OSError):                               # some network disks cannot lock
                fcntl.flock(file, fcntl.LOCK_EX)
            if not ready():
                write_index(file, scan, place, head)
    return Index(place, head[1:])


def write_index(file, scan, place, head):
    beside, count = f"{place}.{os.getpid()}.tmp", 0
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(beside, "wb") as out, tqdm(desc=f"indexing {file.name}", total=head[1], unit="B", unit_scale=True,
                                             leave=False, disable=not sys.stderr.isatty()) as bar:
            np.array([*head, 0]).tofile(out)
            for at, numbers in scan(file, head[1]):
                numbers.astype(np.int64).tofile(out)
                count += numbers.size
                bar.update(at - bar.n)
            out.seek(24)
            np.array([count]).tofile(out)
        os.replace(beside, place)
    except OSError as error:                                                 # numpy tells a full disk without strerror
        raise ValueError(f"index {place} cannot be written ({error.strerror or error}): name a folder with --cache"
                         ) from None
    finally:
        with contextlib.suppress(OSError):                                   # there only when something failed
            os.unlink(beside)


def scan_lines(file, size):
    """Starts of lines, and where the last one ends. Blank lines at the end are none."""
    at, end = 0, size
    while end and (tail := os.pread(file.fileno(), min(end, 1 << 16), max(0, end - (1 << 16)))):
        end -= len(tail) - len(tail.rstrip())
        if tail.rstrip():
            break
    yield 0, np.zeros(int(end > 0), np.int64)
    while block := file.read(1 << 24):
        starts = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (at + 1)
        at += len(block)
        yield at, starts[starts < end]
    yield at, np.full(int(end > 0), size)


class Member(NamedTuple):
    name: str
    size: int
    type: bytes


def header(head):
    """512 bytes -> Member, or None where the checksum is wrong. tarfile.TarInfo.frombuf does it too, several times as
    slowly: a million images are two million headers."""
    try:
        if len(head) < 512 or sum(head) - sum(head[148:156]) + 8 * 32 != int(head[148:156].strip(b" \0"), 8):
            return None
        size = (int(head[124:136].strip(b" \0") or b"0", 8) if head[124] < 128 else
                int.from_bytes(head[125:136], "big"))                        # 8 GB and more
    except ValueError:
        return None
    name = head[:100].split(b"\0", 1)[0]
    if head[257:263] == b"ustar\0" and head[345]:                            # GNU's own form has other things there
        name = head[345:500].split(b"\0", 1)[0] + b"/" + name
    return Member(name.decode("utf-8", "surrogateescape"), size, head[156:157]) if 0 <= size < 1 << 62 else None


def members(file, size):
    """(offset, Member) of each member of a tar; None for a stretch where no header can be read."""
    at, name, hurt = 0, None, False
    while at < size:
        head = os.pread(file.fileno(), 512, at)
        at += 512
        if not any(head):                                                    # end mark
            continue
        info = header(head)
        if info is None:                                                     # the next header may be whole
            if not hurt:
                yield at, None
            name, hurt = None, True
            continue
        hurt = False
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):         # the next member's long name
            body = os.pread(file.fileno(), min(info.size, LARGEST), at)
            path = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", body)
            longer = body.rstrip(b"\0") if info.type == tarfile.GNUTYPE_LONGNAME else path and path[1]
            name = longer.decode("utf-8", "surrogateescape") if longer else name
        elif info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            yield at, info._replace(name=name) if name else info
            name = None
        at += -(-info.size // 512) * 512


NOTHING = (0, -1, 0, -1, 0)        # image's offset and size, text's offset and size, is it JSON; -1: none, -2: refused


def scan_tar(file, size):
    """A row of five numbers for every KEY. A stretch without headers is one bad record with the KEY that it cut."""
    rows, key, row, hurt = [], None, list(NOTHING), False

    def close():
        if hurt and (key is None or -1 not in row):                          # what was lost is nobody's half
            rows.append(NOTHING)
        if key is not None:
            rows.append(row)

    for at, info in members(file, size):
        if info is None:
            if -1 not in row:
                close()
                key, row = None, list(NOTHING)
            hurt = True
            continue
        folder, _, base = info.name.rpartition("/")
        stem, _, kind = base.partition(".")
        kind = "." + kind.lower()
        if info.type == tarfile.DIRTYPE or kind not in (*SUFFIXES, ".json", ".txt"):
            continue
        again = row[1] != -1 if kind in SUFFIXES else row[3] != -1 and row[4] == (kind == ".json")
        if key not in (None, (folder, stem)) or again:                       # a KEY twice: two records
            close()
            row, hurt = list(NOTHING), False
        key = folder, stem
        escapes = info.type not in (b"0", b"\0", b"7") or info.name.startswith("/") or ".." in info.name.split("/")
        if kind in SUFFIXES:
            row[:2] = at, -2 if escapes else info.size
        elif kind == ".json" or not row[4]:                                  # KEY.json goes before KEY.txt
            row[2:] = at, -2 if escapes else info.size, kind == ".json"
        if len(rows) > 10_000:
            yield at, np.array(rows)
            rows.clear()
    close()
    yield size, np.array(rows, np.int64).reshape(-1)


# ------------------------------------------------------------------------------------------------------------------
# Readers: record(i) -> (bytes of the image, or what identifies a pair; {language: [texts]})
# ------------------------------------------------------------------------------------------------------------------

class Reader:
    """A file and its index. names: the languages of texts that come without one."""
    scan, images = staticmethod(scan_lines), False

    def __init__(self, path, names=(), cache=None, root=None):
        self.path, self.root = path, os.path.abspath(root or os.path.dirname(path))
        inferred = re.fullmatch(r"(?:.*[._])?([a-z]{2,3})-([a-z]{2,3})\.\w+", os.path.basename(path))
        self.names = names or (inferred.groups() if inferred else ())
        with open(path, "rb") as file:
            if re.match(rb"\x1f\x8b|PK\x03\x04|BZh\d|\xfd7zX|\(\xb5/\xfd", file.read(4)):  # gzip zip bzip2 xz zstd
                raise ValueError(f"{path} is compressed: unpack it first, records are read by offset")
        self.index = indexed(path, self.scan, cache)
        self.size = self.index.stamp[0]                                      # bytes

    def __len__(self):
        return max(0, len(self.index) - 1)

    def read(self, start, length):
        if length > LARGEST:
            raise ValueError(f"a record of {length:,} bytes is longer than {LARGEST:,}")
        raw = os.pread(opened(self.path, *self.index.stamp).fileno(), length, start)
        if len(raw) < length:
            raise ValueError("the file ends inside the record")
        return raw

    def line(self, i):
        start, end = self.index.read(i, 2)
        return self.read(start, end - start).partition(b"\n")[0]             # the last: without blank lines after it

    def where(self, i):
        return f"{self.path} line {i + 1}"

    def texts(self, i):
        return self.record(i)[1]

    def json(self, i):
        row = json.loads(self.line(i))
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        return row


class Tar(Reader):
    scan, images = staticmethod(scan_tar), True

    def __len__(self):
        return len(self.index) // 5

    def where(self, i):
        return f"{self.path} record {i + 1}"

    def part(self, start, length, what):
        if length < 0:
            raise ValueError(f"the {what} is a link or its name leads outside the archive: refused" if length == -2 else
                             f"no {what} next to it (tar --sort=name keeps a KEY together), or its header is broken")
        return self.read(start, length)

    def record(self, i):
        image, size, text, length, is_json = self.index.read(5 * i, 5)
        return self.part(image, size, "image"), self.captions(text, length, is_json)

    def captions(self, text, length, is_json):
        raw = self.part(text, length, "caption")
        return captions(pick(json.loads(raw), CAPTION_KEYS) if is_json else raw.decode("utf-8-sig").strip(), self.names)

    def texts(self, i):                                                      # without reading the image
        return self.captions(*self.index.read(5 * i + 2, 3))


class ImageLines(Reader):
    images = True

    def record(self, i):
        row = self.json(i)
        return self.image(pick(row, IMAGE_KEYS)), captions(pick(row, CAPTION_KEYS), self.names)

    def texts(self, i):
        return captions(pick(self.json(i), CAPTION_KEYS), self.names)

    def image(self, field):
        """Bytes of an image in base64, or of a file whose path does not lead out of its folder."""
        if not isinstance(field, str) or not field:
            raise ValueError(f"the image is {kind(field)}, not a path or base64")
        start = b""
        with contextlib.suppress(ValueError):                                # not even the start is base64: a path
            start = base64.b64decode(field[:24], validate=True)
        if start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")) or start[8:12] == b"WEBP":
            return base64.b64decode("".join(field.split()), validate=True)     # MIME breaks its lines
        path = os.path.normpath(os.path.join(self.root, field))
        if not path.startswith(os.path.join(self.root, "")):
            raise ValueError(f"refused: image {field[-60:]} lies outside {self.root}; --image_root names its folder")
        if not os.path.isfile(path):
            raise ValueError(f"no such image {path[-80:]}")
        if os.path.getsize(path) > LARGEST:
            raise ValueError(f"image {path[-80:]} is longer than {LARGEST:,} bytes")
        return pathlib.Path(path).read_bytes()


class PairLines(Reader):
    def record(self, i):
        row = self.json(i)
        if "text" in row:
            return json.dumps(row["text"]).encode(), captions(row["text"], ())
        return two([row["source_text"], row["target_text"]], self.names)


class Columns(Reader):
    def record(self, i):
        columns = self.line(i).decode("utf-8-sig").strip("\r\n").split("\t")
        if len(columns) == 3:
            float(columns.pop(0))                                            # WikiMatrix's score
        if len(columns) != 2:
            raise ValueError(f"{len(columns)} column(s), not two")
        return two(columns, self.names)


class PlainText(Reader):
    """NAME.en NAME.de ... as one. path: NAME.*; files {language: path}."""

    def __init__(self, path, files, cache=None):
        self.path, self.files = path, {k: Reader(file, (k,), cache) for k, file in files.items()}
        self.size, lengths = sum(r.size for r in self.files.values()), {len(r) for r in self.files.values()}
        if len(files) < 2 or len(lengths) > 1:
            raise ValueError(f"{path}: " + ", ".join(f"{k} has {len(f):,} lines" for k, f in self.files.items())
                             + " (no blank ones at the end); plain text is two files NAME.LANGUAGE or more, line i of "
                             "each says the same; columns end in .tsv, JSON lines in .jsonl")

    def __len__(self):
        return len(next(iter(self.files.values())))

    def record(self, i):
        said = {k: [reader.line(i).decode("utf-8-sig").strip()] for k, reader in self.files.items()}
        return json.dumps(said).encode(), captions(said, ())


def kind(value):
    return {"NoneType": "null", "str": "a text", "dict": "an object", "list": "a list"}.get(
        type(value).__name__, f"of type {type(value).__name__}")


def pick(row, keys):
    found = [row[key] for key in keys if key in row] if isinstance(row, dict) else []
    if not found:
        raise ValueError(f"no field {' or '.join(keys)}")
    return found[0]


def two(texts, names):
    """A pair without language tags; languages it has: those of the name, else "source" and "target"."""
    names = names if len(names) == 2 else ("source", "target")
    return json.dumps(texts).encode(), captions(dict(zip(names, texts)), ())


def captions(value, names):
    """Captions in any accepted shape -> {language: [texts]}. ValueError on an empty one or another type."""
    said, unnamed = {}, names[0] if len(names) == 1 else "unknown"          # my-set.jsonl has no languages my and set
    for part in value if isinstance(value, list) else [value]:
        for language, texts in (part if isinstance(part, dict) else {unnamed: part}).items():
            for text in texts if isinstance(texts, list) and isinstance(part, dict) else [texts]:
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"a text in {language} is " + ("empty" if isinstance(text, str) else kind(text)))
                f"{language} {text}".encode()                                # ValueError on half a surrogate pair
                said.setdefault(language, []).append(text)
    if not said:
        raise ValueError("no text")
    return said


def identity(raw):
    """One int64, equal for equal images or pairs: those are no wrong partners of each other."""
    return int.from_bytes(hashlib.sha1(raw).digest()[:8], "little", signed=True)


def reason(error):
    """One short line."""
    text = f"no field {error}" if isinstance(error, KeyError) else re.sub("<_io[^>]*>", "", str(error))
    return (" ".join(text.split()) or type(error).__name__)[:240].encode("utf-8", "backslashreplace").decode()
