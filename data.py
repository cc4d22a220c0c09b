"""From records to batches: tokenizer, masking, the order of examples, the two streams.

    image-text       {"images" (B, 3, s, s) uint8, "b": Sentences, "masked": Masked, "ids" (B,)}
    parallel text    {"a": Sentences, "b": Sentences, "masked": Masked, "ids" (B,)}

Sentences are packed: sentence i is token_ids[starts[i]:starts[i+1]]. Masked is b with some tokens
masked. Example i of process r in step s has the position s * N + r * B + i in an endless sequence,
and everything about it (record, language, role, augmentation, masking) is a function of seed and
position. So the data are the same at any number of processes and workers and after a resume: there
is no state to save.

Letters: B examples per process, W processes, N = W*B, T tokens, M masked tokens, s pixels a side.

    python data.py                   one example of each stream of the demo, in words
    python data.py PATH ...          the data doctor: what these files hold and what is wrong
    python data.py tokenizer ...     makes a tokenizer from texts
"""
import argparse
import bisect
import contextlib
import functools
import io
import itertools
import math
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

from demo.datasets import DemoImages, DemoParallel, training_texts
from formats import doctor
from formats.records import BadRecord, reason
from formats.sources import TOLERATED, WINDOW, ImageFiles, PairFiles, by_picture, parse_all

BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3             # XLM-R's ids; docs/paper.md, "Text encoder"


def fail(error):
    """Prints in one line what was wrong -> exit status 2."""
    if isinstance(error, BrokenPipeError):      # nobody reads what is printed: see run
        raise error
    text = str(error).strip()
    if "\nOriginal Traceback" in text:          # the error of a DataLoader worker: its last line
        text = text.splitlines()[-1].removeprefix("ValueError: ")
    print("error:", *text.split(), file=sys.stderr)
    return 2


def run(main):
    """Ends the program with the exit status of main(). What the terminal's encoding lacks is
    printed escaped; a closed pipe (| head) and Ctrl-C end it quietly, as they do in a shell."""
    sys.stdout.reconfigure(errors="backslashreplace")           # captions and names in any script
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # Python writes what is left at its end, and must not meet the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def check_target(file):
    """ValueError before the work, not after it, when write_output cannot write a file."""
    beside = file and (file.is_file() or not file.exists())
    if file and (file.is_dir() or not os.access(file.parent if beside else file, os.W_OK)):
        raise ValueError(f"{file} cannot be written")


def write_output(file, raw):
    """Bytes are written beside `file` and renamed: what was there stays until all is written."""
    if file.exists() and not file.is_file():                    # /dev/stdout, a named pipe
        file.write_bytes(raw)
        return
    beside = file.resolve().with_name(f"{file.name}.tmp")
    try:
        beside.write_bytes(raw)
        beside.replace(file.resolve())
    finally:
        beside.unlink(missing_ok=True)                          # there when something failed


# --------------------------------------------------------------------------------------------------
# Tokenizer and masking
# --------------------------------------------------------------------------------------------------

class Tokenizer:
    """sentencepiece with XLM-R's ids: the four above, piece p -> p + 1, <mask> last."""

    def __init__(self, model):
        """model: the bytes of a sentencepiece model (XLM-R's own sentencepiece.bpe.model works)."""
        if not model:
            raise ValueError("no tokenizer: its sentencepiece.bpe.model must lie beside the "
                             "weights when they are imported")
        self.model = model
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"this is not a sentencepiece model ({error})") from None
        self.size = len(self.processor) + 2     # V: sentencepiece has no <pad> and no <mask>
        self.mask = self.size - 1
        self.unknown = self.processor.unk_id()
        # Piece 1 would become id 2, which is </s>: so the first three pieces must not be words.
        for piece in range(min(3, len(self.processor))):
            if piece != self.unknown and not self.processor.is_control(piece):
                word = self.processor.id_to_piece(piece)
                raise ValueError(f"its piece {piece} is {word!r}, not <unk>, <s> or </s>")

    def encode(self, text, longest=None):
        """-> ids with <s> and </s>, cut to `longest` (None: not at all)."""
        ids = self.ids(self.processor.encode(text))
        return cut(ids, longest) if longest else ids

    def ids(self, pieces):
        """sentencepiece's numbers -> ids with <s> and </s>."""
        return [BOS] + [UNKNOWN if p == self.unknown else p + 1 for p in pieces] + [EOS]

    @functools.cached_property
    def log_probabilities(self):
        """Of each piece. A unigram model adds up those of a text's pieces."""
        return [self.processor.get_score(piece) for piece in range(len(self.processor))]

    def sample(self, text, rng):
        """-> ids as encode's, but one of the 16 best segmentations of the text, drawn with
        probability proportional to p(segmentation) ** 0.2: subword regularization (Kudo 2018,
        "Subword Regularization: Improving Neural Network Translation Models with Multiple Subword
        Candidates", section 3.3). ValueError when it is no unigram model."""
        try:
            best = self.processor.NBestEncode(text, nbest_size=16)
        except RuntimeError:
            raise ValueError("--subword_sampling needs a unigram tokenizer, and this one is not: "
                             "--subword_sampling 0") from None
        logs = [sum(map(self.log_probabilities.__getitem__, pieces)) for pieces in best]
        sums = list(itertools.accumulate(math.exp(0.2 * (log - logs[0])) for log in logs))
        return self.ids(best[bisect.bisect_left(sums, rng.random() * sums[-1])])

    def pieces(self, ids):
        """The pieces of some ids, for people to read."""
        special = {BOS: "<s>", PAD: "<pad>", EOS: "</s>", UNKNOWN: "<unk>", self.mask: "<mask>"}
        return [special[i] if i in special else self.processor.id_to_piece(i - 1)
                for i in map(int, ids)]


def cut(ids, longest):
    """At most `longest` ids, the last one still </s>."""
    return ids if len(ids) <= longest else ids[:longest - 1] + [EOS]


def train_tokenizer(texts, vocabulary):
    """A unigram model with byte fallback over an iterable of sentences -> Tokenizer."""
    out = io.BytesIO()
    # sentencepiece leaves out sentences of more than 4,192 bytes. 1,000 characters have at most
    # 4,000, and training reads about 64 tokens of a sentence.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text[:1000] for text in texts), model_writer=out,
        vocab_size=vocabulary, model_type="unigram", byte_fallback=True,
        character_coverage=0.9999, num_threads=1, minloglevel=2, hard_vocab_limit=False)
    return Tokenizer(out.getvalue())


@functools.cache
def demo_tokenizer(vocabulary=8000):
    return train_tokenizer(training_texts(), vocabulary)


def mask_tokens(ids, rng, tokenizer, probability=0.4, most=20):
    """ids (a list) -> (masked ids, masked positions in ascending order).

    The paper's: min(most, max(1, round(n * probability))) positions in spans of one, or with
    probability 0.2 of two or three tokens. Each becomes <mask> (80 %), a random token (10 %) or
    stays (10 %). We differ in one point: <s> and </s> are never masked (docs/paper.md)."""
    candidates = [i for i, token in enumerate(ids) if token > UNKNOWN]
    count = min(most, max(1, round(len(ids) * probability)), len(candidates))

    # Spans begin at candidates in random order, until enough positions are chosen.
    allowed, chosen = set(candidates), set()
    for start in rng.permutation(candidates):
        if len(chosen) >= count:
            break
        length = int(rng.integers(2, 4)) if rng.random() < 0.2 else 1
        chosen.update(allowed.intersection(range(int(start), int(start) + length)))

    # The last span may have chosen one or two too many: some are left out at random.
    positions = sorted(rng.permutation(sorted(chosen))[:count].tolist())

    masked = list(ids)
    for i in positions:
        draw = rng.random()
        if draw < 0.8:
            masked[i] = tokenizer.mask
        elif draw < 0.9:
            masked[i] = int(rng.integers(UNKNOWN + 1, tokenizer.mask))
    return masked, positions


# --------------------------------------------------------------------------------------------------
# Order
# --------------------------------------------------------------------------------------------------

GOLDEN = 0x9E3779B1                             # a prime near 2^32 / golden ratio (Knuth's hash)
MURMUR = 0x85EBCA6B                             # a multiplier of MurmurHash3's last step
BITS_32 = 0xFFFFFFFF                            # keeps the lower 32 bits of a number


def generator(*key):
    """The random generator of (seed, stream, epoch, index): the same numbers whoever asks."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


def scramble(number):
    """A hash of a number to 32 bits: every bit of the input changes about half of the output's."""
    number = (number * GOLDEN) & BITS_32
    number ^= number >> 15
    number = (number * MURMUR) & BITS_32
    return number ^ (number >> 13)


def shuffled(index, n, *key):
    """Where `index` goes in the permutation of 0..n-1 that belongs to `key`, without a list of n
    numbers: a Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom permutations
    from pseudorandom functions") with cycle-walking (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains")."""
    # The network permutes numbers of 2 * half bits: the fewest that hold n - 1.
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low_bits = (1 << half) - 1
    round_keys = np.random.SeedSequence(key).generate_state(4).tolist()
    while True:
        # One round: (left, right) -> (right, left xor f(right)). It can be undone whatever f is, as
        # right is still there: no two numbers become one. Four rounds are what Luby and Rackoff
        # need for a permutation that looks random in both directions.
        left, right = index >> half, index & low_bits
        for round_key in round_keys:
            left, right = right, left ^ (scramble(right + round_key) & low_bits)
        index = (left << half) | right

        # There are up to 4 n such numbers. One outside 0..n-1 is permuted again until it falls
        # inside: this follows a cycle of the permutation that began inside, so it ends, and two
        # indices never end at one place.
        if index < n:
            return index


def example_at(position, n, seed, stream):
    """(epoch, index) of a position in the endless sequence over n records: every index once per
    epoch, and a batch may hold the end of one epoch and the beginning of the next."""
    epoch = position // n
    return epoch, shuffled(position % n, n, seed, stream, epoch)


class Mixture:
    """Several datasets as one, each with its share of every batch and with its own epochs."""

    def __init__(self, datasets, weights):
        self.datasets = datasets
        self.starts = np.cumsum([0] + [len(dataset) for dataset in datasets]).tolist()

        # The order of the datasets repeats after about 1,000 positions. Dataset k has counts[k] of
        # them, evenly spaced: number i stands at (i + 1/2) / counts[k] of the cycle.
        self.counts = [max(1, round(1000 * weight / sum(weights))) for weight in weights]
        slots = [((i + 0.5) / count, k, i) for k, count in enumerate(self.counts)
                 for i in range(count)]
        self.cycle = [(k, i) for _, k, i in sorted(slots)]

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, key):
        index, rng = key
        k = bisect.bisect_right(self.starts, index) - 1
        return self.datasets[k][index - self.starts[k], rng]

    def languages(self):
        return sorted({k for dataset in self.datasets for k in dataset.languages()})

    def locate(self, position):
        """A position -> (position in the endless sequence of one dataset, its first index, its
        number of records)."""
        cycles, slot = divmod(position, len(self.cycle))
        k, i = self.cycle[slot]
        return cycles * self.counts[k] + i, self.starts[k], len(self.datasets[k])


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------

class Sentences(NamedTuple):
    token_ids: torch.Tensor                     # (T,) int64
    starts: torch.Tensor                        # (B+1,) int32


class Masked(NamedTuple):
    token_ids: torch.Tensor                     # (T,) int64; starts as those of the whole sentences
    positions: torch.Tensor                     # (M,) int64, masked rows of (T,), ascending
    labels: torch.Tensor                        # (M,) int64, the true ids of these tokens


class Stream(NamedTuple):
    """One stream of training. dataset: anything with len() and [index, rng] -> (image uint8
    (3, s, s) or sentence a, sentence b, int64 id); it may raise BadRecord."""
    dataset: object
    batch: int                                  # N: examples a step, of all processes together
    longest: int = 64                           # tokens of a sentence with <s> and </s>
    mask_probability: float = 0.4
    most_masked: int = 20                       # tokens of a sentence
    max_bad: float = TOLERATED                  # share of bad records that stops no run
    joined: bool = False                        # "<s> a </s> b </s>" is masked (translation LM)
    subword_sampling: float = 0.0               # share of sentences with Tokenizer.sample's pieces


def pack(sentences):
    """Lists of ids -> Sentences."""
    starts = np.cumsum([0] + [len(ids) for ids in sentences])
    token_ids = [token for ids in sentences for token in ids]
    return Sentences(torch.tensor(token_ids), torch.tensor(starts, dtype=torch.int32))


def mask_sentences(sentences, rngs, tokenizer, stream):
    """Lists of ids -> Masked."""
    token_ids, positions, labels = [], [], []
    for ids, rng in zip(sentences, rngs):
        masked_ids, masked = mask_tokens(ids, rng, tokenizer, stream.mask_probability,
                                         stream.most_masked)
        positions += [len(token_ids) + i for i in masked]       # rows of the packed matrix
        labels += [ids[i] for i in masked]
        token_ids += masked_ids
    return Masked(*(torch.tensor(x, dtype=torch.int64) for x in (token_ids, positions, labels)))


class Batches(torch.utils.data.Dataset):
    """Item s is this process's part of step s: one batch of each stream."""

    def __init__(self, tokenizer, image_stream, text_stream, seed, rank=0, world=1):
        """image_stream, text_stream: a Stream or None."""
        self.tokenizer, self.seed, self.rank, self.world = tokenizer, seed, rank, world
        self.streams = [image_stream, text_stream]
        self.last_good = [None, None]           # of each stream; see read_or_replace

    def __getitem__(self, step):
        """-> [image-text batch or None, parallel batch or None, stats for the log]. stats:
        {"bad_records": ["" for a good record, why a bad one is bad], "cut": sentences cut}."""
        stats = {"bad_records": [], "cut": 0}
        batches = [stream and self.batch(step, number, stats)
                   for number, stream in enumerate(self.streams)]
        return [*batches, stats]

    def records(self):
        """How many records each stream has."""
        return [len(stream.dataset) if stream else 0 for stream in self.streams]

    def batch(self, step, number, stats):
        """This process's part of one stream in one step. number: 0 images, 1 parallel text."""
        stream = self.streams[number]
        B = stream.batch // self.world
        first = step * stream.batch + self.rank * B
        keys = [self.key(number, position) for position in range(first, first + B)]
        examples = [self.read_or_replace(key, stats["bad_records"]) for key in keys]
        a, b, ids, rngs = zip(*examples)
        if number == 0:
            view_a = {"images": torch.from_numpy(np.stack(a))}                  # (B, 3, s, s)
        else:
            a = self.encode(a, rngs, stream, stats)
            view_a = {"a": pack(a)}
        b = self.encode(b, rngs, stream, stats)
        batch = view_a | {"b": pack(b), "ids": torch.tensor(ids)}               # (B,)
        if stream.joined:
            b = [x + y[1:] for x, y in zip(a, b)]
            batch["joined"] = pack(b)
        return batch | {"masked": mask_sentences(b, rngs, self.tokenizer, stream)}

    def key(self, number, position):
        """-> (stream number, epoch, index) of the example at a position of a stream."""
        dataset = self.streams[number].dataset
        first, n = 0, len(dataset)
        if isinstance(dataset, Mixture):
            position, first, n = dataset.locate(position)
        epoch, index = example_at(position, n, self.seed, number)
        return number, epoch, first + index

    def read_or_replace(self, key, bad_records):
        """-> (a, b, id, the example's generator). The next good record replaces a bad one: B never
        changes. After as many bad ones as stop a run (BadRecords) the last good one is repeated:
        the run stops before it trains on this batch."""
        number, _, index = key
        dataset = self.streams[number].dataset
        most = round(self.streams[number].max_bad * WINDOW) + 1
        for i in range(index, index + most):
            rng = generator(self.seed, *key)
            try:
                record = dataset[i % len(dataset), rng]
            except BadRecord as error:
                bad_records.append(str(error))
                continue
            bad_records.append("")
            self.last_good[number] = record
            return *record, rng
        if self.last_good[number] is None:
            raise ValueError(f"the first {most} records were bad, the last: {bad_records[-1]}; "
                             f"`python data.py FILES --list OUT` names them all")
        return *self.last_good[number], rng

    def encode(self, texts, rngs, stream, stats):
        """Sentences -> lists of ids; what is cut is counted."""
        share = stream.subword_sampling
        whole = [self.tokenizer.sample(text, rng) if share and rng.random() >= 1 - share
                 else self.tokenizer.encode(text) for text, rng in zip(texts, rngs)]
        stats["cut"] += sum(len(ids) > stream.longest for ids in whole)
        return [cut(ids, stream.longest) for ids in whole]


# --------------------------------------------------------------------------------------------------
# What train.py asks for, and the commands
# --------------------------------------------------------------------------------------------------

def load_tokenizer(path):
    advice = "XLM-R's sentencepiece.bpe.model, or one made by python data.py tokenizer"
    if not path:
        raise ValueError(f"your own data need --tokenizer FILE: {advice}")
    try:
        return Tokenizer(pathlib.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer ({reason(error)}): take {advice}") from None


def files(kind, arguments, *options):
    """ImageFiles or PairFiles of some arguments; where these have weights, a Mixture of them."""
    sources = parse_all(arguments)
    weights = [source.weight for source in sources if source.weight]
    if not weights:
        return kind(sources, *options)
    if len(weights) < len(sources):
        raise ValueError("give every source a weight (FILE=0.7) or none")
    return Mixture([kind([source], *options) for source in sources], weights)


class HeldOut:
    """A dataset of one's own images without the pictures of every k-th record; on those, the run
    validates."""

    def __init__(self, dataset, count):
        """count: about so many are held out."""
        if isinstance(dataset, Mixture):
            raise ValueError("--held_out does not go with weighted sources: give no weights")
        if len(dataset) < 2:
            raise ValueError("--held_out needs at least two images, one of them to train on")
        self.dataset = dataset
        self.k = max(2, len(dataset) // count)
        self.held = range(self.k - 1, len(dataset), self.k)
        self.pictures = {dataset.picture(index) for index in self.held} - {None}
        if all(dataset.picture(index) in self.pictures for index in range(len(dataset))):
            raise ValueError("--held_out leaves no picture to train on: give a smaller number")

    def __len__(self):
        return len(self.dataset) - len(self.dataset) // self.k

    def __getitem__(self, key):
        index, rng = key
        index += index // (self.k - 1)                              # one is left out after k - 1
        # A held-out picture may have more captions, in other records: the next record takes their
        # place.
        n = len(self.dataset)
        while self.dataset.picture(index % n) in self.pictures:
            index += 1
        return self.dataset[index % n, rng]

    def languages(self):
        return self.dataset.languages()

    def rows(self):
        """The records that are held out, as evaluate.retrieval wants them. Bad ones are no rows."""
        rows = []
        for index in self.held:
            with contextlib.suppress(BadRecord):
                rows.append(self.dataset.row(index))
        return by_picture(rows)


def streams(args, size):
    """Settings of train.py -> (dataset of images, dataset of parallel text or None)."""
    demo = args.images in (None, ["demo"])
    if demo:
        images = DemoImages(scenes=args.scenes, keywords=args.keywords, size=size)
    else:
        images = files(ImageFiles, args.images, size, args.languages, args.cache,
                       args.image_root)
    texts = None                                # also where --no-parallel_text is given
    # The demo's images bring the demo's parallel text, unless there are texts of one's own.
    if args.parallel_text and (args.texts == ["demo"] or demo and not args.texts):
        texts = DemoParallel(scenes=args.text_scenes)
    elif args.parallel_text and args.texts:
        texts = files(PairFiles, args.texts, args.languages, args.cache)
    if args.languages:
        check_languages(args.languages, [dataset for dataset in (images, texts) if dataset])
    return images, texts


def check_languages(languages, datasets):
    """ValueError where --languages names one that is nowhere, or the data are the demo's."""
    if all(isinstance(dataset, DemoImages) for dataset in datasets):
        raise ValueError("--languages chooses among those of your own files: give some, or leave "
                         "it out")
    missing = set(languages).difference(*(dataset.languages() for dataset in datasets))
    if missing:
        raise ValueError(f"--languages: no record is in {' '.join(sorted(missing))}; `python "
                         f"data.py FILES` names the languages that there are")


def arguments_parser(name):
    parser = argparse.ArgumentParser(name, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description=doctor.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="folder for the indices (default: beside the data)")
    return parser


def tokenizer_command(words):
    """`python data.py tokenizer`: makes one from the texts of some files -> exit status."""
    parser = arguments_parser("data.py tokenizer")
    parser.add_argument("--texts", nargs="+", required=True, help="sources of any kind")
    parser.add_argument("--vocab", type=int, default=8000, help="pieces (default: 8000)")
    parser.add_argument("--out", default="spm.model", help="file (default: spm.model)")
    args = parser.parse_args(words)
    check_target(pathlib.Path(args.out))
    samples = {}                                # of each language its first 100 texts

    def texts():
        for language, text in doctor.every_text(args.texts, args.cache):
            some = samples.setdefault(language, [])
            if len(some) < 100:
                some.append(text)
            yield text
    try:
        made = train_tokenizer(texts(), args.vocab)
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {args.vocab} pieces comes from these texts "
                         f"({reason(error)})") from None
    write_output(pathlib.Path(args.out), made.model)
    print(f"wrote {args.out}: vocabulary {made.size:,}")
    if made.size < args.vocab:
        print(f"these texts hold no {args.vocab:,} pieces")

    # A letter that is too rare for a piece is written in bytes. Do whole languages suffer from it?
    for language, some in sorted(samples.items()):
        pieces = [piece for ids in made.processor.encode(some) for piece in ids]
        share = sum(map(made.processor.is_byte, pieces)) / max(1, len(pieces))
        if share > 0.5:
            print(f"{language}: {share:.0%} of its tokens are single bytes; give more texts in "
                  f"{language}, or a larger --vocab")
    return 0


def doctor_command(words):
    """`python data.py PATH...` -> exit status: 1 if a record is broken."""
    parser = arguments_parser("data.py")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="sources")
    parser.add_argument("--tokenizer", help="sentencepiece model, to count tokens (default: None)")
    parser.add_argument("--longest", type=int, default=64,
                        help="tokens of a sentence that training reads (default: 64)")
    parser.add_argument("--image_root", help="folder of the images that JSON lines name")
    parser.add_argument("--list", metavar="FILE", help="new file: every broken record, one a line")
    args = parser.parse_args(words)
    encode = load_tokenizer(args.tokenizer).encode if args.tokenizer else None
    options = args.longest, args.cache, args.image_root
    if not args.list:
        return doctor.doctor(args.paths, encode, *options)
    # Never over a file of data. A name that is not UTF-8 is escaped.
    with open(args.list, "x", encoding="utf-8", errors="backslashreplace") as listing:
        return doctor.doctor(args.paths, encode, *options, listing)


def main(argv=None):
    """The command line -> exit status: 0, 1 for broken records, 2 after one line on a mistake."""
    words = sys.argv[1:] if argv is None else argv
    try:
        tokenizer = words[:1] == ["tokenizer"]
        return tokenizer_command(words[1:]) if tokenizer else doctor_command(words)
    except (ValueError, OSError) as error:
        return fail(error)


def show_example():
    """One example of each stream of the demo, in words."""
    tokenizer = demo_tokenizer()
    batches = Batches(tokenizer, Stream(DemoImages(), 2), Stream(DemoParallel(), 2), seed=0)
    image, pair, _ = batches[0]
    print("images    ", tuple(image["images"].shape))
    shown = {"caption": image["b"], "masked": image["masked"], "a": pair["a"], "b": pair["b"]}
    for name, sentences in shown.items():
        print(f"{name:10}", " ".join(tokenizer.pieces(sentences.token_ids)))


if __name__ == "__main__":
    run(main if sys.argv[1:] else show_example)
