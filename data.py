"""From records to batches: tokenizer, masking, the two streams, the order of examples.

    image-text   {"images" (B, 3, pixels, pixels) uint8, "b": Sentences, "masked": Masked, "ids" (B,)}
    parallel     {"a": Sentences, "b": Sentences, "masked": Masked, "ids" (B,)}

Sentences are packed: token_ids (T,) and starts (B+1,). Masked is b with some tokens masked: token_ids (T,), the masked positions rows (M,)
in order, and what stood there (M,). Everything random about an example - language, role, masking, augmentation - is
drawn from a generator seeded by (seed, stream, epoch, index), and example i of step s is a function of the position
s * N + i alone. So the data are the same at any number of processes and of workers, and after a resume; there is no
iterator state to save.

Letters: B sequences per process, W processes, N = W*B, T tokens in the packed batch, M masked tokens, V vocabulary.

    python data.py                   one example of each stream of the demo, in words
    python data.py PATH ...          the data doctor: what these files hold and what is wrong (formats/doctor.py)
    python data.py tokenizer ...     makes a tokenizer from texts
"""
import argparse
import functools
import io
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

from demo import emoji
from formats import doctor
from formats.images import eval_transform
from formats.records import TOLERATED, BadRecord, reason
from formats.sources import Images, Pairs

BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3                                          # XLM-R's layout (F3.5)
LONGEST = 64                                                                 # tokens of a sentence, with <s> and </s>


class Arguments(argparse.ArgumentParser):
    """argparse for every command here: a mistake is one line and status 2, no flag is guessed from its beginning."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists what there is)\n")


def fail(error):
    """Says in one line what was wrong -> exit status 2. A worker's error brings its traceback: the last line of it."""
    text = str(error).strip()
    print("error:", *(text.splitlines()[-1] if "\nOriginal Traceback" in text else text).split(), file=sys.stderr)
    return 2


# ------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------------------------

class Tokenizer:
    """sentencepiece with XLM-R's ids: <s> 0, <pad> 1, </s> 2, <unk> 3, piece p -> p + 1, <mask> last."""

    def __init__(self, model):
        """model: the bytes of a sentencepiece model (XLM-R's own sentencepiece.bpe.model works)."""
        if not model:
            raise ValueError("no tokenizer: its sentencepiece.bpe.model must lie beside the weights when they are "
                             "imported")
        self.model = model
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"this is not a sentencepiece model ({error})") from None
        self.size = len(self.processor) + 2                                     # V
        self.mask = self.size - 1

    def encode(self, text, longest=LONGEST):
        """-> ids with <s> and </s>, cut to `longest` (None: not at all)."""
        ids = [BOS] + [p + 1 if p else UNKNOWN for p in self.processor.encode(text)]
        return ids[:longest and longest - 1] + [EOS]

    def pieces(self, ids):
        """The pieces of some ids, for people to read."""
        special = {BOS: "<s>", PAD: "<pad>", EOS: "</s>", UNKNOWN: "<unk>", self.mask: "<mask>"}
        return [special.get(i) or self.processor.id_to_piece(i - 1) for i in map(int, ids)]


def train_tokenizer(texts, vocabulary):
    """A unigram model with byte fallback over an iterable of sentences -> Tokenizer."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, vocab_size=vocabulary, model_type="unigram",
        byte_fallback=True, character_coverage=0.9999, num_threads=1, minloglevel=2, hard_vocab_limit=False)
    return Tokenizer(out.getvalue())


@functools.cache
def demo_tokenizer(vocabulary=8000):
    """Trained on what the demo trains on: names and keywords of training concepts in the 21 training languages."""
    trained = emoji.languages("seen") + emoji.languages("text_only")
    rows = [c for c in emoji.concepts().values() if c["split"] == "train"]
    return train_tokenizer((text for c in rows for k in trained for text in [c["name"][k], *c["kw"].get(k, [])]),
                           vocabulary)


# ------------------------------------------------------------------------------------------------------------------
# Masking
# ------------------------------------------------------------------------------------------------------------------

def mask_tokens(ids, rng, tokenizer, probability=0.4, most=20):
    """ids (list) -> (masked ids, masked positions in order). F3.6 with one repair: <s>, </s> and other specials are
    never masked nor drawn as replacements (the official code may mask </s>).

    min(most, max(1, round(n * probability))) positions in spans of one, or with probability 0.2 of two or three; each
    becomes <mask> (80 %), a random word (10 %) or stays (10 %)."""
    candidates = [i for i, word in enumerate(ids) if word > UNKNOWN]
    count = min(most, max(1, round(len(ids) * probability)), len(candidates))
    masked_positions, allowed = set(), set(candidates)
    for i in rng.permutation(candidates):
        if len(masked_positions) >= count:
            break
        span = int(rng.integers(2, 4)) if rng.random() < 0.2 else 1
        masked_positions.update(allowed.intersection(range(int(i), int(i) + span)))
    masked_positions = sorted(rng.permutation(sorted(masked_positions))[:count].tolist())
    masked = list(ids)
    for i in masked_positions:
        dice = rng.random()
        masked[i] = (tokenizer.mask if dice < 0.8 else
                     int(rng.integers(UNKNOWN + 1, tokenizer.mask)) if dice < 0.9 else ids[i])
    return masked, masked_positions


# ------------------------------------------------------------------------------------------------------------------
# Order
# ------------------------------------------------------------------------------------------------------------------

def generator(*key):
    """A generator that belongs to (seed, stream, epoch, index) and to nobody else."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


def shuffled(index, n, *key):
    """Where position `index` of 0..n-1 goes in the permutation that belongs to `key`, in O(1) memory: four Feistel
    rounds over the next power of four, walked until the result is inside."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(key).generate_state(4).tolist()
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for k in keys:
            mixed = (right + k) * 0x9E3779B1 & 0xFFFFFFFF
            mixed = (mixed ^ mixed >> 15) * 0x85EBCA6B & 0xFFFFFFFF
            left, right = right, left ^ (mixed ^ mixed >> 13) & ((1 << half) - 1)
        index = left << half | right
        if index < n:
            return index


def example_at(position, n, seed, stream):
    """(epoch, index) of a position in the endless stream: every index once per epoch, an epoch's end cuts no batch."""
    return position // n, shuffled(position % n, n, seed, stream, position // n)


# ------------------------------------------------------------------------------------------------------------------
# The two streams
# ------------------------------------------------------------------------------------------------------------------

class DemoImages:
    """Drawings of the demo with a caption each. Index i < concepts: that concept alone, so that an epoch names each
    once (two drawings of one concept would be each other's wrong partners); else a fresh scene of two to four. `size`
    pixels a side: 64 as drawn, more or less for a model that sees it otherwise."""

    def __init__(self, languages=None, scenes=0.25, keywords=0.1, size=emoji.SIZE):
        self.drawings = emoji.training_drawings()
        self.ids = list(self.drawings)
        self.languages = languages or emoji.languages("seen")
        self.length, self.keywords, self.size = len(self.ids) + round(scenes * len(self.ids)), keywords, size

    def __len__(self):
        return self.length

    def choose(self, index, rng):
        """Concept numbers of example `index`."""
        alone = index < len(self.ids)
        return [index] if alone else rng.choice(len(self.ids), int(rng.integers(2, 5)), replace=False).tolist()

    def __getitem__(self, key):
        """(index, rng) -> image (3, size, size) uint8, caption, id."""
        index, rng = key
        chosen = self.choose(index, rng)
        ids, language = [self.ids[i] for i in chosen], self.languages[rng.integers(len(self.languages))]
        image = emoji.draw([self.drawings[i][rng.integers(len(self.drawings[i]))] for i in ids], rng)
        text = (emoji.keywords(ids[0], language, rng) if len(ids) == 1 and rng.random() < self.keywords else
                emoji.caption(ids, language))
        return eval_transform(image, self.size), text, concept_id(chosen)


class DemoParallel(DemoImages):
    """The same concepts and scenes in one language with images and one without, as English and another in the paper."""

    def __init__(self, languages=None, others=None, scenes=0.2):
        super().__init__(languages, scenes)
        self.others = others or emoji.languages("text_only")

    def __getitem__(self, key):
        """(index, rng) -> sentence a, sentence b, id. Which is a and which is b is a toss (F2.3)."""
        index, rng = key
        chosen = self.choose(index, rng)
        ids = [self.ids[i] for i in chosen]
        said = [emoji.caption(ids, group[rng.integers(len(group))]) for group in (self.languages, self.others)]
        a, b = (said[i] for i in rng.permutation(2))
        return a, b, concept_id(chosen)


def concept_id(chosen):
    """One int64 for a list of concept numbers, equal for equal lists."""
    return functools.reduce(lambda number, i: number * 1000 + i + 1, chosen, 0)


# ------------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------------

class Sentences(NamedTuple):
    token_ids: torch.Tensor             # (T,) int64
    starts: torch.Tensor                # (B+1,) int32


class Masked(NamedTuple):
    token_ids: torch.Tensor             # (T,) int64, the starts are those of the unmasked sentences
    positions: torch.Tensor             # (M,) int64, masked rows of the packed matrix, ascending
    labels: torch.Tensor                # (M,) int64, the true ids of these tokens


def pack(sentences):
    """Lists of ids -> Sentences."""
    starts = np.cumsum([0] + [len(s) for s in sentences])
    return Sentences(torch.tensor([w for s in sentences for w in s]), torch.tensor(starts, dtype=torch.int32))


class Batches(torch.utils.data.Dataset):
    """Item s is this process's part of step s: one image-text batch and one parallel batch (None without a stream)."""

    def __init__(self, tokenizer, images, parallel, batch, text_batch, seed, rank=0, world=1, longest=LONGEST,
                 mask_probability=0.4):
        self.tokenizer, self.images, self.parallel, self.seed, self.rank = tokenizer, images, parallel, seed, rank
        self.records = [len(images or ()), len(parallel or ())]
        self.sizes, self.world, self.longest, self.mask_probability = (
            (batch, text_batch), world, longest, mask_probability)

    def examples(self, step, stream, bad_records):
        """Examples of this process: [record..., rng] by position p = step * N + rank * B + i. Sixteen at a time: what
        their source leaves to finish (decoded images) is faster done together."""
        source, N = (self.images, self.parallel)[stream], self.sizes[stream]
        B, n = N // self.world, len(source)
        locate = getattr(source, "locate", lambda position: (position, 0, n))
        first = step * N + self.rank * B
        for start in range(first, first + B, 16):
            keys = [self.key(stream, *locate(p)) for p in range(start, min(start + 16, first + B))]
            rngs = [generator(self.seed, *key) for key in keys]              # together: dearer between two images
            some = [self.read_or_replace(source, key, rng, bad_records) for key, rng in zip(keys, rngs)]
            yield from source.finish(some) if hasattr(source, "finish") else some

    def key(self, stream, position, first, n):
        """-> (stream, epoch, index) of a position in the stream of n records that begin at index `first`."""
        epoch, index = example_at(position, n, self.seed, stream)
        return stream, epoch, first + index

    def read_or_replace(self, source, key, rng, bad_records):
        """The record of key (stream, epoch, index), in place of a bad one the next good one: B never changes.
        bad_records receives "" for a good one, the reason for a bad one."""
        for index in range(key[2], key[2] + TOLERATED + 1):
            try:
                record = source[index % len(source), rng]
                break
            except BadRecord as error:
                bad_records.append(str(error))
                rng = generator(self.seed, *key)
        else:
            record = source.blank                                            # the run stops before it learns this
        bad_records.append("")
        return *record, rng

    def mask(self, sentences, rngs):
        """[ids] -> Masked."""
        token_ids, positions, labels, start = [], [], [], 0
        for ids, rng in zip(sentences, rngs):
            masked_ids, masked = mask_tokens(ids, rng, self.tokenizer, self.mask_probability)
            token_ids += masked_ids
            positions += [start + i for i in masked]
            labels += [ids[i] for i in masked]
            start += len(ids)
        return Masked(*(torch.tensor(x, dtype=torch.int64) for x in (token_ids, positions, labels)))

    def __getitem__(self, step):
        """-> [image-text batch or None, parallel batch or None, stats]: the stats are for the log, not for the model."""
        batches = []
        stats = {"bad_records": [], "cut": 0}
        for stream in (0, 1):
            if (self.images, self.parallel)[stream] is None:
                batches.append(None)
                continue
            a, b, ids, rngs = zip(*self.examples(step, stream, stats["bad_records"]))
            b = self.encode(b, stats)
            first = {"images": torch.from_numpy(np.stack(a))} if stream == 0 else {"a": pack(self.encode(a, stats))}
            batches.append(first | {"b": pack(b), "masked": self.mask(b, rngs), "ids": torch.tensor(ids)})
        return [*batches, stats]

    def encode(self, texts, stats):
        ids = [self.tokenizer.encode(text, None) for text in texts]
        stats["cut"] += sum(len(x) > self.longest for x in ids)
        return [x if len(x) <= self.longest else x[:self.longest - 1] + [EOS] for x in ids]


# ------------------------------------------------------------------------------------------------------------------
# What train.py asks for
# ------------------------------------------------------------------------------------------------------------------

def load_tokenizer(path):
    if not path:
        raise ValueError("your own data need --tokenizer FILE: XLM-R's sentencepiece.bpe.model, or one made by "
                         "`python data.py tokenizer --texts FILES --out spm.model`")
    try:
        return Tokenizer(pathlib.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer ({reason(error)}): take XLM-R's sentencepiece.bpe.model, or make "
                         f"one with python data.py tokenizer") from None


def streams(args, size):
    """Settings of train.py -> images with captions, and parallel text or None."""
    images = parallel = None
    if args.images in (None, ["demo"]):
        images = DemoImages(scenes=args.scenes, keywords=args.keywords, size=size)
    else:
        images = Images(args.images, size, args.languages, args.cache, args.image_root)
    if args.parallel_text and (args.texts == ["demo"] or not args.images):
        parallel = DemoParallel(scenes=args.text_scenes)
    elif args.parallel_text and args.texts:
        parallel = Pairs(args.texts, args.languages, args.cache)
    return images, parallel


# ------------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------------

def tokenizer_command(args):
    try:
        made = train_tokenizer(doctor.every_text(args.texts, args.cache), args.vocab)
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {args.vocab} pieces comes from these texts ({reason(error)})") from None
    pathlib.Path(args.out).write_bytes(made.model)
    print(f"wrote {args.out}: vocabulary {made.size:,}" + (
        f", as these texts hold no {args.vocab:,} pieces" if made.size < args.vocab else ""))
    return 0


def doctor_command(args):
    encode = args.tokenizer and functools.partial(load_tokenizer(args.tokenizer).encode, longest=None)
    return doctor.doctor(args.paths, encode, LONGEST, args.cache, args.image_root)


def main(argv=None):
    """The command line -> exit status: 0, 1 when something is broken, 2 after one line on a mistake."""
    words = sys.argv[1:] if argv is None else argv
    training = words[:1] == ["tokenizer"]
    parser = Arguments(prog="data.py" + " tokenizer" * training, description=doctor.__doc__,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    if training:
        parser.add_argument("--texts", nargs="+", required=True, help="sources of any kind")
        parser.add_argument("--vocab", type=int, default=8000, help="pieces (default: 8000)")
        parser.add_argument("--out", default="spm.model", help="file (default: spm.model)")
    else:
        parser.add_argument("paths", nargs="+", metavar="PATH", help="sources")
        parser.add_argument("--tokenizer", help="sentencepiece model, to count tokens (default: None)")
        parser.add_argument("--image_root", help="folder of images named by JSON lines (default: that of the file)")
    parser.add_argument("--cache", help="folder for the indices (default: beside the data)")
    args = parser.parse_args(words[training:])
    try:
        return (tokenizer_command if training else doctor_command)(args)
    except (ValueError, OSError) as error:
        return fail(error)


def show_example():
    """One example of each stream of the demo, in words."""
    tokenizer = demo_tokenizer()
    image, pair, _ = Batches(tokenizer, DemoImages(), DemoParallel(), 2, 2, seed=0)[0]
    print("images    ", tuple(image["images"].shape))
    for name, x in (("caption", image["b"]), ("masked", image["masked"]), ("a", pair["a"]), ("b", pair["b"])):
        print(f"{name:10}", " ".join(tokenizer.pieces(x.token_ids)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                        # a name or caption in any bytes
    sys.exit(main() if sys.argv[1:] else show_example())
