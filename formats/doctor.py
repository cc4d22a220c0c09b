"""The data doctor: reads every record of some sources, prints what is there and what is wrong; exit
status 1 if a record is broken. The tokenizer command reads the same sources. How a source is
written: formats/sources.py; what files may hold: formats/records.py.

    python data.py cc3m/*.tar wikimatrix/*.tsv --tokenizer spm.model
    python data.py tokenizer --texts wikimatrix/*.tsv --vocab 8000 --out spm.model
"""
import array
import collections
import contextlib
import heapq
import itertools
import sys
import textwrap

import numpy as np
from tqdm import tqdm

from formats import checks
from formats.images import rgb, undecoded
from formats.records import BadRecord, identity, reading
from formats.sources import open_readers, parse_all


class Findings:
    """What the doctor has seen of one kind of files. Of an image or text it keeps some bytes of
    numbers: millions fit into memory."""

    def __init__(self, readers, encode=None, longest=64, listing=None):
        """encode: text -> tokens; without a tokenizer letters are counted. listing: a file for
        every broken record."""
        self.readers = readers
        self.listing = listing
        self.checks = checks.Checks()
        self.pairs = not readers[0].images
        self.encode = encode or list
        self.unit = "tokens" if encode else "characters"
        self.longest = longest
        self.languages = collections.Counter()
        self.texts_per_record = collections.Counter()
        self.formats = collections.Counter()
        self.records = array.array("q")         # an identity each, 0 for a broken one
        self.texts = array.array("q")
        self.lengths = array.array("i")
        self.top = []                           # (length, where, language, text), the ten longest
        self.samples = []                       # (where, texts)
        self.broken = 0
        self.messages = []

    def look(self, reader, i):
        """Reads a record whole, also the image."""
        where = reader.where(i)
        try:
            with reading(reader, i):
                raw, captions = reader.record(i)
                if self.pairs and len(captions) < 2:
                    raise ValueError(f"one language only ({' '.join(captions)}), not two")
                if not self.pairs:
                    self.look_at_image(raw, where)
        except BadRecord as error:
            self.add_broken(str(error))
            self.records.append(0)
            return
        self.records.append(identity(raw))
        self.add(where, [(language, text) for language, group in captions.items()
                         for text in group])
        if self.pairs:
            first = [(language, group[0]) for language, group in captions.items()]
            self.checks.pairs(where, first)
            if i == 0:
                self.checks.first_line(where, first)

    def look_at_image(self, raw, where):
        with undecoded(raw) as image:
            size = image.size
            image.draft("RGB", (1, 1))          # a JPEG is read to its end but decoded at 1/8
            darkest, brightest = np.array(rgb(image).getextrema()).T         # (3,) each
            self.formats[image.format] += 1
        if min(size) == 1 or (darkest == brightest).all():
            self.checks.note("picture", "", where)

    def add_broken(self, message):
        self.broken += 1
        if self.listing:
            print(message, file=self.listing)
        if self.broken <= 10:
            self.messages.append(message)

    def add(self, where, texts):
        """texts: [(language, text)] of a good record."""
        self.languages.update({language for language, _ in texts})
        self.texts_per_record[len(texts)] += 1
        new = []
        for language, text in texts:
            length = len(self.encode(text))
            self.lengths.append(length)
            self.texts.append(identity(f"{language} {text}".encode()))
            new.append((length, where, language, text))
            self.checks.text(where, language, text)
        self.top = heapq.nlargest(10, self.top + new)
        if len(self.samples) < 3:
            self.samples.append((where, texts))

    def report(self, name):
        kind = "parallel text" if self.pairs else "images"
        records = sum(len(reader) for reader in self.readers)
        print(f"{name}: {kind}, {len(self.readers):,} file(s), {records:,} records")
        if self.texts:
            self.report_good()
        for line in self.checks.warnings():
            show("warning", line)
        show("broken", f"{self.broken:,} records" if self.broken else "none", *self.messages)

    def report_good(self):
        show("languages", "  ".join(f"{k} {n:,}" for k, n in sorted(self.languages.items())))
        show("texts a record",
             "  ".join(f"{k}: {n:,}" for k, n in sorted(self.texts_per_record.items())))
        show("images", "  ".join(f"{k} {n:,}" for k, n in self.formats.most_common()))
        show(self.unit, self.lengths_line())
        again, before = self.twins()
        texts = len(self.texts) - len(np.unique(np.asarray(self.texts)))
        show("exact duplicates",
             f"{len(again):,} of {len(self.records) - self.records.count(0):,} "
             f"{'pairs' if self.pairs else 'images'}, {texts:,} of {len(self.texts):,} texts")
        show("duplicate", *(f"{self.where(again[k])} = {self.where(before[k])}"
                            for k in np.argsort(again)[:3]))
        show("longest", *(f"{length}  {where}  {language}: {short(text)}"
                          for length, where, language, text in self.top))
        show("samples", *("  ".join([where, *(f"{k}: {short(text)}" for k, text in texts[:3])])
                          for where, texts in self.samples))

    def twins(self):
        """-> (numbers of the records that are there before, numbers of those they repeat)."""
        same = np.asarray(self.records)
        order = same.argsort(kind="stable")
        order = order[same[order] != 0]
        repeats = same[order[1:]] == same[order[:-1]]
        return order[1:][repeats], order[:-1][repeats]

    def where(self, number):
        """The place of a record, counted through all files."""
        for reader in self.readers:
            if number < len(reader):
                return reader.where(int(number))
            number -= len(reader)

    def lengths_line(self):
        lengths = np.asarray(self.lengths)
        half, nine, most = np.percentile(lengths, [50, 90, 99], method="inverted_cdf")
        line = f"median {half}, 90 % up to {nine}, 99 % up to {most}, longest {lengths.max()}"
        if self.unit == "characters":
            return f"{line} (--tokenizer FILE counts tokens and how many texts are cut)"
        cut = 100 * np.mean(lengths > self.longest)
        return f"{line}; {cut:.2f} % are cut at {self.longest}"


def show(label, *texts):
    for text in texts:
        for line in textwrap.wrap(text, 100, break_on_hyphens=False):
            print(f"  {label:16} {line}")
            label = ""


def short(text, most=60):
    return text if len(text) <= most else f"{text[:most - 3]}..."


def bar(items, name):
    return tqdm(items, desc=name, leave=False, disable=not sys.stderr.isatty())


def compare(sources):
    """{name: Findings} -> warnings of what lies in several sources and of their languages."""
    for (a, one), (b, other) in itertools.combinations(sources.items(), 2):
        same = np.setdiff1d(np.intersect1d(one.records, other.records), [0])
        if len(same):
            first, second = (found.where(found.records.index(same[0])) for found in (one, other))
            yield (f"{len(same):,} records of {a} are also in {b}: do you test what you train on? "
                   f"({first} = {second})")
        texts = np.intersect1d(one.texts, other.texts)
        if len(texts) > 0.01 * min(len(one.texts), len(other.texts)):
            yield f"{len(texts):,} texts of {a} are also in {b}"
    samples = collections.defaultdict(list)
    for found in sources.values():
        for language, texts in found.checks.samples.items():
            samples[language] += texts
    yield from checks.codes_alike(samples)
    yield from checks.languages_mixed(samples)


def doctor(arguments, encode, longest, cache, image_root, listing=None):
    """Prints the findings of every source -> exit status: 1 if a record is broken. encode: text ->
    its tokens, or None; longest: how many of them training reads; listing: file for the broken."""
    seen = {}
    for source in parse_all(arguments):
        readers = open_readers(source, cache=cache, root=image_root)
        for images in (True, False):            # a folder may hold both
            some = [reader for reader in readers if reader.images == images]
            if not some:
                continue
            findings = Findings(some, encode, longest, listing)
            for reader in some:
                for i in bar(range(len(reader)), reader.path):
                    findings.look(reader, i)
                findings.checks.end_of_file()
                if not len(reader):
                    findings.add_broken(f"{reader.path}: no records")
            findings.report(source.argument)
            seen[f"{source.argument} {'images' if images else 'texts'}"] = findings
    for line in compare(seen):
        show("warning", line)
    return 1 if any(findings.broken for findings in seen.values()) else 0


def every_text(arguments, cache, most=2_000_000):
    """(language, text) of some sources' texts; of many records every second, third ... one.
    Broken ones are passed over: the doctor names them."""
    readers = [reader for source in parse_all(arguments)
               for reader in open_readers(source, cache=cache)]
    step = max(1, sum(map(len, readers)) // most)
    for reader in readers:
        for i in bar(range(0, len(reader), step), reader.path):
            captions = {}
            with contextlib.suppress(BadRecord), reading(reader, i):
                captions = reader.texts(i)
            for language, texts in captions.items():
                yield from ((language, text) for text in texts)
