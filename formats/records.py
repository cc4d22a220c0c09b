"""Records of files on disk: what a file holds, without unpacking, converting or copying it.

    Tar          webdataset: KEY.jpg|jpeg|png|webp beside KEY.json {"captions": C} or KEY.txt
    ImageLines   {"image" | "binary" | "img_path": path or base64,
                  "captions" | "caption" | "desc" | "sentences": C}
                 C: {language: text or [texts]}, a list of such, a text, or a list of texts
    PairLines    {"text": {language: text}}, or {"source_text": text, "target_text": text}
    Columns      two columns with a tab between, or three: a score first (WikiMatrix)
    PlainText    NAME.en NAME.de ...: line i of each says the same

reader.record(i) -> (bytes of the image, or bytes that identify a pair; {language: [texts]}).
One pass over a file notes where each record starts. These numbers lie beside it in .FILE.index, or
in the cache folder, and a record is read from its offset: all orders of reading cost the same.
"""
import base64
import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import sys
import tarfile
import uuid

import numpy as np
import torch
from tqdm import tqdm

IMAGE_KEYS = ("image", "binary", "img_path")
CAPTION_KEYS = ("captions", "caption", "desc", "sentences")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LARGEST = 1 << 28                   # bytes of a record: a longer one is no record but a broken file
COMPRESSED = rb"\x1f\x8b|PK\x03\x04|BZh\d|\xfd7zX|\(\xb5/\xfd"          # gzip zip bzip2 xz zstd
TOLERATED = 10                      # bad records among the last WINDOW of a process; more stop it
WINDOW = 1000


class BadRecord(Exception):
    """A record cannot be read: file, record and reason in one line."""


@contextlib.contextmanager
def reading(reader, i):
    """The one place where what is wrong with record i becomes a BadRecord. Exception is broad on
    purpose: on damaged bytes json, base64 and Pillow raise almost anything, and one record of a
    million must not end a run. Training stops when there are many (sources.BadRecords)."""
    try:
        yield
    except Exception as error:
        raise BadRecord(f"{reader.where(i)}: {reason(error)}") from error


def reason(error):
    """One short line that can be printed anywhere."""
    text = str(error) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"no field {error}"
    text = re.sub("<_io[^>]*>", "", text)                           # Pillow names the buffer
    return " ".join(text.split())[:240].encode("utf-8", "backslashreplace").decode()


# --------------------------------------------------------------------------------------------------
# The index: where records start
# --------------------------------------------------------------------------------------------------

VERSION = 0x334D4C4343              # of the index; also tells an index from another file


def indexed(path, scan, cache=None, label=""):
    """The int64 numbers that scan(open file, its size) yields in pieces: (how far it is, array).

    They are kept on disk and made again when the size or time of `path` changes. The array that
    comes back is a view of that file: a number is read when it is asked for."""
    path = os.path.abspath(path)
    name = f".{os.path.basename(path)}{label}.index"                # hidden: no pattern names it
    place = os.path.join(os.path.dirname(path), name)
    if cache:                                                       # files may have the same name
        place = os.path.join(cache, hashlib.sha1(path.encode()).hexdigest()[:12] + name)
    status = os.stat(path)
    stamp = [VERSION, status.st_size, status.st_mtime_ns]
    with contextlib.suppress(OSError):                              # there may be no index yet
        numbers = mapped(place)
        if numbers[-3:].tolist() == stamp:                          # not so if it was cut off
            return numbers[:-3]
    write_index(path, scan, place, stamp)
    return mapped(place)[:-3]


def mapped(place):
    """The numbers of an index and its stamp. torch.from_file does not keep the file open, as
    numpy.memmap does: there may be more shards than a process may have open files."""
    count = os.path.getsize(place) // 8
    try:
        return torch.from_file(place, size=count, dtype=torch.int64).numpy()
    except RuntimeError:                                            # a name that is not UTF-8
        return np.fromfile(place, np.int64)


def write_index(path, scan, place, stamp):
    """Written under another name and renamed: another process sees a whole index or none. Two that
    do this at the same time do it twice, with the same result."""
    temporary = f"{place}.{uuid.uuid4().hex}.tmp"                   # also on a shared disk
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(path, "rb") as file, open(temporary, "wb") as out, tqdm(
                desc=f"indexing {path}", total=stamp[1], unit="B", unit_scale=True, leave=False,
                disable=not sys.stderr.isatty()) as bar:
            for position, numbers in scan(file, stamp[1]):
                out.write(numbers.astype(np.int64).tobytes())
                bar.update(position - bar.n)
            out.write(np.array(stamp).tobytes())
        os.replace(temporary, place)
    except OSError as error:
        raise ValueError(f"index {place} cannot be written ({error.strerror}): name a folder with "
                         f"--cache") from None
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)             # there when something failed


def scan_lines(file, size):
    """Where lines start and, after them, the size of the file. Blank lines at the end are none."""
    starts = np.zeros(1, np.int64)                                  # of lines without text so far
    position = 0
    while block := file.read(1 << 24):
        newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        starts = np.concatenate([starts, position + newlines + 1])
        text = len(block.rstrip())                                  # the last text of this block
        if text:
            yield position + text, starts[starts < position + text]
            starts = starts[starts >= position + text]
        position += len(block)
    yield position, np.array([size])


# A row of a tar's index: offset and size of the image, of the text, and whether the text is JSON.
# A size of -1 says that the record has none.
EMPTY = (0, -1, 0, -1, 0)


def scan_tar(file, size):
    """A row for every KEY, in pieces of some thousand rows."""
    rows = []
    for row in tar_rows(file, size):
        rows.append(row)
        if len(rows) == 10_000:
            yield file.tell(), np.array(rows)
            rows.clear()
    yield size, np.array(rows, np.int64)


def tar_rows(file, size):
    """The members of one KEY lie side by side: a row ends where the next KEY begins. A damaged
    stretch took members of the KEY before it, of the KEY after it, or whole records: if both KEYs
    are complete, an empty row stands for what is lost. So damage is counted, once."""
    key = None
    row = list(EMPTY)
    damaged = False
    for member in tar_members(file, size):
        if member is None:
            if -1 not in row:                                       # complete: not hurt itself
                yield row
                key = None
                row = list(EMPTY)
            damaged = True
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.lower().partition(".")
        is_image = f".{suffix}" in SUFFIXES
        is_json = suffix == "json"
        if not member.isreg() or not (is_image or is_json or suffix == "txt"):
            continue
        name = folder, base[:len(stem)]
        twice = row[1] >= 0 if is_image else row[3] >= 0 and row[4] == is_json
        if key and (name != key or twice):
            yield from ended(key, row, damaged)
            row = list(EMPTY)
            damaged = False
        key = name
        if is_image:
            row[:2] = member.offset_data, member.size
        elif is_json or not row[4]:                                 # KEY.json goes before KEY.txt
            row[2:] = member.offset_data, member.size, int(is_json)
    yield from ended(key, row, damaged)


def ended(key, row, damaged):
    """The rows to write when a KEY ends. damaged: was there a stretch that cannot be read?"""
    if damaged and (key is None or -1 not in row):
        yield EMPTY
    if key:
        yield row


def tar_members(file, size):
    """tarfile.TarInfo of every member, None for a block of 512 bytes that is no header.

    tarfile reads the headers, but the loop is ours: tarfile.open(ignore_zeros=True) passes over
    damage silently, and ends for ever at a long name whose member is damaged."""
    # An empty archive, for its settings.
    tar = tarfile.open(fileobj=io.BytesIO(bytes(1024)))
    tar.fileobj = file
    position = 0
    while position < size:
        file.seek(position)
        position += 512
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:
            continue                            # zeros: the end, but another may be joined to it
        except (tarfile.HeaderError, ValueError):
            yield None
            continue
        yield member
        # After its data. A damaged size may be below 0 and would lead back.
        position = max(position, tar.offset)


# --------------------------------------------------------------------------------------------------
# Readers
# --------------------------------------------------------------------------------------------------

class Reader:
    """A file and its index. names: the languages of texts that come without one."""
    scan = staticmethod(scan_lines)
    images = False

    def __init__(self, path, names=(), cache=None, root=None):
        self.path = path
        self.root = os.path.abspath(root or os.path.dirname(path))
        tagged = re.fullmatch(r"(?:.*[._])?([a-z]{2,3})-([a-z]{2,3})\.\w+", os.path.basename(path))
        self.names = names
        if tagged and not names:                                    # WikiMatrix.de-en.tsv
            self.names = tagged.groups()
        with open(path, "rb") as file:
            if re.match(COMPRESSED, file.read(4)):
                raise ValueError(f"{path} is compressed: unpack it, records are read by offset")
        status = os.stat(path)
        self.size = status.st_size
        self.time = status.st_mtime_ns
        self.index = indexed(path, self.scan, cache)

    def __len__(self):
        return len(self.index) - 1                                  # the last number is the end

    def read(self, start, length):
        """Opened for every record: as many shards as one likes, and a change is noticed."""
        if length > LARGEST:
            raise ValueError(f"a record of {length:,} bytes is longer than {LARGEST:,}")
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (self.size, self.time):
                raise ValueError("the file changed since it was indexed: start again")
            file.seek(start)
            raw = file.read(length)
        if len(raw) < length:
            raise ValueError("the file ends inside the record")
        return raw

    def line(self, i):
        start, end = self.index[i:i + 2].tolist()
        return self.read(start, end - start).partition(b"\n")[0]    # without blank lines at the end

    def where(self, i):
        return f"{self.path} line {i + 1}"

    def texts(self, i):
        """{language: [texts]} alone."""
        return self.record(i)[1]

    def json(self, i):
        row = json.loads(self.line(i))
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        return row


class Tar(Reader):
    scan = staticmethod(scan_tar)
    images = True

    def __len__(self):
        return len(self.index) // len(EMPTY)

    def where(self, i):
        return f"{self.path} record {i + 1}"

    def row(self, i):
        return self.index[len(EMPTY) * i:len(EMPTY) * (i + 1)].tolist()

    def record(self, i):
        start, length, *_ = self.row(i)
        return self.part(start, length, "image"), self.texts(i)

    def texts(self, i):
        _, _, start, length, is_json = self.row(i)
        raw = self.part(start, length, "caption")
        if is_json:
            return captions(pick(json.loads(raw), CAPTION_KEYS), self.names)
        return captions(raw.decode("utf-8-sig").strip(), self.names)

    def part(self, start, length, what):
        if length < 0:
            raise ValueError(f"no {what} next to it (tar --sort=name keeps a KEY together), or it "
                             f"is a link, or its header is broken")
        return self.read(start, length)


class ImageLines(Reader):
    images = True

    def record(self, i):
        row = self.json(i)
        return self.image(pick(row, IMAGE_KEYS)), captions(pick(row, CAPTION_KEYS), self.names)

    def texts(self, i):
        return captions(pick(self.json(i), CAPTION_KEYS), self.names)

    def image(self, field):
        """Bytes of an image in base64, or of a file below the folder of images."""
        if not isinstance(field, str) or not field:
            raise ValueError(f"the image is {type_name(field)}, not a path or base64")
        start = b""
        with contextlib.suppress(ValueError):                       # a path
            start = base64.b64decode(field[:24], validate=True)
        if start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")) or start[8:12] == b"WEBP":
            return base64.b64decode("".join(field.split()), validate=True)      # MIME breaks lines
        path = os.path.normpath(os.path.join(self.root, field))
        if not path.startswith(os.path.join(self.root, "")):
            raise ValueError(f"refused: image {field[-60:]} lies outside {self.root}; --image_root "
                             f"names its folder")
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
        return pair([row["source_text"], row["target_text"]], self.names)


class Columns(Reader):
    def record(self, i):
        columns = self.line(i).decode("utf-8-sig").strip("\r\n").split("\t")
        if len(columns) == 3:
            float(columns.pop(0))                                   # the score must be a number
        if len(columns) != 2:
            raise ValueError(f"{len(columns)} column(s), not two")
        return pair(columns, self.names)


class PlainText(Reader):
    """Files of the same length as one reader. path: NAME.*; files: {language: path}."""

    def __init__(self, path, files, cache=None):
        self.path = path
        self.files = {k: Reader(file, (k,), cache) for k, file in files.items()}
        self.size = sum(reader.size for reader in self.files.values())
        if len(files) < 2 or len({len(reader) for reader in self.files.values()}) > 1:
            lengths = ", ".join(f"{k} has {len(lines):,} lines" for k, lines in self.files.items())
            raise ValueError(f"{path}: {lengths} (no blank ones at the end); plain text is two "
                             f"files NAME.LANGUAGE or more, line i of each says the same; columns "
                             f"end in .tsv, JSON lines in .jsonl")

    def __len__(self):
        return min(len(reader) for reader in self.files.values())

    def record(self, i):
        texts = {k: reader.line(i).decode("utf-8-sig").strip() for k, reader in self.files.items()}
        return json.dumps(texts).encode(), captions(texts, ())


# --------------------------------------------------------------------------------------------------
# What a record says
# --------------------------------------------------------------------------------------------------

def pick(row, keys):
    """The first of these fields that the row has."""
    for key in keys:
        if key in row:
            return row[key]
    raise ValueError(f"no field {' or '.join(keys)}")


def type_name(value):
    names = {"NoneType": "null", "str": "a text", "dict": "an object", "list": "a list"}
    name = type(value).__name__
    return names.get(name, f"of type {name}")


def pair(texts, names):
    """Two texts without languages: those of the file's name, else "source" and "target"."""
    languages = names if len(names) == 2 else ("source", "target")
    return json.dumps(texts).encode(), captions(dict(zip(languages, texts)), ())


def captions(value, names):
    """Captions in any accepted shape -> {language: [texts]}. ValueError on an empty one or another
    type. names: the language of texts that come without one, where it is one."""
    unnamed = names[0] if len(names) == 1 else "unknown"
    found = {}
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, dict):
            part = {unnamed: [part]}
        for language, texts in part.items():
            for text in texts if isinstance(texts, list) else [texts]:
                check_text(text, language)
                found.setdefault(language, []).append(text)
    if not found:
        raise ValueError("no text")
    return found


def check_text(text, language):
    if not isinstance(text, str):
        raise ValueError(f"a text in {language} is {type_name(text)}")
    if not text.strip():
        raise ValueError(f"a text in {language} is empty")
    (language + text).encode()                                      # fails on half a surrogate pair


def identity(raw):
    """One int64, equal for equal images or pairs: those are no negatives of each other."""
    return int.from_bytes(hashlib.sha1(raw).digest()[:8], "little", signed=True)
