"""The data doctor: reads every record of some sources, says what is there and what is wrong; exit status 1 if anything
is broken. And a tokenizer from the same sources. How a source is written: formats/sources.py; what files may hold:
formats/records.py.

    python data.py cc3m/*.tar wikimatrix/*.tsv --tokenizer spm.model
    python data.py tokenizer --texts wikimatrix/*.tsv --vocab 8000 --out spm.model
"""
import array
import collections
import heapq
import sys
import textwrap

import numpy as np
from tqdm import tqdm

from formats import sources
from formats.images import undecoded
from formats.records import BadRecord, identity, reading


class Findings:
    """What the doctor saw of one source. Of images and texts it keeps a fingerprint of 8 bytes: millions fit."""

    def __init__(self, readers, encode, longest):
        self.readers, self.encode, self.longest = readers, encode, longest
        self.pairs = not readers[0].images
        self.spoken, self.per_record, self.lengths, self.formats = (collections.Counter() for _ in range(4))
        self.things, self.texts = array.array("q"), array.array("q")
        self.broken, self.first_broken, self.good, self.top, self.samples = 0, [], 0, [], []

    def look(self, reader, i, rng):
        """Reads a record whole, the image to its last row."""
        try:
            with reading(reader, i):
                thing, said = reader.record(i)
                if self.pairs and len(said) < 2:
                    raise ValueError(f"one language only ({' '.join(said)}), not two")
                if not self.pairs:
                    with undecoded(thing) as image:
                        image.draft("RGB", (1, 1))
                        image.load()
                        self.formats[image.format] += 1
        except BadRecord as error:
            self.broken += 1
            if self.broken <= 10:
                self.first_broken.append(str(error))
            return
        self.add(reader.where(i), thing, [(k, text) for k, group in said.items() for text in group], rng)

    def add(self, where, thing, texts, rng):
        self.good += 1
        self.things.append(identity(thing))
        self.spoken.update({k for k, _ in texts})
        self.per_record[len(texts)] += 1
        for language, text in texts:
            size = len(self.encode(text) if self.encode else text)
            self.lengths[size] += 1
            self.texts.append(identity(f"{language} {text}".encode("utf-8", "surrogatepass")))
            if len(self.top) < 10 or size > self.top[0][0]:
                (heapq.heappushpop if len(self.top) == 10 else heapq.heappush)(self.top, (size, where, language, text))
        place = len(self.samples) if len(self.samples) < 3 else int(rng.integers(self.good))     # all equally likely
        if place < 3:
            self.samples[place:place + 1] = [(where, texts)]

    def report(self, name):
        size = sum(reader.size for reader in self.readers)
        print(f"{name}: {'parallel text' if self.pairs else 'images'}, {len(self.readers):,} file(s), "
              f"{sum(map(len, self.readers)):,} records, {size / 2 ** 20:,.1f} MiB")
        if self.good:
            show("languages", "  ".join(f"{k} {n:,}" for k, n in sorted(self.spoken.items())))
            show("texts a record", "  ".join(f"{k}: {n:,}" for k, n in sorted(self.per_record.items())))
            show("images", "  ".join(f"{k} {n:,}" for k, n in self.formats.most_common()))
            total, values, marks, seen = sum(self.lengths.values()), sorted(self.lengths), {}, 0
            for value in values:
                seen += self.lengths[value]
                marks |= {share: value for share in (50, 90, 99) if share not in marks and seen >= total * share / 100}
            cut = sum(n for value, n in self.lengths.items() if value > self.longest)
            known = f"; {100 * cut / total:.2f} % are cut at {self.longest}"
            show("tokens" if self.encode else "characters",
                 f"median {marks[50]}, 90 % up to {marks[90]}, 99 % up to {marks[99]}, longest {values[-1]}"
                 + (known if self.encode else " (--tokenizer FILE counts tokens and how many texts are cut)"))
            show("exact duplicates", f"{repeated(self.things):,} of {len(self.things):,} "
                 f"{'pairs' if self.pairs else 'images'}, {repeated(self.texts):,} of {len(self.texts):,} texts")
            for i, (length, where, language, text) in enumerate(sorted(self.top, reverse=True)):
                show("" if i else "longest", f"{length}  {where}  {language}: {short(text)}")
            for i, (where, texts) in enumerate(self.samples):
                show("" if i else "samples", f"{where}  " + "  ".join(f"{k}: {short(text)}" for k, text in texts[:3]))
        show("broken", f"{self.broken:,} records" if self.broken else "none")
        for line in self.first_broken:
            show("", line)


def show(label, text):
    for i, line in enumerate(textwrap.wrap(text, 100, break_on_hyphens=False) if text else ()):
        print(f"  {'' if i else label:16} {line}")


def short(text, most=60):
    return text if len(text) <= most else f"{text[:most - 3]}..."


def repeated(fingerprints):
    """How many are there a second time or more."""
    return len(fingerprints) - len(np.unique(np.asarray(fingerprints)))


def doctor(arguments, encode, longest, cache, image_root):
    """Prints the findings of every source -> exit status: 1 if a record is broken. encode: text -> its tokens, or None;
    longest: how many of them training reads."""
    rng, broken = np.random.default_rng(0), 0
    for source in sources.parse_all(arguments):
        argument, readers = source.argument, sources.open_readers(source, cache=cache, root=image_root)
        for kind in (True, False):                                           # a folder may hold both
            part = [r for r in readers if r.images == kind]
            if part:
                found = Findings(part, encode, longest)
                every = ((reader, i) for reader in part for i in range(len(reader)))
                for reader, i in tqdm(every, total=sum(map(len, part)), leave=False, disable=not sys.stderr.isatty()):
                    found.look(reader, i, rng)
                found.broken += sum(not len(reader) for reader in part)
                found.first_broken += [f"{reader.path}: no records" for reader in part if not len(reader)]
                found.report(argument)
                broken += found.broken
    return 1 if broken else 0


def every_text(arguments, cache, most=2_000_000):
    """The texts of some sources in all languages alike; of many records every second, third ... Broken ones are passed
    over: the doctor names them."""
    readers = [r for source in sources.parse_all(arguments)
               for r in sources.open_readers(source, cache=cache)]
    every = max(1, sum(map(len, readers)) // most)
    for reader in readers:
        for i in tqdm(range(0, len(reader), every), desc=reader.path, leave=False, disable=not sys.stderr.isatty()):
            try:
                with reading(reader, i):
                    texts = reader.texts(i)
            except BadRecord:
                continue
            yield from (text for group in texts.values() for text in group)
