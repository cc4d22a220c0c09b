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
from formats.records import (IMAGE_KEYS, BadRecord, Columns, ImageLines, PairLines, Pictures,
                             PlainText, Tar, identity, indexed, is_language, is_picture,
                             languages_of_name, other_layout, reading)

NAMED = (".tar", ".tsv", ".jsonl", ".json")     # any other suffix is the language of plain text
TOLERATED = 0.01                                # share of bad records in the last WINDOW
WINDOW = 1000


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
            r"(.*?)"                            # FILE, FOLDER or GLOB
            r"(?::([^:]+?))?"                   # :DIR
            r"(?:@([\w,-]+))?"                  # @LANGUAGE,LANGUAGE
            r"(?:=(\d+\.?\d*|\.\d+))?",         # =WEIGHT
            argument, re.DOTALL).groups()
    files = {file for pattern in without_braces(what) for file in files_of(pattern)}
    if root and not os.path.isdir(root):
        raise ValueError(f"{argument}: no folder {root}; after : stands that of the images")
    if weight and not float(weight):
        raise ValueError(f"{argument}: a weight must be more than 0")
    languages = tuple(names.split(",")) if names else ()
    return Source(argument, sorted(files), root, languages, float(weight) if weight else None)


def without_braces(pattern):
    """'{008..010}.tar' -> 008.tar 009.tar 010.tar, as in a shell. (A shell does {a,b} itself.)"""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not braces or os.path.exists(pattern):
        return [pattern]
    first, last = sorted(braces.groups(), key=int)
    numbers = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    whole = [pattern.replace(braces[0], number, 1) for number in numbers]
    return [file for one in whole for file in without_braces(one)]


def files_of(pattern):
    """The files with data of a FILE, FOLDER or GLOB; a folder of pictures stands for itself."""
    if os.path.isdir(pattern):
        return data_of_folder(pattern)
    if os.path.isfile(pattern):                 # also where the name looks like a pattern
        return [pattern]
    files = list(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not files:
        raise ValueError(f"{pattern}: no such file, and no pattern that fits any")
    return [file for file in files if not is_left_alone(os.path.basename(file))] or files


def data_of_folder(folder):
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    keys = {os.path.splitext(name)[0] for name in names if is_picture(name)}
    beside = {name for name in names                            # KEY.json, KEY.en.txt
              if keys.intersection((name.rsplit(".", 1)[0], name.rsplit(".", 2)[0]))}
    files = [os.path.join(folder, name) for name in names if is_data(name) and name not in beside]
    if not all(map(is_picture, beside)):        # captions: the folder is the data
        others = [file for file in files if not file.lower().endswith(".json")]
        leave_out(others, "lies in a folder of pictures with captions beside them: name it itself")
        return [folder]                         # a KEY.json alone has lost its picture
    if files:
        return files
    if any(is_picture(name) for _, _, deeper in os.walk(folder) for name in deeper):
        return [folder]
    some = " ".join(sorted(os.listdir(folder))[:5]) or "nothing"
    raise ValueError(f"{folder} holds no picture and no {' '.join(NAMED)} or part-* file, but "
                     f"{some} (say FOLDER/NAME.* of plain text, FOLDER/**/*.tar of files deeper "
                     f"inside)")


def is_data(name):
    known = name.lower().endswith(NAMED) or name.startswith("part-")
    return known and not is_left_alone(name)


def is_left_alone(name):
    """img2dataset leaves _stats.json and .parquet beside its tars."""
    return name.startswith((".", "_")) or name.endswith(("_stats.json", ".parquet"))


def parse_all(arguments):
    """-> [Source]. A shell expands train.{en,de} to train.en train.de: these become one again."""
    merged = {}
    for number, argument in enumerate(arguments):
        source = parse(argument)
        stem, language = plain_name(source.files[0])
        key = number
        if len(source.files) == 1 and is_language(language) and os.path.isfile(source.files[0]):
            key = stem, source.languages, source.weight
        if key in merged:
            merged[key].files.extend(source.files)
        else:
            merged[key] = source
    return list(merged.values())


def plain_name(file):
    """Plain text NAME.de or NAME.de.txt -> (NAME, "de"); of another suffix (NAME, that suffix)."""
    stem, suffix = os.path.splitext(file)
    inner = os.path.splitext(stem)
    if suffix.lower() == ".txt" and is_language(inner[1][1:]):
        stem, suffix = inner
    return stem, suffix[1:]


def open_readers(source, kind=None, languages=(), cache=None, root=None):
    """The files of a source -> readers. kind: "images", "texts" or None, which accepts both."""
    readers = []
    plain = {}                                  # NAME -> {suffix: file}
    for file in source.files:
        form = os.path.splitext(file)[1].lower()
        if os.path.isdir(file):
            readers.append(Pictures(file, source.languages))
        elif is_picture(file):
            raise ValueError(f"{file} is a picture: name its folder")
        elif form in (".tar", ".tsv"):
            reader = Tar if form == ".tar" else Columns
            readers.append(reader(file, source.languages, cache))
        elif form in ("", *NAMED) or kind == "images":
            lines = ImageLines(file, source.languages, cache, source.root or root)
            if kind == "texts" or kind is None and not names_images(lines):
                lines = PairLines(file, source.languages, cache)
            readers.append(lines)
        else:
            stem, language = plain_name(file)
            plain.setdefault(stem, {})[language] = file
    readers += plain_texts(plain, source, languages, cache)
    for reader in readers:
        check(reader, kind, source.languages)
    return readers


def plain_texts(groups, source, languages, cache):
    """{NAME: {suffix: file}} -> readers. Files whose suffix is no language are left out by name;
    ValueError when these are all of the source."""
    readers = []
    left_out = []
    for stem, group in groups.items():
        codes = set(filter(is_language, group))
        pair = set(languages_of_name(f"{stem}.x"))                  # OPUS: NAME.de-en.*
        if pair and pair <= codes:
            codes = pair
        left_out += [file for suffix, file in group.items() if suffix not in codes]
        wanted = codes.intersection(languages or codes)
        if len(codes) == 1 or len(wanted) > 1:                      # one alone is refused there
            files = {suffix: group[suffix] for suffix in sorted(wanted)}
            readers.append(PlainText(f"{stem}.*", files, cache))
    if left_out:
        why = other_layout(left_out[0]) or "has no suffix of a language"
        if len(left_out) == len(source.files):
            raise ValueError(" ".join([left_out[0], why, *left_out[1:5]]))
        leave_out(left_out, why)
    return readers


def leave_out(files, why):
    """Says so, one process for all."""
    if files and os.environ.get("RANK", "0") == "0":
        print("left out:", files[0], why, *files[1:5], file=sys.stderr)


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
    if names and not reader.images and len(set(names)) != 2:
        raise ValueError(f"{reader.path} is parallel text: name its two languages, as in "
                         f"FILE@de,en")


# --------------------------------------------------------------------------------------------------
# Datasets: len() and [index, rng] -> (image or sentence, sentence, id)
# --------------------------------------------------------------------------------------------------

class Files:
    """The records of some sources as one list; with languages, only those that have them."""

    def __init__(self, sources, kind, languages=(), cache=None, root=None):
        self.only = set(languages or ())
        self.found = set()                      # those of `only` that occur
        self.readers = []
        self.kept = []                          # of each reader: the numbers of its records
        least = 1 if kind == "images" else 2    # languages of a record
        for source in sources:
            for reader in open_readers(source, kind, self.only, cache, root):
                kept, found = choose(reader, self.only, least, cache)
                self.readers.append(reader)
                self.kept.append(kept)
                self.found.update(found)
        if self.only and not self.found:
            others = Files(sources, kind, (), cache, root).languages()
            wanted = "two of " * (least == 2) + " ".join(sorted(self.only))
            raise ValueError(f"{' '.join(source.argument for source in sources)}: no record in "
                             f"{wanted}, but in {' '.join(others)}; where a file names no "
                             f"languages itself, say FILE@en or FILE@de,en")
        self.starts = [0, *itertools.accumulate(map(len, self.kept))]

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
        return self.readers[k], int(self.kept[k][index - self.starts[k]])

    def picture(self, index):
        """What two records of one picture have in common; None for a bad one."""
        reader, i = self.find(index)
        with contextlib.suppress(BadRecord), reading(reader, i):
            return reader.picture(i)

    def usable(self, texts):
        """Of {language: [texts]} the languages that training shall use."""
        return [k for k in texts if not self.only or k in self.only]

    def languages(self):
        """Codes of the languages that occur, sorted; of many records about 1,000 are read."""
        if self.only:
            return sorted(self.found)
        found = set()
        for index in range(0, len(self), len(self) // 1000 or 1):
            reader, i = self.find(index)
            with contextlib.suppress(BadRecord), reading(reader, i):
                found.update(reader.texts(i))
        return sorted(found)


def choose(reader, languages, least, cache):
    """-> (the numbers of the records that have `least` of the languages or more; those of the
    languages that they have). Kept on disk, like the index: every record may have to be read."""
    if not len(reader):
        raise ValueError(f"{reader.path} has no record; is it empty or cut off?")
    if not languages:
        return range(len(reader)), ()
    if reader.same_languages:                   # all records, or none
        found = languages.intersection(reader.same_languages)
        return (range(len(reader)), found) if len(found) >= least else ((), ())
    codes = sorted(languages)

    def scan(file, size):
        """The numbers of records and, after them, 1 for each of the languages that was found."""
        found = set()
        for first in range(0, len(reader), 10_000):
            kept = []
            for i in range(first, min(first + 10_000, len(reader))):
                known = languages                               # training shall count a bad one
                with contextlib.suppress(BadRecord), reading(reader, i):
                    known = languages.intersection(reader.texts(i))
                    if len(known) >= least:
                        found.update(known)
                if len(known) >= least:
                    kept.append(i)
            yield size * first // len(reader), np.array(kept, np.int64)
        yield size, np.array([code in found for code in codes], np.int64)

    if isinstance(reader, Pictures):            # no file whose time tells of a change
        numbers = np.concatenate([part for _, part in scan(None, 0)])
    else:
        question = repr(("choose", codes, least, reader.names))
        label = hashlib.sha1(question.encode()).hexdigest()[:8]
        numbers = indexed(reader.path, scan, cache, f".{label}")
    found = itertools.compress(codes, numbers[-len(codes):])
    return numbers[:-len(codes)], set(found)


def row_of(reader, i):
    """Record i to evaluate on -> {"number": i, "captions": {language: [text]}} and of an image
    "picture", what names it, and "image", a function that reads it -> RGB, so that many rows take
    little memory."""
    with reading(reader, i):
        row = {"number": i, "captions": reader.texts(i)}
        if reader.images:
            row["picture"] = reader.picture(i)
    if reader.images:
        row["image"] = functools.partial(image_of, reader, i)
    return row


def by_picture(rows):
    """Rows of images, of which several may be captions of one picture -> a row for each picture,
    with all its captions."""
    found = {}
    for row in rows:
        first = found.setdefault(row["picture"], row)
        if first is not row:
            for language, texts in row["captions"].items():
                first["captions"].setdefault(language, []).extend(texts)
    return list(found.values())


def image_of(reader, i):
    with reading(reader, i), images.undecoded(reader.record(i)[0]) as image:
        return images.rgb(image)


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
        """A record to evaluate on, as row_of; only the languages that training shall use."""
        row = row_of(*self.find(index))
        texts = row["captions"]
        return row | {"captions": {language: texts[language] for language in self.usable(texts)}}


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
