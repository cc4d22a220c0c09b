"""Your data: files, folders and globs -> the two streams of training.

A source is FILE, FOLDER or GLOB, then @en or @de,en where the file does not name its languages itself, then =WEIGHT
where several share a stream: 'cc3m/*.tar@en=0.7'. Without weights they are read as one long list, each record once per
epoch; with weights each source has its own epochs. What a file may hold: records.py.

    python data.py PATH ...     the doctor says what is there and what is wrong with it
"""
import bisect
import collections
import glob
import hashlib
import json
import os
import pathlib
import re
from fractions import Fraction

import numpy as np
from tqdm import tqdm

from formats import images
from formats.records import (BROKEN, IMAGE_KEYS, TOLERATED, WINDOW, BadRecord, Columns, ImageLines, PairLines,
                             PlainText, Tar, identity, indexed, reason)

# ------------------------------------------------------------------------------------------------------------------
# Arguments -> readers
# ------------------------------------------------------------------------------------------------------------------

NAMED = (".tar", ".tsv", ".jsonl", ".json")                     # any other suffix names the language of plain text


def parse(argument):
    """FILE|FOLDER|GLOB[@LANGUAGE[,LANGUAGE]][=WEIGHT] -> (files, languages, weight or None)."""
    what, names, weight = (argument, None, None) if os.path.exists(argument) else re.fullmatch(
        r"(.*?)(?:@([\w,-]+))?(?:=(\d+\.?\d*|\.\d+))?", argument, re.S).groups()
    if os.path.isdir(what):
        files = [entry.path for entry in os.scandir(what) if entry.is_file() and not entry.name.startswith((".", "_"))
                 and (os.path.splitext(entry.name)[1].lower() in NAMED or entry.name.startswith("part-"))
                 and not entry.name.endswith("_stats.json")]                 # img2dataset's, beside its tars
    else:
        files = [what] if os.path.isfile(what) else [f for f in glob.glob(what, recursive=True) if os.path.isfile(f)]
    if not files:
        raise ValueError(f"{argument}: no such file, and no folder or pattern that holds any (of plain text say "
                         f"FOLDER/NAME.*)")
    if weight is not None and not Fraction(weight):
        raise ValueError(f"{argument}: a weight must be more than 0")
    return sorted(files), tuple(names.split(",")) if names else (), weight and Fraction(weight)


def open_readers(files, names, kind, languages, cache, root):
    """Files of one argument -> readers. kind: "images", "texts", or None to find out."""
    found, plain = [], {}
    for file in files:
        stem, suffix = os.path.splitext(file)
        if suffix.lower() == ".tar":
            found.append(Tar(file, names, cache))
        elif suffix.lower() == ".tsv":
            found.append(Columns(file, names, cache))
        elif suffix.lower() in ("", ".jsonl", ".json") or kind == "images":
            lines = ImageLines(file, names, cache, root)
            pairs = kind == "texts" or kind is None and len(lines) and not any(   # one broken line decides nothing
                re.search(f'"({"|".join(IMAGE_KEYS)})" *:'.encode(), lines.line(i)) for i in range(min(9, len(lines))))
            found.append(PairLines(file, names, cache) if pairs else lines)
        else:
            plain.setdefault(stem, {})[suffix[1:]] = file
    for stem, group in plain.items():
        found.append(PlainText(f"{stem}.*", {k: f for k, f in group.items() if k in (languages or group)}, cache))
    for reader in found:
        if kind and reader.images != (kind == "images"):
            raise ValueError(f"{reader.path} holds {'images' if reader.images else 'no images'}: "
                             f"give it to --{'images' if reader.images else 'texts'}")
        if names and kind == "texts" and len(set(names)) != 2:
            raise ValueError(f"{reader.path} is parallel text: name its two languages, as in FILE@de,en")
    return found


def with_languages(reader, languages, least, cache):
    """Indices of the records with at least `least` of the languages, and of broken ones, from a file beside the index;
    None: all of them."""
    if not languages or isinstance(reader, PlainText):
        return None

    def scan(file, size):
        for first in range(0, len(reader), 10_000):
            yield size * first // len(reader), np.array([i for i in range(first, min(first + 10_000, len(reader)))
                                                         if speaks(reader, i, languages) >= least], np.int64)

    label = hashlib.sha1(repr((sorted(languages), least, reader.names)).encode()).hexdigest()[:8]
    return indexed(reader.path, scan, cache, f".{label}")


def speaks(reader, i, languages):
    try:
        return len(reader.texts(i).keys() & languages)
    except BROKEN:
        return 2                                                             # it will be counted as broken, not lost


def parse_all(arguments):
    """-> [(argument, files, languages, weight)]. train.en train.de, as a shell expands train.{en,de}, become one."""
    merged = {}
    for number, argument in enumerate(arguments):
        files, *rest = parse(argument)
        stem, suffix = os.path.splitext(files[0])
        plain = len(files) == 1 and suffix and suffix.lower() not in NAMED
        merged.setdefault((stem, *rest) if plain else number, [argument, [], *rest])[1].extend(files)
    return list(merged.values())


class Stream:
    """Records of several arguments as one list. shares: [(first index, n, p, q)]: an argument with a weight takes p of
    every q positions that those before it left."""

    def __init__(self, arguments, kind, languages=(), cache=None, root=None):
        parsed, self.languages = parse_all(arguments), set(languages or ())
        self.readers, self.kept, self.starts, self.shares, left = [], [], [0], [], Fraction(1)
        if len({weight is None for *_, weight in parsed}) > 1:
            raise ValueError("give every source a weight (FILE=0.7) or none")
        total = sum(weight or 0 for *_, weight in parsed)
        for argument, files, names, weight in parsed:
            first = self.starts[-1]
            for reader in open_readers(files, names, kind, self.languages, cache, root):
                kept = with_languages(reader, self.languages, 1 if kind == "images" else 2, cache)
                if not len(reader):
                    raise ValueError(f"{reader.path} has no record; is it empty or cut off?")
                self.readers.append(reader)
                self.kept.append(kept)
                self.starts.append(self.starts[-1] + len(reader if kept is None else kept))
            if self.starts[-1] == first:
                raise ValueError(f"{argument} has no record in {' '.join(sorted(self.languages))}; where it names no "
                                 f"languages itself, say FILE@en or FILE@de,en")
            if weight:
                p, q = (weight / total / left).as_integer_ratio()
                self.shares.append((first, self.starts[-1] - first, p, q))
                left -= weight / total
        self.shares = self.shares or [(0, len(self), 1, 1)]

    def __len__(self):
        return self.starts[-1]

    def locate(self, position):
        """A position in the stream -> (its position in the endless stream of one share, that share's first index and
        its n records). A share's positions are evenly spaced."""
        for first, n, p, q in self.shares:
            before = position * p // q                                       # how many were this share's so far
            if (position + 1) * p // q > before:
                return before, first, n
            position -= before

    def __getitem__(self, key):
        """(index, rng) -> what example() makes of that record; BadRecord."""
        index, rng = key
        k = bisect.bisect_right(self.starts, index) - 1
        reader, kept, i = self.readers[k], self.kept[k], index - self.starts[k]
        try:
            i = i if kept is None else kept.read(i, 1)[0]
            return self.example(*reader.record(i), rng)
        except BROKEN as error:
            raise BadRecord(f"{reader.where(i)}: {reason(error)}") from None

    def spoken(self, said):
        return [k for k in said if k in self.languages] if self.languages else list(said)


class Images(Stream):
    blank = images.Cut(np.zeros((1, 1, 4), np.uint8), False, []), "", 0

    def __init__(self, arguments, size, languages=(), cache=None, root=None):
        super().__init__(arguments, "images", languages, cache, root)
        self.size = size

    def example(self, picture, said, rng):
        """-> Cut, one of its captions, id. The language is drawn first, uniformly (F3.3)."""
        languages = self.spoken(said)
        texts = said[languages[rng.integers(len(languages))]]
        text = texts[rng.integers(len(texts))]
        with images.undecoded(picture) as image:
            return images.random_cut(image, self.size, rng), text, identity(picture)

    def finish(self, records):
        """Records with a Cut -> the same with its image (3, size, size) uint8."""
        cuts, *rest = zip(*records)
        return list(zip(images.train_images(cuts, self.size), *rest))


class Pairs(Stream):
    blank = "", "", 0

    def __init__(self, arguments, languages=(), cache=None):
        super().__init__(arguments, "texts", languages, cache)

    def example(self, raw, said, rng):
        """-> sentence a, sentence b, id: two languages of those present. Which is a and which is b is a toss (F2.3)."""
        languages = self.spoken(said)
        if len(languages) < 2:
            raise ValueError(f"one language only ({' '.join(said)}), not two")
        a, b = (said[languages[i]][rng.integers(len(said[languages[i]]))] for i in rng.permutation(len(languages))[:2])
        return a, b, identity(raw)


# ------------------------------------------------------------------------------------------------------------------
# Bad records
# ------------------------------------------------------------------------------------------------------------------

class BadRecords:
    """Bad records of a process: counted, the first ten named once; too many among the last thousand stop the run."""

    def __init__(self, rank=0):
        self.rank, self.window, self.named = rank, collections.deque(maxlen=WINDOW), set()
        self.last = None

    def count(self, reasons):
        """The records of a step ("" for a good one, why a bad one is bad) -> (how many are bad, shall the run stop?)."""
        bad, stop = 0, False
        for reason in reasons:
            self.window.append(bool(reason))
            if not reason:
                continue
            bad += 1
            self.last = reason
            stop = stop or sum(self.window) > TOLERATED
            if len(self.named) < 10 and reason not in self.named:
                tqdm.write(f"process {self.rank}: skipped {reason}")
                self.named.add(reason)
        return bad, stop

    def message(self):
        return (f"more than {TOLERATED} of a process's last {WINDOW:,} records were bad, the last here: "
                f"{self.last or 'none, but in another process'}; `python data.py FILES` names them all")


# ------------------------------------------------------------------------------------------------------------------
# Sets to evaluate on
# ------------------------------------------------------------------------------------------------------------------

def evaluation_rows(name):
    """A JSON-lines file with rows {"image": path beside the file,
    "captions": {language: text or [texts]}} -> list of {"image": RGB image, "captions": {language: [text, ...]}, ...}.
    ValueError with file and line on bad rows."""
    path, rows = pathlib.Path(name), []
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a file nor a split of the demo (demo:test_style, ...)")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{name} line {number}"
        try:
            row = json.loads(line)
            captions = {k: [t] if isinstance(t, str) else t for k, t in row["captions"].items()}
            image = path.parent / row["image"]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(
                f'{where}: expected {{"image": path, "captions": {{language: text or [texts]}}}}') from None
        if not captions or not all(isinstance(texts, list) and texts and
                                   all(isinstance(t, str) and t.strip() for t in texts) for texts in captions.values()):
            raise ValueError(f"{where}: a caption is empty or not a text")
        try:
            rows.append({"image": images.open_image(image), "captions": captions})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not rows:
        raise ValueError(f"{name} has no rows")
    return rows
