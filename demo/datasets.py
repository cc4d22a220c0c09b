"""The demo's two datasets, as data.py wants them: len() and [index, rng] -> (image or sentence,
sentence, id). To train on data of your own from Python, write a class like these.
"""
import numpy as np
from PIL import Image

from demo import emoji


def training_texts():
    """Names and keywords of the training concepts in the 21 training languages."""
    for concept in emoji.concepts().values():
        if concept["split"] == "train":
            for language in emoji.languages("seen") + emoji.languages("text_only"):
                yield concept["name"][language]
                yield from concept["kw"].get(language, [])


def concept_id(chosen):
    """One int64 for a list of at most four concept numbers under 999, equal for equal lists."""
    number = 0
    for i in chosen:
        number = number * 1000 + i + 1
    return number


class DemoImages:
    """Drawings with a caption each. Index i < concepts: that concept alone, so that an epoch names
    each once; else a new scene of two to four. size: pixels a side."""

    def __init__(self, languages=None, scenes=0.25, keywords=0.1, size=emoji.SIZE):
        self.drawings = emoji.training_drawings()
        self.concepts = list(self.drawings)
        self.codes = languages or emoji.languages("seen")
        self.length = len(self.concepts) + round(scenes * len(self.concepts))
        self.keywords = keywords
        self.size = size

    def __len__(self):
        return self.length

    def languages(self):
        return sorted(self.codes)

    def choose(self, index, rng):
        """Concept numbers of example `index`."""
        if index < len(self.concepts):
            return [index]
        count = int(rng.integers(2, 5))
        return rng.choice(len(self.concepts), count, replace=False).tolist()

    def __getitem__(self, key):
        """(index, rng) -> image (3, size, size) uint8, caption, id."""
        index, rng = key
        chosen = self.choose(index, rng)
        names = [self.concepts[i] for i in chosen]
        language = self.codes[rng.integers(len(self.codes))]
        drawings = [self.drawings[name] for name in names]
        image = emoji.draw([styles[rng.integers(len(styles))] for styles in drawings], rng)
        if len(names) == 1 and rng.random() < self.keywords:
            text = emoji.keywords(names[0], language, rng)
        else:
            text = emoji.caption(names, language)
        if self.size != emoji.SIZE:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image).transpose(2, 0, 1)           # (s, s, 3) -> (3, s, s)
        return pixels, text, concept_id(chosen)


class DemoParallel(DemoImages):
    """The same, named in one language that has images and in one that has none."""

    def __init__(self, languages=None, others=None, scenes=0.2):
        super().__init__(languages, scenes)
        self.others = others or emoji.languages("text_only")

    def languages(self):
        return sorted([*self.codes, *self.others])

    def __getitem__(self, key):
        """(index, rng) -> sentence a, sentence b, id. Which is a and which is b is random."""
        index, rng = key
        chosen = self.choose(index, rng)
        names = [self.concepts[i] for i in chosen]
        pair = [emoji.caption(names, group[rng.integers(len(group))])
                for group in (self.codes, self.others)]
        a, b = rng.permutation(2)
        return pair[a], pair[b], concept_id(chosen)
