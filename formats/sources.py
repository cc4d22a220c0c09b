"""Your data: files, folders and globs -> the two datasets of training.

A source is FILE, FOLDER or GLOB, then @en or @de,en where the file does not name its languages,
then =WEIGHT where several share a stream: 'cc3m/*.tar@en=0.7'. What a file may hold: records.py.

    python data.py PATH ...     the doctor: what is there and what is wrong with it
"""
import bisect
import collections
import glob
import hashlib
import itertools
import os
import re
import sys
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from formats import images
from formats.records import (IMAGE_KEYS, TOLERATED, WINDOW, BadRecord, Columns, ImageLines,
                             PairLines, PlainText, Tar, identity, indexed, reading)

NAMED = (".tar", ".tsv", ".jsonl", ".json")     # any other suffix is the language of plain text


# --------------------------------------------------------------------------------------------------
# Arguments -> readers
# --------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    argument: str                               # as the user wrote it
    files: list
    languages: tuple                            # of texts that come without one
    weight: float | None


def parse(argument):
    """FILE|FOLDER|GLOB[@LANGUAGE[,LANGUAGE]][=WEIGHT] -> Source."""
    what, names, weight = argument, None, None
    if not os.path.exists(argument):            # a file may be called a@b=1
        what, names, weight = re.fullmatch(r"(.*?)(?:@([\w,-]+))?(?:=(\d+\.?\d*|\.\d+))?", argument,
                                           re.DOTALL).groups()
    if os.path.isdir(what):
        files = [file.path for file in os.scandir(what) if file.is_file() and is_data(file.name)]
    elif os.path.isfile(what):
        files = [what]                          # also where the name looks like a pattern
    else:
        files = [file for file in glob.glob(what, recursive=True) if os.path.isfile(file)]
    if not files:
        raise ValueError(f"{argument}: no such file, and no folder or pattern that holds any "
                         f"(of plain text say FOLDER/NAME.*)")
    if weight and not float(weight):
        raise ValueError(f"{argument}: a weight must be more than 0")
    languages = tuple(names.split(",")) if names else ()
    return Source(argument, sorted(files), languages, float(weight) if weight else None)


def is_data(name):
    """Does this file of a folder hold records? img2dataset leaves _stats.json beside its tars."""
    if name.startswith((".", "_")) or name.endswith("_stats.json"):
        return False
    return name.startswith("part-") or os.path.splitext(name)[1].lower() in NAMED


def parse_all(arguments):
    """-> [Source]. A shell expands train.{en,de} to train.en train.de: these become one again."""
    merged = {}
    for number, argument in enumerate(arguments):
        source = parse(argument)
        stem, suffix = os.path.splitext(source.files[0])
        key = number
        if len(source.files) == 1 and suffix and suffix.lower() not in NAMED:
            key = stem, source.languages, source.weight
        if key in merged:
            merged[key].files.extend(source.files)
        else:
            merged[key] = source
    return list(merged.values())


def open_readers(source, kind=None, languages=(), cache=None, root=None):
    """The files of a source -> readers. kind: "images", "texts" or None, which accepts both."""
    readers = []
    plain = {}                                  # NAME -> {language: file}
    for file in source.files:
        stem, suffix = os.path.splitext(file)
        kind_of_file = suffix.lower()
        if kind_of_file == ".tar":
            readers.append(Tar(file, source.languages, cache))
        elif kind_of_file == ".tsv":
            readers.append(Columns(file, source.languages, cache))
        elif kind_of_file in ("", ".jsonl", ".json") or kind == "images":
            lines = ImageLines(file, source.languages, cache, root)
            pairs = kind == "texts" or (kind is None and not names_images(lines))
            readers.append(PairLines(file, source.languages, cache) if pairs else lines)
        else:
            plain.setdefault(stem, {})[suffix[1:]] = file
    for stem, group in plain.items():
        wanted = {k: file for k, file in group.items() if k in (languages or group)}
        readers.append(PlainText(f"{stem}.*", wanted, cache))
    for reader in readers:
        check(reader, kind, source.languages)
    return readers


def names_images(lines):
    """Does one of the first lines of a JSON-lines file have an image? One line may be broken."""
    field = re.compile(f'"({"|".join(IMAGE_KEYS)})" *:'.encode())
    return not len(lines) or any(field.search(lines.line(i)) for i in range(min(9, len(lines))))


def check(reader, kind, names):
    """ValueError on a file of the other kind and on parallel text without two languages."""
    holds = "images" if reader.images else "texts"
    if kind and holds != kind:
        found = "images" if reader.images else "no images"
        raise ValueError(f"{reader.path} holds {found}: give it to --{holds}")
    if names and kind == "texts" and len(set(names)) != 2:
        raise ValueError(f"{reader.path} is parallel text: name its two languages, as in "
                         f"FILE@de,en")


# --------------------------------------------------------------------------------------------------
# Datasets: len() and [index, rng] -> (image or sentence, sentence, id)
# --------------------------------------------------------------------------------------------------

class Files:
    """The records of some sources as one list; with languages, only those that have them."""

    def __init__(self, sources, kind, languages=(), cache=None, root=None):
        self.languages = set(languages or ())
        self.readers = []
        self.kept = []                          # of each reader: indices of its records; None: all
        for source in sources:
            readers = open_readers(source, kind, self.languages, cache, root)
            least = 1 if kind == "images" else 2
            kept = [wanted(reader, self.languages, least, cache) for reader in readers]
            self.readers += readers
            self.kept += kept
            if not sum(map(count, readers, kept)):
                raise ValueError(f"{source.argument} has no record in "
                                 f"{' '.join(sorted(self.languages))}; where it names no languages "
                                 f"itself, say FILE@en or FILE@de,en")
        self.starts = [0, *itertools.accumulate(map(count, self.readers, self.kept))]

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, key):
        """(index, rng) -> what example() makes of that record; BadRecord."""
        index, rng = key
        reader, i = self.find(index)
        with reading(reader, i):
            return self.example(*reader.record(i), rng)

    def find(self, index):
        """-> the reader that holds the record, and its number there."""
        k = bisect.bisect_right(self.starts, index) - 1
        i = index - self.starts[k]
        if self.kept[k] is not None:
            i = int(self.kept[k][i])
        return self.readers[k], i

    def usable(self, texts):
        """Of {language: [texts]} the languages that training shall use."""
        return [k for k in texts if not self.languages or k in self.languages]


def wanted(reader, languages, least, cache):
    """Indices of the records that have `least` of the languages or more; None: all. Kept on disk,
    like the index, as every record must be read to know its languages."""
    if not len(reader):
        raise ValueError(f"{reader.path} has no record; is it empty or cut off?")
    if not languages or isinstance(reader, PlainText):
        return None

    def is_wanted(i):
        try:
            with reading(reader, i):
                return len(reader.texts(i).keys() & languages) >= least
        except BadRecord:
            return True                         # training shall count it as bad

    def scan(file, size):
        for first in range(0, len(reader), 10_000):
            block = range(first, min(first + 10_000, len(reader)))
            yield size * first // len(reader), np.array(list(filter(is_wanted, block)), np.int64)

    question = repr((sorted(languages), least, reader.names))
    label = hashlib.sha1(question.encode()).hexdigest()[:8]
    return indexed(reader.path, scan, cache, f".{label}")


def count(reader, kept):
    return len(reader) if kept is None else len(kept)


class ImageFiles(Files):
    """[index, rng] -> image (3, size, size) uint8, caption, id."""

    def __init__(self, sources, size, languages=(), cache=None, root=None):
        super().__init__(sources, "images", languages, cache, root)
        self.size = size

    def example(self, picture, texts, rng):
        """The language is drawn first, each with the same probability, then one of its captions."""
        languages = self.usable(texts)
        group = texts[languages[rng.integers(len(languages))]]
        text = group[rng.integers(len(group))]
        with images.undecoded(picture) as image:
            return images.train_transform(image, self.size, rng), text, identity(picture)

    def row(self, index):
        """The whole record, to evaluate on -> {"image": RGB, "captions": {language: [text]}}."""
        reader, i = self.find(index)
        with reading(reader, i):
            picture, captions = reader.record(i)
            with images.undecoded(picture) as image:
                image.load()
                captions = {language: captions[language] for language in self.usable(captions)}
                return {"image": images.rgb(image), "captions": captions}


class PairFiles(Files):
    """[index, rng] -> sentence a, sentence b, id."""

    def __init__(self, sources, languages=(), cache=None):
        super().__init__(sources, "texts", languages, cache)

    def example(self, raw, texts, rng):
        """Two languages of those that the record has. Which is a and which is b is random."""
        languages = self.usable(texts)
        if len(languages) < 2:
            raise ValueError(f"one language only ({' '.join(texts)}), not two")
        pair = []
        for k in rng.permutation(len(languages))[:2]:
            group = texts[languages[k]]
            pair.append(group[rng.integers(len(group))])
        return pair[0], pair[1], identity(raw)


# --------------------------------------------------------------------------------------------------
# Bad records
# --------------------------------------------------------------------------------------------------

class BadRecords:
    """The bad records of a process: counted, the first ten named; too many stop the run."""

    def __init__(self, rank=0):
        self.rank = rank
        self.window = collections.deque(maxlen=WINDOW)          # of the last records: was it bad?
        self.named = set()
        self.last = "none, but in another process"

    def count(self, reasons):
        """The records of a step ("" for a good one, why a bad one is bad) -> (how many are bad,
        shall the run stop?)."""
        stop = False
        for reason in reasons:
            self.window.append(bool(reason))
            if not reason:
                continue
            self.last = reason
            stop = stop or sum(self.window) > TOLERATED
            if len(self.named) < 10 and reason not in self.named:
                tqdm.write(f"process {self.rank}: skipped {reason}", file=sys.stderr)
                self.named.add(reason)
        return sum(map(bool, reasons)), stop

    def message(self):
        return (f"more than {TOLERATED} of a process's last {WINDOW:,} records were bad, the last "
                f"here: {self.last}; `python data.py FILES` names them all")
