"""Your data: files, folders and globs -> the two datasets of training.

A source is FILE, FOLDER or GLOB (also 'cc3m/{000..331}.tar'); then :DIR where the images that it
names lie elsewhere; @en or @de,en where it does not name its languages; =WEIGHT where several
share a stream: 'coco.jsonl:coco/images@en=0.7'. What a file may hold: records.py.

    python data.py PATH ...     the doctor: what is there and what is wrong with it
"""
import bisect
import collections
import contextlib
import functools
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
from formats.records import (IMAGE_KEYS, SUFFIXES, TOLERATED, WINDOW, BadRecord, Columns,
                             ImageLines, PairLines, Pictures, PlainText, Tar, identity, indexed,
                             is_language, is_picture, languages_of_name, other_layout, reading)

NAMED = (".tar", ".tsv", ".jsonl", ".json")     # any other suffix is the language of plain text


# --------------------------------------------------------------------------------------------------
# Arguments -> readers
# --------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    argument: str                               # as the user wrote it
    files: list
    root: str | None                            # folder of the images that JSON lines name
    languages: tuple                            # of texts that come without one
    weight: float | None


def parse(argument):
    """FILE|FOLDER|GLOB[:DIR][@LANGUAGE[,LANGUAGE]][=WEIGHT] -> Source."""
    if argument.partition("=")[0] == "demo":
        raise ValueError("demo is the built-in data and does not mix with files: give it alone "
                         "(a folder of that name is ./demo)")
    what, root, names, weight = argument, None, None, None
    if not os.path.exists(argument):            # a file may be called a@b=1
        what, root, names, weight = re.fullmatch(
            r"(.*?)(?::([^:]+?))?(?:@([\w,-]+))?(?:=(\d+\.?\d*|\.\d+))?", argument,
            re.DOTALL).groups()
    files = {file for pattern in without_braces(what) for file in files_of(pattern)}
    if root and not os.path.isdir(root):
        raise ValueError(f"{argument}: no folder {root}; after : stands that of the images")
    if weight and not float(weight):
        raise ValueError(f"{argument}: a weight must be more than 0")
    languages = tuple(names.split(",")) if names else ()
    return Source(argument, sorted(files), root, languages, float(weight) if weight else None)


def without_braces(pattern):
    """'{a,b}.tar' -> a.tar b.tar, '{008..010}.tar' -> 008.tar 009.tar 010.tar, as in a shell."""
    braces = re.search(r"\{([^{}]*,[^{}]*|(\d+)\.\.(\d+))\}", pattern)
    if not braces or os.path.exists(pattern):
        return [pattern]
    inside, first, last = braces.groups()
    options = inside.split(",")
    if first:
        options = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    before = pattern[:braces.start()]
    after = pattern[braces.end():]
    return [x for option in options for x in without_braces(before + option + after)]


def files_of(pattern):
    """The files with data of a FILE, FOLDER or GLOB; a folder of pictures stands for itself."""
    if os.path.isdir(pattern):
        return data_of_folder(pattern)
    if os.path.isfile(pattern):                 # also where the name looks like a pattern
        return [pattern]
    files = [file for file in glob.glob(pattern, recursive=True)
             if os.path.isfile(file) and not is_left_alone(os.path.basename(file))]
    if not files:
        raise ValueError(f"{pattern}: no such file, and no pattern that fits any")
    return files


def data_of_folder(folder):
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    keys = {os.path.splitext(name)[0] for name in names if is_picture(name)}
    beside = {name for name in names                            # KEY.json, KEY.en.txt
              if keys.intersection((name.rsplit(".", 1)[0], name.rsplit(".", 2)[0]))}
    if not all(map(is_picture, beside)):        # so another KEY.json has lost its picture
        beside.update(name for name in names if name.lower().endswith(".json"))
    files = [os.path.join(folder, name) for name in names if is_data(name) and name not in beside]
    if files:
        return files
    if any(is_picture(name) for _, _, deeper in os.walk(folder) for name in deeper):
        return [folder]
    some = " ".join(sorted(os.listdir(folder))[:5]) or "nothing"
    raise ValueError(f"{folder} holds no picture and no {' '.join(NAMED)} or part-* file, but "
                     f"{some} (say FOLDER/NAME.* of plain text, FOLDER/**/*.tar of files deeper "
                     f"inside)")


def is_data(name):
    suffix = os.path.splitext(name)[1].lower()
    return (suffix in NAMED or name.startswith("part-")) and not is_left_alone(name)


def is_left_alone(name):
    """img2dataset leaves _stats.json and .parquet beside its tars."""
    return name.startswith((".", "_")) or name.endswith(("_stats.json", ".parquet"))


def parse_all(arguments):
    """-> [Source]. A shell expands train.{en,de} to train.en train.de: these become one again."""
    merged = {}
    for number, argument in enumerate(arguments):
        source = parse(argument)
        stem, suffix = os.path.splitext(source.files[0])
        key = number
        if len(source.files) == 1 and is_language(suffix[1:]) and not os.path.isdir(stem + suffix):
            key = stem, source.languages, source.weight
        if key in merged:
            merged[key].files.extend(source.files)
        else:
            merged[key] = source
    return list(merged.values())


def open_readers(source, kind=None, languages=(), cache=None, root=None):
    """The files of a source -> readers. kind: "images", "texts" or None, which accepts both."""
    readers = []
    plain = {}                                  # NAME -> {suffix: file}
    root = source.root or root
    for file in source.files:
        stem, suffix = os.path.splitext(file)
        kind_of_file = suffix.lower()
        if os.path.isdir(file):
            readers.append(Pictures(file, source.languages))
        elif kind_of_file == ".tar":
            readers.append(Tar(file, source.languages, cache))
        elif kind_of_file == ".tsv":
            readers.append(Columns(file, source.languages, cache))
        elif kind_of_file in SUFFIXES:
            raise ValueError(f"{file} is a picture: name its folder")
        elif kind_of_file in ("", ".jsonl", ".json") or kind == "images":
            lines = ImageLines(file, source.languages, cache, root)
            pairs = kind == "texts" or (kind is None and not names_images(lines))
            readers.append(PairLines(file, source.languages, cache) if pairs else lines)
        else:
            plain.setdefault(stem, {})[suffix[1:]] = file
    readers += plain_texts(plain, len(source.files), languages, cache)
    for reader in readers:
        check(reader, kind, source.languages)
    return readers


def plain_texts(groups, count, languages, cache):
    """{NAME: {suffix: file}} -> readers. Files whose suffix is no language are left out by name;
    ValueError when these are all of the source, which has `count`."""
    readers = []
    left_out = []
    for stem, group in groups.items():
        codes = set(filter(is_language, group))
        pair = set(languages_of_name(f"{stem}.x"))                  # OPUS: NAME.de-en.*
        codes = pair if pair and pair <= codes else codes
        left_out += [group[suffix] for suffix in sorted(group.keys() - codes)]
        wanted = {k: group[k] for k in group if k in codes and k in (languages or codes)}
        if len(codes) == 1 or len(wanted) > 1:                      # one alone is refused there
            readers.append(PlainText(f"{stem}.*", wanted, cache))
    if left_out:
        why = other_layout(left_out[0]) or "has no suffix of a language"
        message = " ".join([left_out[0], why, *left_out[1:5]])
        if len(left_out) == count:
            raise ValueError(message)
        if os.environ.get("RANK", "0") == "0":                      # one process says it for all
            print("left out:", message, file=sys.stderr)
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
        self.only = set(languages or ())
        self.readers = []
        self.kept = []                          # of each reader: indices of its records; None: all
        for source in sources:
            readers = open_readers(source, kind, self.only, cache, root)
            least = 1 if kind == "images" else 2
            kept = [wanted(reader, self.only, least, cache) for reader in readers]
            self.readers += readers
            self.kept += kept
            if not sum(map(count, readers, kept)):
                found = Files([source], kind, (), cache, root).languages()
                raise ValueError(f"{source.argument} has no record in "
                                 f"{' '.join(sorted(self.only))}, but in {' '.join(found)}; where "
                                 f"it names no languages itself, say FILE@en or FILE@de,en")
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
        return [k for k in texts if not self.only or k in self.only]

    def languages(self, needed=()):
        """Codes of the languages that occur, sorted: of many records about 1,000 are read; all, as
        long as one of `needed` is not found."""
        found = set()
        step = len(self) // 1000 or 1
        for first in range(step):
            for index in range(first, len(self), step):
                reader, i = self.find(index)
                with contextlib.suppress(BadRecord), reading(reader, i):
                    found.update(self.usable(reader.texts(i)))
            if found.issuperset(needed):
                break
        return sorted(found)


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
    if isinstance(reader, Pictures):            # no file whose time tells of a change
        return np.concatenate([numbers for _, numbers in scan(None, 0)])
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
        """A record to evaluate on -> {"image": function, "captions": {language: [text]}}. The
        function reads the image -> RGB, so that many rows take little memory."""
        reader, i = self.find(index)
        with reading(reader, i):
            texts = reader.texts(i)
        captions = {language: texts[language] for language in self.usable(texts)}
        return {"image": functools.partial(self.image, index), "captions": captions}

    def image(self, index):
        reader, i = self.find(index)
        with reading(reader, i), images.undecoded(reader.record(i)[0]) as image:
            image.load()
            return images.rgb(image)


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

    def __init__(self, rank=0, share=TOLERATED):
        """share: of the last 1,000 records, how many may be bad."""
        self.rank = rank
        self.tolerated = round(share * WINDOW)
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
            stop = stop or sum(self.window) > self.tolerated
            if len(self.named) < 10 and reason not in self.named:
                tqdm.write(f"process {self.rank}: skipped {reason}", file=sys.stderr)
                self.named.add(reason)
        return sum(map(bool, reasons)), stop

    def message(self):
        return (f"more than {self.tolerated} of a process's last {WINDOW:,} records were bad, the "
                f"last here: {self.last}; `python data.py FILES --list OUT` names them all, "
                f"--max_bad tolerates more")
