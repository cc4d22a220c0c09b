"""Records of files on disk: what a file holds, without unpacking, converting or copying it.

    Tar          webdataset: KEY.jpg|jpeg|png|webp beside KEY.json {"captions": C} or KEY.txt
    Pictures     a folder with the same in files, also KEY.en.txt, KEY.de.txt ...
    ImageLines   {"image" | "binary" | "img_path" | "file_name": path or base64,
                  "captions" | "caption" | "desc" | "sentences" | "text": C}
                 C: {language: text or [texts]}, a list of such, a text, or a list of texts, which
                 are in the "language" or "lang" of the row
    PairLines    {"text" | "translation": {language: text}},
                 or {"source_text": text, "target_text": text}
    Columns      two columns with a tab between, or three: one of them a score (WikiMatrix)
    PlainText    NAME.en NAME.de ...: line i of each says the same

reader.record(i) -> (bytes of the image, or bytes that identify a pair; {language: [texts]}).
One pass over a file notes where each record starts. These numbers lie beside it in .FILE.index, or
in the cache folder, and a record is read from its offset: all orders of reading cost the same.
"""
import base64
import contextlib
import copy
import functools
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

IMAGE_KEYS = ("image", "binary", "img_path", "file_name")
CAPTION_KEYS = ("captions", "caption", "desc", "sentences", "text")
LANGUAGE_KEYS = ("language", "lang", "LANGUAGE")
PAIR_KEYS = ("text", "translation")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PARTS = dict.fromkeys(SUFFIXES, "image") | {".json": "json", ".txt": "txt"}     # of a KEY
LARGEST = 1 << 28                   # bytes of a record: a longer one is no record but a broken file
TOLERATED = 0.01                    # share of bad records in the last WINDOW; more stop a run
WINDOW = 1000

# What other layouts begin with -> what they are.
COMPRESSED = {rb"\x1f\x8b|PK\x03\x04|BZh\d|\xfd7zX|\(\xb5/\xfd":          # gzip zip bzip2 xz zstd
              "is compressed: unpack it, records are read by offset"}
LINES = 'docs/data.md, "Other layouts", has the command that makes JSON lines of it'
OTHERS = COMPRESSED | {
    rb"PAR1": f"is a Parquet file: {LINES}",
    rb"\s*\[": f"is one JSON array: {LINES}",
    rb'(?s)\s*\{(.*"images"|\s*"annotations")\s*:\s*\[\s*\{':
        f"looks like the captions JSON of COCO or Karpathy: {LINES}",
    rb"\S+\.(jpg|jpeg|png)(#\d+)?\t": f"looks like a list of pictures with captions: {LINES}",
    rb'"?(image|file)\w*"?[,|][^\t\n]*\n': f"looks like CSV: {LINES}"}
NO_LANGUAGES = "bak bin cfg csv doc gz ids idx ini log md npy old pdf py tmp txt xml xz zip".split()


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


def is_picture(file):
    name = os.path.basename(file)
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def languages_of_name(path):
    """WikiMatrix.de-en.tsv -> ("de", "en"); () where a name has no two."""
    tagged = re.fullmatch(r"(?:.*[._])?([a-z]{2,3})-([a-z]{2,3})\.\w+", os.path.basename(path))
    return tagged.groups() if tagged else ()


def other_layout(path, layouts=OTHERS):
    """What a file is that cannot be read as it lies, in words; else ""."""
    with open(path, "rb") as file:
        head = file.read(1 << 13)
    return next((what for start, what in layouts.items() if re.match(start, head)), "")


# --------------------------------------------------------------------------------------------------
# The index: where records start
# --------------------------------------------------------------------------------------------------

VERSION = 0x344D4C4343              # of the index; also tells an index from another file


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


# A row of a tar's index: where the first header of a KEY starts and where its last member ends.
LOST = (0, 0)                       # stands for records of which nothing is left


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
    """The members of one KEY lie side by side, but --sort=name puts a.b.jpg between a.jpg and
    a.txt: a KEY ends at a member whose KEY is another and does not begin with it and a dot. A
    damaged stretch took members of the KEY before it, of the KEY after it, or whole records: if
    both KEYs are complete, a row LOST stands for what is gone. So damage is counted, once."""
    lasting = []                                # (KEY, its parts, [start, end]); most often one
    damaged = False
    for member in tar_members(file, 0, size):
        if member is None:
            if all(complete(parts) for _, parts, _ in lasting):     # not hurt themselves
                yield from ended(lasting, False)
                lasting = []
            damaged = True
            continue
        key, part = key_and_part(member)
        if not part:
            continue
        before = lasting
        lasting = [row for row in before if key.startswith(f"{row[0]}.")
                   or key == row[0] and part not in row[1]]
        if len(lasting) < len(before):
            yield from ended(before[len(lasting):], damaged)
            damaged = False
        if not lasting or lasting[-1][0] != key:
            lasting.append((key, set(), [member.offset, 0]))
        lasting[-1][1].add(part)
        lasting[-1][2][1] = member.offset_data + max(member.size, 0)
    yield from ended(lasting, damaged)
    if damaged and not lasting:
        yield LOST


def complete(parts):
    return "image" in parts and len(parts) > 1


def ended(rows, damaged):
    """What to write when KEYs end. damaged: was there a stretch that cannot be read?"""
    for _, parts, row in rows:
        if damaged and complete(parts):
            yield LOST
        damaged = False
        yield row


def key_and_part(member):
    """TarInfo -> (KEY: its name up to the last dot, "image", "json", "txt" or None for what is left
    alone). macOS puts ._0001.jpg beside 0001.jpg: names that begin with a dot are left alone."""
    key, suffix = os.path.splitext(member.name)
    if not member.isreg() or os.path.basename(key).startswith("."):
        return key, None
    return key, PARTS.get(suffix.lower())


@functools.cache
def empty_archive():
    """For its settings: tarfile needs 0.1 ms to make one."""
    return tarfile.open(fileobj=io.BytesIO(bytes(1024)))


def tar_members(file, start, end):
    """tarfile.TarInfo of every member from start to end, None for a block of 512 bytes that is no
    header.

    tarfile reads the headers, but the loop is ours: tarfile.open(ignore_zeros=True) passes over
    damage silently, and ends for ever at a long name whose member is damaged."""
    tar = copy.copy(empty_archive())
    tar.pax_headers = {}
    tar.fileobj = file
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
    refused = COMPRESSED                                            # of the layouts of others

    def __init__(self, path, names=(), cache=None, root=None):
        self.path = path
        self.root = os.path.abspath(root or os.path.dirname(path))
        self.names = names or languages_of_name(path)
        if other := other_layout(path, self.refused):
            raise ValueError(f"{path} {other}")
        status = os.stat(path)
        self.size = status.st_size
        self.time = status.st_mtime_ns
        self.index = indexed(path, self.scan, cache)

    def __len__(self):
        return len(self.index) - 1                                  # the last number is the end

    @contextlib.contextmanager
    def opened(self):
        """Opened for every record: as many shards as one likes, and a change is noticed."""
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (self.size, self.time):
                raise ValueError("the file changed since it was indexed: start again")
            yield file

    def line(self, i):
        start, end = self.index[i:i + 2].tolist()
        with self.opened() as file:
            raw = read(file, start, end - start)
        return raw.partition(b"\n")[0]                              # without blank lines at the end

    def notes(self):
        """What is odd in the first lines, in words, for the doctor."""
        return []

    def where(self, i):
        return f"{self.path} line {i + 1}"

    def texts(self, i):
        """{language: [texts]} alone."""
        return self.record(i)[1]

    def json(self, i):
        return json_object(self.line(i))


class Tar(Reader):
    scan = staticmethod(scan_tar)
    images = True

    def __len__(self):
        return len(self.index) // 2

    def row(self, i):
        return self.index[2 * i:2 * i + 2].tolist()

    def where(self, i):
        """File and KEY. The KEY is not stored but read from the first header."""
        with contextlib.suppress(OSError, ValueError), self.opened() as file:
            for member in tar_members(file, *self.row(i)):
                return f"{self.path} KEY {printable(key_and_part(member)[0])}"
        return f"{self.path} record {i + 1}"

    def record(self, i):
        with self.opened() as file:
            members = self.members(file, i)
            if "image" not in members:
                raise ValueError("no image next to it (tar --sort=name keeps a KEY together), or "
                                 "it is a link, or its header is broken")
            return self.part(file, members["image"]), self.captions(file, members)

    def texts(self, i):
        with self.opened() as file:
            return self.captions(file, self.members(file, i))

    def members(self, file, i):
        """{"image" | "json" | "txt": TarInfo} of the KEY that begins where the row says."""
        found = {}
        own_key = None
        for member in filter(None, tar_members(file, *self.row(i))):
            key, part = key_and_part(member)
            own_key = own_key or key
            if part and key == own_key:
                found.setdefault(part, member)
        return found

    def captions(self, file, members):
        texts = {k: self.part(file, members[k]) for k in members if k != "image"}
        return beside(texts.get("json"), texts.get("txt"), self.names)

    def part(self, file, member):
        return read(file, member.offset_data, member.size)


class Pictures(Reader):
    """A folder and the folders in it. The names of its pictures stay in memory."""
    images = True

    def __init__(self, path, names=()):
        self.path = path
        self.names = names
        found = sorted(os.path.join(folder, name) for folder, _, files in os.walk(path)
                       for name in files if not name.startswith("."))
        self.files = np.array([os.fsencode(file) for file in found if is_picture(file)])
        self.size = sum(map(os.path.getsize, self.files))
        tags = [file.rsplit(".", 2)[-2] for file in found if file.endswith(".txt")]
        self.languages = sorted(set(filter(is_language, tags)))     # of all KEY.LANGUAGE.txt

    def __len__(self):
        return len(self.files)

    def where(self, i):
        return os.fsdecode(self.files[i])

    def record(self, i):
        return read_file(self.where(i)), self.texts(i)

    def texts(self, i):
        stem = os.path.splitext(self.where(i))[0]
        paths = {k: f"{stem}{k}" for k in (".json", ".txt", *(f".{x}.txt" for x in self.languages))}
        texts = {k: read_file(path) for k, path in paths.items() if os.path.isfile(path)}
        found = {k: texts[f".{k}.txt"].decode("utf-8-sig").strip() for k in self.languages
                 if f".{k}.txt" in texts}
        if found:                               # they go before KEY.json and KEY.txt
            return captions(found, ())
        return beside(texts.get(".json"), texts.get(".txt"), self.names)


class ImageLines(Reader):
    images = True
    refused = OTHERS

    def record(self, i):
        row = self.json(i)
        return self.image(pick(row, IMAGE_KEYS)), row_captions(row, self.names)

    def texts(self, i):
        return row_captions(self.json(i), self.names)

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
                             f"DIR names the folder of the images (/ allows every absolute path)")
        return read_file(path)


class PairLines(Reader):
    refused = OTHERS

    def record(self, i):
        row = self.json(i)
        for key in PAIR_KEYS:
            if key in row:
                return json.dumps(row[key]).encode(), captions(row[key], ())
        return pair([row["source_text"], row["target_text"]], self.names)


class Columns(Reader):
    refused = OTHERS

    def columns(self, i, errors="strict"):
        return self.line(i).decode("utf-8-sig", errors).strip("\r\n").split("\t")

    @functools.cached_property
    def first(self):
        """The first lines in columns."""
        return [self.columns(i, "replace") for i in range(min(100, len(self)))]

    @functools.cached_property
    def score(self):
        """Which of three columns is the score: the one that most often is a number."""
        rows = [row for row in self.first if len(row) == 3]
        return max(range(3), key=lambda k: sum(is_number(row[k]) for row in rows))

    def record(self, i):
        columns = self.columns(i)
        if len(columns) == 3:
            score = columns.pop(self.score)
            if not is_number(score):
                raise ValueError(f"of three columns one is a score, but column {self.score + 1} "
                                 f"is {score[:40]!r}")
        if len(columns) != 2:
            raise ValueError(f"{len(columns)} column(s), not two")
        return pair(columns, self.names)

    def notes(self):
        heads = {"source", "target", "src", "tgt", "trg", "score", *self.names}
        found = []
        if self.first and heads.intersection(cell.strip('"').lower() for cell in self.first[0]):
            found.append("line 1 looks like a header")
        for k, cells in enumerate(zip(*self.first)):
            if sum(cell[:1] == cell[-1:] == '"' for cell in cells) > len(cells) / 2:
                found.append(f"column {k + 1} is in quotes; they are read as text")
            if sum(map(is_number, cells)) > len(cells) / 2:
                score = len(self.first[0]) == 3 and k == self.score
                use = "a score, not read" if score else "read as text"
                found.append(f"column {k + 1} holds numbers: {use}")
        return found


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


def is_number(text):
    return bool(re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", text.strip()))


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


def beside(json_text, text, names):
    """The captions of KEY.json, or of KEY.txt where that has none; either may be None."""
    if json_text is not None:
        row = json_object(json_text)
        if text is None or any(row.get(key) is not None for key in CAPTION_KEYS):
            return row_captions(row, names)
    if text is None:
        raise ValueError("no caption next to it: KEY.json or KEY.txt")
    return captions(text.decode("utf-8-sig").strip(), names)


def json_object(text):
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


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
