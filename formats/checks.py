"""What the doctor says of texts without a model.

    one text          an encoding read wrongly, "NULL", no letter of the language's script
    two texts         their lengths, numbers and identity: is a file slipped by some lines?
    all languages     codes that mean the same; texts whose letters fit another language better

A check counts what it tests and what it finds wrong. A share that good files have too is not told.
"""
import collections
import itertools
import random
import re
import unicodedata

import numpy as np

from formats.records import is_language

WINDOW = 500                        # pairs whose lengths are compared together
FEWEST = 100                        # pairs or texts from which something can be learned
FEW = 20                            # and for a share of them
SHIFTS = (-1, 1, -2, 2, -3, 3)      # lines that one side may be late
TRIGRAMS = 1 << 15                  # trigrams of letters are hashed to so many numbers
SAMPLE = 1000                       # texts of a language and source that teach them
LONG = 20                           # trigrams of a text whose language can be told
MARGIN = 20                         # how much likelier another language is: e^20 times

# kind: (share of what was tested that good files may have, what is wrong and what to do).
KINDS = {
    "encoding": (0, "texts were read in a wrong encoding: read their source again as UTF-8"),
    "missing": (0, "texts are a missing value (nan, NULL, None): leave these records out"),
    "header": (0, "texts look like the header of a table: delete this line"),
    "picture": (0, "pictures are of one colour or one pixel wide: leave these records out"),
    "script": (0.05, "texts have no letter of its script: is the language code right?"),
    "letters": (0.2, "texts have no letter: is this a column of scores or numbers?"),
    "quotes": (0.5, "texts stand in quotes: a CSV file? Take the quotes away"),
    "identical": (0.2, "pairs say the same in both: not translated?"),
    "numbers": (0.5, "pairs with numbers have other numbers: are the lines shifted or shuffled?"),
    "lengths": (0.05, "pairs have one text that is five times as long as usual: no translations?"),
    "unrelated": (0, "pairs lie where lengths do not go together: shuffled, or no translations?"),
}
MISSING = {"nan", "null", "none", "n/a", "#n/a", "undefined"}
HEADER = {"source", "target", "src", "tgt", "text", "caption", "captions", "sentence", "sentence1",
          "sentence2", "translation", "title"}

# UTF-8 that was read as Latin-1 or Windows-1252: the first byte of a character became a letter with
# an accent, the others became signs.
SIGNS = bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "".join(map(chr, range(0x80, 0xC0)))
WRONG = re.compile(
    "\ufffd"                                    # what a program put for bytes it could not read
    f"|[\xc2\xc3][{SIGNS}]"                     # Latin letters and signs
    "|\xe2\u20ac"                               # quotes and dashes
    f"|(?:[\xd0\xd1][{SIGNS}]){{2}}"            # two letters of Cyrillic
    f"|(?:[\xe0-\xe9][{SIGNS}]{{2}}){{2}}")     # two characters of Asia
DIGIT = re.compile(r"\d")

# First words of the Unicode names of a script's letters: languages that are written in it alone.
SCRIPTS = {
    "LATIN": "af ca cs cy da de en eo es et eu fi fr ga gl hr hu id is it lt lv ms mt nb nl nn no "
             "pl pt ro sk sl so sq sv sw tl tr vi zu",
    "CYRILLIC": "be bg ky mk mn ru tg uk", "ARABIC": "ar ckb fa ps ug ur", "HEBREW": "he yi",
    "DEVANAGARI": "hi mr ne", "BENGALI": "as bn", "ETHIOPIC": "am ti", "GREEK": "el", "ARMENIAN":
    "hy", "GEORGIAN": "ka", "GUJARATI": "gu", "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn",
    "MALAYALAM": "ml", "SINHALA": "si", "THAI": "th", "HANGUL": "ko", "CJK": "zh yue",
    "CJK HIRAGANA KATAKANA": "ja",
}
LETTERS = {code: tuple(names.split()) for names, codes in SCRIPTS.items() for code in codes.split()}
UNNAMED = {"source", "target", "unknown"}       # where a file names no language
NO_CODES = {"cz": "cs", "jp": "ja", "cn": "zh", "gr": "el", "ua": "uk", "dk": "da", "sp": "es"}


def base(code):
    """en-US -> en, EN -> en."""
    return re.split("[-_]", code.lower())[0]


class Checks:
    """Of one source: what was wrong, how often and where first; and a sample of its texts."""

    def __init__(self):
        self.tested = collections.Counter()     # languages, or (kind, languages) -> how many
        self.wrong = collections.Counter()      # (kind, languages) -> how many
        self.first = {}                         # (kind, languages) -> where
        self.windows = collections.defaultdict(list)    # languages -> [(where, length, length)]
        self.samples = collections.defaultdict(list)    # language -> [(where, text)]
        self.random = random.Random(0)

    def note(self, kind, languages, where, count=1):
        self.wrong[kind, languages] += count
        self.first.setdefault((kind, languages), where)

    def text(self, where, language, text):
        bare = text.strip()
        here = f"{where}: {bare[:60]}"
        if not text.isascii() and WRONG.search(text):
            self.note("encoding", language, here)
        if bare.casefold() in MISSING:
            self.note("missing", language, here)
        if bare[0] == bare[-1] == '"':
            self.note("quotes", language, here)
        letters = filter(str.isalpha, text)
        script = LETTERS.get(base(language), "")
        if not any(unicodedata.name(letter, "").startswith(script) for letter in letters):
            has_letters = any(map(str.isalpha, text))
            self.note("script" if has_letters else "letters", language, here)

        # A sample of all so far, each with the same probability.
        sample = self.samples[language]
        self.tested[language] += 1
        place = self.random.randrange(self.tested[language])
        if len(sample) < SAMPLE:
            sample.append((where, text))
        elif place < SAMPLE:
            sample[place] = where, text

    def first_line(self, where, texts):
        """Is it no record but the names of columns?"""
        words = {text.strip().casefold() for _, text in texts}
        codes = {language.casefold() for language, _ in texts}
        if words & (HEADER | codes) or len(words) > 1 and words <= LETTERS.keys():
            self.note("header", "", f"{where}: {' | '.join(text[:30] for _, text in texts)}")

    def pairs(self, where, texts):
        """texts of one parallel record: the first is compared with each of the others."""
        a, text = texts[0]
        digits = DIGIT.search(text)
        for b, other in texts[1:]:
            key = f"{a} and {b}"
            self.tested[key] += 1
            if text.casefold() == other.casefold():
                self.note("identical", key, f"{where}: {text[:60]}")
            if digits and DIGIT.search(other):
                self.tested["numbers", key] += 1
                if numbers(text) != numbers(other):
                    self.note("numbers", key, f"{where}: {text[:40]} | {other[:40]}")
            window = self.windows[key]
            window.append((where, len(text), len(other)))
            if len(window) == WINDOW:
                self.window(key)

    def window(self, key):
        """Compares the lengths of some hundred neighbouring pairs and forgets them."""
        rows = self.windows.pop(key)
        if len(rows) < FEWEST:
            return
        places, *lengths = zip(*rows)
        a, b = np.log(np.array(lengths))                        # (2, n) -> (n,) each

        # A translation is long where its original is. If it is not, a shift may mend it.
        now = correlation(a, b)
        shift = max(SHIFTS, key=lambda shift: correlation(a, b, shift))
        shifted = correlation(a, b, shift)
        if now < 0.3 and shifted > now + 0.4:
            self.note(shift, key, f"{places[0]}; correlation of lengths {now:.2f}, shifted "
                                  f"{shifted:.2f}", len(rows))
        elif now < 0.1:
            self.note("unrelated", key, f"{places[0]}; correlation {now:.2f}", len(rows))
        else:
            unusual = np.abs(a - b - np.median(a - b)) > np.log(5)
            if unusual.any():
                self.note("lengths", key, places[unusual.argmax()], int(unusual.sum()))

    def end_of_file(self):
        for key in list(self.windows):
            self.window(key)

    def warnings(self):
        for (kind, languages), wrong in self.wrong.items():
            share, words = KINDS.get(kind, (0, ""))
            tested = self.tested.get((kind, languages), self.tested[languages])
            if kind in SHIFTS:
                late = languages.split(" and ")[kind > 0]
                words = f"pairs lie where {late} seems {abs(kind)} line(s) late: align them again"
            if wrong > share * tested and (not share or tested >= FEW):
                of = f"{languages}: {wrong:,} of {tested:,}" if languages else f"{wrong:,}"
                yield f"{of} {words} (first: {self.first[kind, languages]})"


def numbers(text):
    return sorted(int(digit) for digit in DIGIT.findall(text))


def correlation(a, b, shift=0):
    """Of a[i] with b[i + shift]; 1 where the lengths are nearly all the same."""
    a = a[max(0, -shift):len(a) - max(0, shift)]
    b = b[max(0, shift):len(b) - max(0, -shift)]
    return 1.0 if min(a.std(), b.std()) < 0.05 else np.corrcoef(a, b)[0, 1]


# --------------------------------------------------------------------------------------------------
# All languages
# --------------------------------------------------------------------------------------------------

def codes_alike(codes):
    """Language codes -> warnings of those that are none and of several for one language."""
    groups = collections.defaultdict(list)
    for code in sorted(codes):
        usual = NO_CODES.get(code.lower(), code)
        if usual != code:
            yield f"{code} is no language code: is it {usual}?"
        elif code in UNNAMED:
            yield f"{code} is a text whose language no file names: say FILE@en or FILE@de,en"
        elif not is_language(code.lower()):
            yield f"{code!r} is no language code, as en or zh-Hans are"
        groups[base(usual)].append(code)
    for usual, same in groups.items():
        if len(same) > 1 and usual in map(str.lower, same):     # zh-Hans and zh-Hant may be two
            yield f"{', '.join(same)} are different languages here: use one code"


def trigrams(text):
    """The trigrams of a text as numbers: naive Bayes needs no more."""
    letters = np.frombuffer(f" {text.lower()} ".encode("utf-32-le"), np.uint32)
    hashed = letters[:-2] * 0x9E3779B1 + letters[1:-1] * 0x85EBCA6B + letters[2:] * 0xC2B2AE35
    return hashed >> 17                                         # of 32 bits the upper 15


def likelihoods(samples):
    """{language: [(where, text)]} -> {language: log-likelihood (texts, languages) of each text}.
    Every second text is judged by what the others taught."""
    grams = {k: [trigrams(text) for _, text in texts] for k, texts in samples.items()}
    result = {k: np.zeros((len(texts), len(samples))) for k, texts in samples.items()}
    for half in (0, 1):
        counts = [np.bincount(np.concatenate(texts[1 - half::2]), minlength=TRIGRAMS)
                  for texts in grams.values()]
        counts = np.stack(counts).astype(float)                 # (languages, trigrams)

        # What a language has not shown yet is as likely as in all languages together.
        prior = (counts.sum(0) + 0.1) / (counts.sum() + 0.1 * TRIGRAMS)
        log = np.log((counts + 50 * prior) / (counts.sum(1, keepdims=True) + 50))
        for k, texts in grams.items():
            for i in range(half, len(texts), 2):
                result[k][i] = log[:, texts[i]].sum(1)
    return result


def languages_mixed(samples):
    """{language: [(where, text)]} -> warnings of texts that look like another of the languages."""
    samples = {k: texts for k, texts in samples.items() if len(texts) >= FEWEST and
               k not in UNNAMED}
    if len(samples) < 2:
        return
    names = list(samples)
    found = likelihoods(samples)
    for k, name in enumerate(names):
        others = found[name] - found[name][:, [k]]              # (texts, languages)
        margin = others.max(1)                                  # (texts,)
        long = np.array([len(text) >= LONG for _, text in samples[name]])
        wrong = long & (margin > MARGIN)
        if wrong.sum() > max(2, 0.01 * len(wrong)):
            other = np.bincount(others[wrong].argmax(1)).argmax()
            worst = [": ".join(samples[name][i]) for i in np.argsort(-margin * long)[:3]]
            yield (f"{name}: {wrong.sum():,} of {len(wrong):,} texts read look like another "
                   f"language, most like {names[other]}: is their code right? "
                   f"(worst: {' | '.join(text[:100] for text in worst)})")

    # Two codes for one mixture of languages: neither half of it knows its own texts.
    for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
        known = [np.mean(found[a][:, i] > found[a][:, j]), np.mean(found[b][:, j] > found[b][:, i])]
        if max(known) < 0.7:
            yield f"{a} and {b} cannot be told apart by their letters: were codes exchanged?"
