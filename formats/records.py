"""Records of files on disk: what a file holds, without unpacking, converting or copying it.

    Tar          webdataset: KEY.jpg|jpeg|png|webp beside KEY.json {"captions": C} or KEY.txt
    Pictures     a folder with the same in files, also KEY.en.txt, KEY.de.txt ...
    ImageLines   {"image" | "binary" | "img_path" | "file_name" | ...: path or base64,
                  "captions" | "caption" | "desc" | "sentences" | "text": C}
                 C: {language: text or [texts]}, a list of such, a text, or a list of texts, which
                 are in the "language" or "lang" of the row; also [{"text" | "raw": text, "lang": }]
    PairLines    {"text" | "translation": {language: text}},
                 or {"source_text": text, "target_text": text}
    Columns      two columns with a tab between, or three: the first is a score (WikiMatrix)
    PlainText    NAME.en NAME.de ...: line i of each says the same

reader.record(i) -> (bytes of the image, or bytes that identify a pair; {language: [texts]}).
One pass over a file notes where each record starts. These numbers lie beside it in .FILE.index, or
in the cache folder, and a record is read from its offset: all orders of reading cost the same.
"""
import base64
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import sys
import tarfile
import types
import uuid

import numpy as np
import torch
from tqdm import tqdm

IMAGE_KEYS = ("image", "binary", "img_path", "image_path", "file_name", "filename", "path")
CAPTION_KEYS = ("captions", "caption", "desc", "sentences", "text")
LANGUAGE_KEYS = ("language", "lang", "LANGUAGE")
TEXT_KEYS = ("raw", "text", "caption")          # of a caption that is an object of its own
PAIR_KEYS = ("text", "translation")
LARGEST = 1 << 28                   # bytes of a record: a longer one is no record but a broken file

# What a suffix says of a file beside others, or of a member of an archive. KEY is all before it.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PARTS = dict.fromkeys(SUFFIXES, "image") | {".json": "json", ".txt": "txt"}
NO_LANGUAGES = ("alt bak bin cap cfg csv doc gz ids idx ini jpg log md npy old pdf png py raw tar "
                "tmp tsv txt xml xz zip").split()

# What is not read as it lies: how it begins -> what it is and what to do.
COMPRESSED = {                      # the first bytes of gzip, zip, bzip2, xz and zstd
    rb"\x1f\x8b|PK\x03\x04|BZh\d|\xfd7zX|\(\xb5/\xfd":
        "is compressed: unpack it, records are read by offset"}
LINES = 'docs/data.md, "Other layouts", has the command that makes JSON lines of it'
OTHERS = COMPRESSED | {
    rb"(?s)\xff\xfe.\x00|\xfe\xff\x00": "is in UTF-16: save it in UTF-8",
    rb"PAR1": f"is a Parquet file: {LINES}",
    rb"\s*\[\s*\{": f"is one JSON array: {LINES}",
    # An object whose field "images", or whose first field "annotations", is a list of objects.
    rb'(?s)\s*\{(.*"images"|\s*"annotations")\s*:\s*\[\s*\{':
        f"looks like the captions JSON of COCO or Karpathy: {LINES}",
    # 123.jpg, with #0 or without, and a tab.
    rb"\S+\.(jpg|jpeg|png)(#\d+)?\t": f"looks like a list of pictures with captions: {LINES}",
    # A header without tabs: image,caption or "file_name"|"text".
    rb'"?(image|file)\w*"?[,|][^\t\n]*\n': f"looks like CSV: {LINES}"}


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
    return printable(" ".join(text.split())[:240])


def printable(text):
    return text.encode("utf-8", "backslashreplace").decode()


def is_language(suffix):
    """Does it look like a language code: en, ceb, pt-BR, zh_Hans?"""
    code = re.fullmatch(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,4})*", suffix)
    return bool(code) and suffix not in NO_LANGUAGES


def part_of(name):
    """A name -> "image", "json" or "txt"; None for what is left alone. That are also names that
    begin with a dot: macOS puts ._0001.jpg beside 0001.jpg."""
    if os.path.basename(name).startswith("."):
        return None
    return PARTS.get(os.path.splitext(name)[1].lower())


def is_picture(file):
    return part_of(file) == "image"


def languages_of_name(path):
    """WikiMatrix.de-en.tsv, de-zh_Hans.tsv -> ("de", "en" or "zh_Hans"); () for a name without."""
    code = r"([a-z]{2,3}(?:_[A-Z][A-Za-z]{1,3})?)"
    tagged = re.fullmatch(rf"(?:.*[._-])?{code}-{code}\.\w+", os.path.basename(path))
    return tagged.groups() if tagged and tagged[1] != tagged[2] else ()


def other_layout(path, layouts=OTHERS):
    """What a file is that cannot be read as it lies, in words; else ""."""
    with open(path, "rb") as file:
        head = file.read(1 << 13)
    return next((what for start, what in layouts.items() if re.match(start, head)), "")


# --------------------------------------------------------------------------------------------------
# The index: where records start
# --------------------------------------------------------------------------------------------------

VERSION = 0x354D4C4343              # of the index; also tells an index from another file


def place_beside(path, suffix, cache=None):
    """Where what is known of a file or folder is kept: beside it, hidden, so that no pattern names
    it; or in the folder `cache`."""
    path = os.path.abspath(path)
    name = f".{os.path.basename(path)}{suffix}"
    if cache:                                                       # files may have the same name
        return os.path.join(cache, hashlib.sha1(os.fsencode(path)).hexdigest()[:12] + name)
    return os.path.join(os.path.dirname(path), name)


def indexed(path, scan, cache=None, label=""):
    """The int64 numbers that scan(open file, its size) yields in pieces: (how far it is, array).

    They are kept on disk and made again when the size or time of `path` changes. The array that
    comes back is a view of that file: a number is read when it is asked for."""
    path = os.path.abspath(path)
    place = place_beside(path, f"{label}.index", cache)
    stamp = stamp_of(os.stat(path))
    with contextlib.suppress(OSError):                              # there may be no index yet
        numbers = mapped(place)
        if numbers[-3:].tolist() == stamp:                          # not so if it was cut off
            return numbers[:-3]
    write_index(path, scan, place, stamp)
    return mapped(place)[:-3]


def stamp_of(status):
    """What changes when a file does. status: os.stat's or os.fstat's"""
    return [VERSION, status.st_size, status.st_mtime_ns]


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
        with contextlib.suppress(OSError):                          # there when something failed
            os.unlink(temporary)


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


# A row of a tar's index: where the first header of a KEY starts; where image, JSON and text start
# and how long they are, 0 where there is none. LOST: records of which nothing is left.
ROW = ("image", "json", "txt")
LOST = (0, 0, 0, 0, 0, 0, 0)


def scan_tar(file, size):
    rows = tar_rows(file, size)
    while some := list(itertools.islice(rows, 10_000)):
        yield file.tell(), np.array(some)


def tar_rows(file, size):
    """The members of one KEY lie side by side: a row ends where the next KEY begins. A damaged
    stretch took members of the KEY before it, of the KEY after it, or whole records: if both KEYs
    are complete, a row LOST stands for what is gone. So damage is counted, once."""
    key = None
    row = list(LOST)
    damaged = False
    for member in tar_members(file, 0, size):
        if member is None:
            if complete(row):                   # not hurt itself
                yield row
                key = None
                row = list(LOST)
            damaged = True
            continue
        part = part_of(member.name) if member.isreg() else None
        if not part:
            continue
        name = os.path.splitext(member.name)[0]
        place = 1 + 2 * ROW.index(part)
        if name != key or row[place]:           # or a part that it has already
            if key is not None:
                yield from ended(row, damaged)
                damaged = False
            key = name
            row = [member.offset, *LOST[1:]]
        row[place:place + 2] = member.offset_data, member.size
    if key is not None:
        yield from ended(row, damaged)
    elif damaged:
        yield LOST


def complete(row):
    _, image, _, json, _, txt, _ = row
    return image and (json or txt)


def ended(row, damaged):
    """The rows to write when a KEY ends. damaged: was there a stretch that cannot be read?"""
    if damaged and complete(row):
        yield LOST
    yield row


def tar_members(file, start, end):
    """tarfile.TarInfo of every member from start to end, None for a block of 512 bytes that is no
    header.

    tarfile reads the headers, but the loop is ours: tarfile.open(ignore_zeros=True) passes over
    damage silently, and ends for ever at a long name whose member is damaged."""
    # What fromtarfile needs of a TarFile. A real one takes 0.1 ms to make.
    tar = types.SimpleNamespace(fileobj=file, offset=0, encoding="utf-8", errors="surrogateescape",
                                pax_headers={})
    position = start
    while position < end:
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
    same_languages = ()                 # those of every record, where they are the same
    refused = COMPRESSED                # layouts of others that it would misread

    def __init__(self, path, names=(), cache=None, root=None):
        self.path = path
        self.root = os.path.abspath(root or os.path.dirname(path))
        self.names = names or languages_of_name(path)
        if other := other_layout(path, self.refused):
            raise ValueError(f"{path} {other}")
        self.stamp = stamp_of(os.stat(path))
        self.index = indexed(path, self.scan, cache)

    def __len__(self):
        return len(self.index) - 1                                  # the last number is the end

    @contextlib.contextmanager
    def opened(self):
        """Opened for every record: as many shards as one likes, and a change is noticed."""
        with open(self.path, "rb") as file:
            if stamp_of(os.fstat(file.fileno())) != self.stamp:
                raise ValueError("the file changed since it was indexed: start again")
            yield file

    def line(self, i):
        start, end = self.index[i:i + 2].tolist()
        with self.opened() as file:
            raw = read(file, start, end - start)
        return raw.partition(b"\n")[0]                              # without blank lines at the end

    def where(self, i):
        return f"{self.path} line {i + 1}"

    def picture(self, i):
        """What two records of one picture have in common; a file of texts has none."""
        return self.where(i)

    def record(self, i):
        """Of text. Equal texts are the same pair, whatever file they come from."""
        texts = self.texts(i)
        return repr(sorted(texts.items())).encode(), texts


class Tar(Reader):
    scan = staticmethod(scan_tar)
    images = True

    def __len__(self):
        return len(self.index) // len(LOST)

    def row(self, i):
        return self.index[len(LOST) * i:len(LOST) * (i + 1)].tolist()

    def where(self, i):
        """File and KEY. The KEY is not stored but read from the first header."""
        row = self.row(i)
        end = row[0] + 512 if any(row) else 0                       # of LOST there is none
        with contextlib.suppress(OSError, ValueError), self.opened() as file:
            for member in filter(None, tar_members(file, row[0], end)):
                return f"{self.path} KEY {printable(os.path.splitext(member.name)[0])}"
        return f"{self.path} record {i + 1}"

    def parts(self, i, wanted=ROW):
        """{"image" | "json" | "txt": bytes} of a KEY."""
        row = self.row(i)
        with self.opened() as file:
            return {part: read(file, start, length)
                    for part, start, length in zip(ROW, row[1::2], row[2::2])
                    if start and part in wanted}

    def record(self, i):
        parts = self.parts(i)
        if "image" not in parts:
            raise ValueError("no image next to it (tar --sort=name keeps a KEY together), or it is "
                             "a link, or its header is broken")
        return parts["image"], captions_of_parts(parts, self.names)

    def texts(self, i):
        return captions_of_parts(self.parts(i, ("json", "txt")), self.names)


class Pictures(Reader):
    """A folder and the folders in it. The names of its pictures stay in memory."""
    images = True

    def __init__(self, path, names=()):
        self.path = path
        self.names = names
        found = sorted(os.path.join(folder, name) for folder, _, files in os.walk(path)
                       for name in files if part_of(name))
        self.files = np.array([os.fsencode(file) for file in found if is_picture(file)])
        tags = [file.split(".")[-2] for file in found if part_of(file) == "txt"]
        self.codes = sorted(set(filter(is_language, tags)))         # of all KEY.LANGUAGE.txt

    def __len__(self):
        return len(self.files)

    def where(self, i):
        return os.fsdecode(self.files[i])

    def record(self, i):
        return read_file(self.where(i)), self.texts(i)

    def texts(self, i):
        """KEY.LANGUAGE.txt go before KEY.json and KEY.txt."""
        key = os.path.splitext(self.where(i))[0]
        texts = beside(key, {code: f".{code}.txt" for code in self.codes})
        if texts:
            return captions({code: decoded(raw) for code, raw in texts.items()}, ())
        return captions_of_parts(beside(key, {"json": ".json", "txt": ".txt"}), self.names)


class ImageLines(Reader):
    images = True
    refused = OTHERS

    def record(self, i):
        row = json_object(self.line(i))
        return self.image(pick(row, IMAGE_KEYS)), row_captions(row, self.names)

    def texts(self, i):
        return row_captions(json_object(self.line(i)), self.names)

    def picture(self, i):
        """A file may have a line for every caption."""
        field = repr(pick(json_object(self.line(i)), IMAGE_KEYS))
        return self.root, identity(field.encode())                  # base64 is long

    def image(self, field):
        """Bytes of an image in base64, or of a file below the folder of images."""
        if not isinstance(field, str) or not field:
            raise ValueError(f"the image is {type_name(field)}, not a path or base64")
        if re.match("https?://", field):
            raise ValueError(f"the image is an address, {field[:60]}: download it first, for "
                             f"example with img2dataset")
        start = b""
        with contextlib.suppress(ValueError):                       # a path
            start = base64.b64decode(field[:24], validate=True)
        if start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")) or start[8:12] == b"WEBP":
            return base64.b64decode("".join(field.split()), validate=True)      # MIME breaks lines
        path = os.path.normpath(os.path.join(self.root, field))
        if not path.startswith(os.path.join(self.root, "")):
            raise ValueError(f"refused: image {field[-60:]} lies outside {self.root}; --image_root "
                             f"DIR names the folder of the images (/ allows every absolute path)")
        return read_file(path)


class PairLines(Reader):
    refused = OTHERS

    def texts(self, i):
        row = json_object(self.line(i))
        if "source_text" in row:
            return pair([row["source_text"], row["target_text"]], self.names)
        return captions(pick(row, PAIR_KEYS), ())


class Columns(Reader):
    refused = OTHERS

    @property
    def same_languages(self):
        return two_languages(self.names)

    def texts(self, i):
        line = self.line(i).decode("utf-8-sig").strip("\r\n")
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) == 3:
            score = columns.pop(0)
            if not is_number(score):
                raise ValueError(f"of three columns the first is a score, not {score[:40]!r}")
        if len(columns) != 2:
            raise ValueError(f"{len(columns)} column(s), not two")
        return pair(columns, self.names)


class PlainText(Reader):
    """Files of the same length as one reader. path: NAME.*; files: {language: path}."""

    def __init__(self, path, files, cache=None):
        self.path = path
        self.same_languages = tuple(files)
        self.files = {k: Reader(file, (k,), cache) for k, file in files.items()}
        if len(files) < 2 or len({len(reader) for reader in self.files.values()}) > 1:
            lengths = ", ".join(f"{k} has {len(lines):,} lines" for k, lines in self.files.items())
            raise ValueError(f"{path}: {lengths} (no blank ones at the end); plain text is two "
                             f"files NAME.LANGUAGE or more, line i of each says the same; columns "
                             f"end in .tsv, JSON lines in .jsonl")

    def __len__(self):
        return min(len(reader) for reader in self.files.values())

    def texts(self, i):
        return captions({k: decoded(reader.line(i)) for k, reader in self.files.items()}, ())


# --------------------------------------------------------------------------------------------------
# What a record says
# --------------------------------------------------------------------------------------------------

def read(file, start, length):
    if length < 0:
        raise ValueError("its header is broken")
    if length > LARGEST:
        raise ValueError(f"a record of {length:,} bytes is longer than {LARGEST:,}")
    file.seek(start)
    raw = file.read(length)
    if len(raw) < length:
        raise ValueError("the file ends inside the record")
    return raw


def read_file(path):
    if not os.path.isfile(path):
        raise ValueError(f"no such image {path[-80:]}")
    if os.path.getsize(path) > LARGEST:
        raise ValueError(f"{path[-80:]} is longer than {LARGEST:,} bytes")
    return pathlib.Path(path).read_bytes()


def beside(key, suffixes):
    """{name: suffix} -> {name: bytes of the file KEY + suffix (.txt or .TXT)} of those that are
    there."""
    found = {}
    for name, suffix in suffixes.items():
        stem, form = os.path.splitext(key + suffix)
        for path in (stem + form, stem + form.upper()):
            if os.path.isfile(path):
                found.setdefault(name, read_file(path))
    return found


def is_number(text):
    """7, -0.5, .5 and 1e-3; not nan, which is a word in some languages."""
    return bool(re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", text.strip()))


def decoded(raw):
    """The text of a file or line, without a byte order mark."""
    return raw.decode("utf-8-sig").strip()


def pick(row, keys):
    """The first of these fields that the row has."""
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    raise ValueError(f"no field {' or '.join(keys)}")


def row_captions(row, names):
    """The captions of a JSON object, which may name the language of a text that has none."""
    named = [row[key] for key in LANGUAGE_KEYS if isinstance(row.get(key), str)]
    return captions(pick(row, CAPTION_KEYS), named[:1] or names)


def captions_of_parts(parts, names):
    """The captions of KEY.json, or of KEY.txt where that has none. parts: {"json", "txt": bytes}"""
    if "json" in parts:
        row = json_object(parts["json"])
        if "txt" not in parts or any(row.get(key) is not None for key in CAPTION_KEYS):
            return row_captions(row, names)
    if "txt" not in parts:
        raise ValueError("no caption next to it: KEY.json or KEY.txt")
    return captions(decoded(parts["txt"]), names)


def json_object(text):
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def type_name(value):
    names = {"NoneType": "null", "str": "a text", "dict": "an object", "list": "a list"}
    name = type(value).__name__
    return names.get(name, f"of type {name}")


def two_languages(names):
    """Those of two texts: of the file's name or argument, else "source" and "target"."""
    return names if len(names) == 2 else ("source", "target")


def pair(texts, names):
    return captions(dict(zip(two_languages(names), texts)), ())


def captions(value, names):
    """Captions in any accepted shape -> {language: [texts]}. ValueError on an empty one or another
    type. names: the language of texts that come without one, where it is one."""
    unnamed = names[0] if len(names) == 1 else "unknown"
    found = {}
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, dict):
            part = {unnamed: [part]}
        elif any(key in part for key in TEXT_KEYS):
            named = [part[key] for key in LANGUAGE_KEYS if isinstance(part.get(key), str)]
            part = {[*named, unnamed][0]: pick(part, TEXT_KEYS)}
        for language, texts in part.items():
            if texts is None:                                       # a table with gaps
                continue
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
