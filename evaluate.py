"""Retrieval in many languages: which image does a caption mean, which caption describes an image?

    dual encoder   score = cosine of two vectors made apart: n + I encodings give n x I scores
    re-ranking     the fusion encoder reads a query's K best pairs again:
                   score = cosine / temperature + 1/4 log-odds of the match head
    by match       the same K by the match head alone: as published (official Retrieval.py:117)
    recall R@k     share of queries (%) with a right answer among the first k

Keys of the results: t2i text to image, i2t image to text; reranked_ and matched_ for the two other
orders; _equal where captions that read the same are equally right.

Why the sum: the match head learned to tell true pairs from false ones that were drawn by
softmax(cosine / temperature). The best log-odds for that are log(p(true) / p(drawn)), which is all
that the cosine does NOT know: they correct the cosine and do not replace it. (Theory says weight 1;
of 1/4, 1/2, 1 and 2 the weight 1/4 was best on the demo's val splits.) Ties never help: a wrong
answer that scores like the right one, or NaN, ranks before it.

Memory does not grow with images x texts: about ROWS tokens are encoded or fused, and BATCH queries
are ranked, at a time. Token states beyond STATES bytes are not kept: re-ranking makes them again.

Letters: I images, n captions of one language, U different texts, Q queries, b of them in a block, C
candidates, K of them re-ranked, R pairs of a text and an image, B sequences, T tokens, M masked
tokens, D width, E embedding, V vocabulary.

    python evaluate.py retrieval --ckpt out/ckpt.pt --data demo:test_style --json scores.json
    python evaluate.py pairs --ckpt out/ckpt.pt --data FILES      which pairs do not fit?
"""
import argparse
import collections
import contextlib
import functools
import heapq
import itertools
import json
import pathlib
import sys
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from demo import emoji
from formats.images import eval_transform, normalise
from formats.records import BadRecord
from formats.sources import ImageFiles, open_readers, parse_all, row_of
from kernels.packed import gather_sequences, offsets
from losses import MaskedText, cross_view, fuse_pairs, hard_negatives
from model import View, at_least_float32, in_autocast_type, inference_context
from tasks import TASKS
from tasks.retrieval import Retrieval
from weights import load_model

GROUPS = {"seen": "seen with images", "text_only": "only in parallel text",
          "never": "never in training"}
TASK_GROUPS = GROUPS | {"others": "all but English"}
COLUMNS = {"chance_r1": "chance", "{}_r1": "R@1", "{}_r1_equal": "equal",
           "reranked_{}_r1": "re-ranked", "matched_{}_r1": "by match", "new_{}_r1": "new names",
           "{}_r5": "R@5", "{}_r10": "R@10"}
FALSE_COLUMNS = {"false_caption_accuracy_cosine": "cosine", "false_caption_accuracy": "re-ranked",
                 "false_caption_accuracy_match": "by match"}
TEST_SETS = ("test_style", "test_concept", "test_scenes")
SENTENCE_TOKENS = 80                    # a longer caption or query is cut, <s> and </s> included
BATCH = 256                             # at most so many images or texts, and queries, at once
ROWS = 1 << 13                          # about so many tokens are encoded or fused at once
STATES = 640 << 20                      # bytes of token states that are kept
SMALL = 2000                            # images that a validation keeps, resized
LOG_ODDS_WEIGHT = 0.25                  # of the match head's log-odds in re-ranking


# --------------------------------------------------------------------------------------------------
# Read a set
# --------------------------------------------------------------------------------------------------

bar = functools.partial(tqdm, leave=False, disable=None)    # progress, where stderr is a terminal


def readable(read, items, good, bad):
    """Yields read(item), one at a time. The item goes to the list `good`; where it cannot be read,
    the reason goes to the list `bad`."""
    for item in items:
        try:
            result = read(item)
        except BadRecord as error:
            bad.append(str(error))
            continue
        good.append(item)
        yield result


def report_bad(bad, total):
    """Names what is left out, the first ten of them; ValueError where that is all of `total`."""
    if bad and len(bad) == total:
        raise ValueError(f"no image or text can be read: {bad[0]}")
    for reason in bad[:10]:
        print("left out:", reason, file=sys.stderr)
    if len(bad) > 10:
        print(f"left out: {len(bad):,} of {total:,}", file=sys.stderr)


def evaluation_set(arguments, languages=None, cache=None, root=None):
    """['demo:SPLIT'], or what train.py --images takes -> rows of {"image": RGB image or a function
    that reads it, "captions": {language: [text]}}. Bad records are named and left out."""
    if any(argument.partition(":")[0] == "demo" for argument in arguments):
        if len(arguments) > 1:
            raise ValueError("demo:SPLIT does not mix with files: give it alone")
        return emoji.split(arguments[0].removeprefix("demo").removeprefix(":"))
    dataset = ImageFiles(parse_all(arguments), None, languages, cache, root)
    bad = []
    rows = list(readable(dataset.row, bar(range(len(dataset)), "captions"), [], bad))
    report_bad(bad, len(dataset))
    return rows


def read_image(row):
    return row["image"]() if callable(row["image"]) else row["image"]


def small_rows(rows, size):
    """Rows for a validation, which comes often: the first SMALL images are read here and kept
    resized (150 KB each at 224 pixels); the others are read each time."""
    good = []
    bad = []
    images = readable(read_image, rows[:SMALL], good, bad)
    arrays = [eval_transform(image, size).transpose(1, 2, 0) for image in images]
    report_bad(bad, len(rows))
    small = [row | {"image": Image.fromarray(array)} for row, array in zip(good, arrays)]
    return small + rows[SMALL:]


# --------------------------------------------------------------------------------------------------
# Encode a set
# --------------------------------------------------------------------------------------------------

def load(path, device="cpu"):
    """A checkpoint of train.py -> (model in eval mode on device, tokenizer, its languages {"seen":
    with images, "text_only": in parallel text} or None); else ValueError."""
    model, state = load_model(path)
    languages = state["config"].get("languages")
    return model.eval().to(device), data.Tokenizer(state["tokenizer"]), languages


def join(views):
    """Concatenates Views into one packed View."""
    states = torch.cat([view.states for view in views])                      # (T, D)
    starts = offsets(torch.cat([view.starts.diff() for view in views]))      # (I+1,)
    return View(states, starts, torch.cat([view.vectors for view in views]), None)


def encoded(device, encode, *inputs):
    """One batch of an encoder -> its View. Its states are in the type of autocast: they are many,
    and the fusion encoder multiplies them in this type anyway."""
    with inference_context(device):
        view = encode(*inputs, None)
        return view._replace(states=in_autocast_type(view.states))


def image_tokens(config):
    """P: patches of an image, and one more."""
    return (config.image_size // config.patch_size) ** 2 + 1


def image_batches(model, images):
    """An iterator of Pillow images, of which each is resized before the next is read -> a View of
    every B of them."""
    B = min(BATCH, max(1, ROWS // image_tokens(model.config)))
    small = (eval_transform(image, model.config.image_size) for image in images)
    while part := list(itertools.islice(small, B)):
        pixels = torch.from_numpy(np.stack(part)).to(model.temperature.device)     # (B, 3, s, s)
        yield encoded(pixels.device, model.encode_image, normalise(pixels))


def text_batches(model, token_ids):
    """Lists of token ids -> a View of every BATCH of them."""
    device = model.temperature.device
    for first in range(0, len(token_ids), BATCH):
        packed, starts = data.pack(token_ids[first:first + BATCH])           # (T,), (B+1,)
        yield encoded(device, model.encode_text, packed.to(device), starts.to(device))


class Encoded:
    """Vectors of all of some images or texts; their token states too, where these take no more than
    STATES bytes. Else those that re-ranking asks for are made again."""

    def __init__(self, views, tokens, again):
        """views: of all, a batch at a time; tokens: at most so many have all together; again:
        numbers of some -> their Views likewise."""
        # Of a set that is too large no states are kept: the vectors alone are small, 1 KB each.
        vectors = []
        lengths = []
        states = None
        end = 0
        for view in views:
            vectors.append(view.vectors)
            lengths.append(view.starts.diff())
            if states is None:
                kept = tokens * view.states[0].nbytes <= STATES
                states = view.states.new_empty(tokens if kept else 0, view.states.shape[1])
            if kept:
                states[end:end + len(view.states)] = view.states             # (T, D)
                end += len(view.states)
        self.vectors = torch.cat(vectors) if vectors else None               # (I, E)
        self.lengths = torch.cat(lengths) if lengths else None               # (I,), in tokens
        self.view = View(states[:end], offsets(self.lengths), None, None) if end else None
        self.again = again

    def select(self, index):
        """Those of the numbers `index` (ascending) as one packed View."""
        if not self.view:
            view = join(list(self.again(index.tolist())))
        else:
            rows, starts = gather_sequences(self.view.starts, index)
            view = View(self.view.states[rows], starts, self.vectors[index], None)   # (T', D)
        return view._replace(states=at_least_float32(view.states))


def encode_images(model, rows, bad):
    """-> (rows whose image can be read, these images Encoded)."""
    good = []
    images = Encoded(image_batches(model, readable(read_image, rows, good, bad)),
                     len(rows) * image_tokens(model.config),
                     lambda index: image_batches(model, (read_image(good[i]) for i in index)))
    return good, images


def longest_text(model):
    """The most tokens of a caption or query that this model reads."""
    return min(SENTENCE_TOKENS, model.text.longest)


def encode_texts(model, tokenizer, texts):
    """n texts -> the U different ones Encoded, and each text's place among them (n,)."""
    token_ids = [tuple(tokenizer.encode(text, longest_text(model))) for text in texts]
    # Like lengths in a batch, and the longest first: later batches fit into the memory of earlier
    # ones. (Shortest first, each would need a little more than was freed.)
    different = sorted(set(token_ids), key=lambda ids: (-len(ids), ids))
    place = {ids: i for i, ids in enumerate(different)}
    encoded = Encoded(text_batches(model, different), sum(map(len, different)),
                      lambda index: text_batches(model, [different[i] for i in index]))
    return encoded, torch.tensor([place[ids] for ids in token_ids], device=encoded.vectors.device)


class Captions(NamedTuple):
    """The captions of one language, image after image, and one false caption of each image. An
    image without a caption is no candidate."""
    texts: Encoded                      # the U different captions and false captions
    place: torch.Tensor                 # (n,) where each caption is among them
    label: torch.Tensor                 # (n,) equal for captions that read the same
    false_place: torch.Tensor           # (I,) where each false caption is; (0,) in a set without
    owner: torch.Tensor                 # (n,) the image that each caption describes, ascending
    images: torch.Tensor                # (I,) each image's number in the whole set
    vectors: torch.Tensor               # (I, E) the images' vectors


def encode_captions(model, tokenizer, rows, images, language):
    """rows and their images Encoded -> Captions."""
    numbers = [i for i, row in enumerate(rows) if row["captions"].get(language)]
    texts, owner, false = [], [], []
    for image, row in enumerate(rows[i] for i in numbers):
        texts += row["captions"][language]
        owner += [image] * len(row["captions"][language])
        if "false_captions" in row:
            false.append(row["false_captions"][language])
    encoded, place = encode_texts(model, tokenizer, texts + false)
    last = {text: i for i, text in enumerate(texts)}
    label = torch.tensor([last[text] for text in texts], device=place.device)               # (n,)
    owner = torch.tensor(owner, device=place.device)                         # (n,)
    numbers = torch.tensor(numbers, device=place.device)                     # (I,)
    return Captions(encoded, place[:len(texts)], label, place[len(texts):], owner, numbers,
                    images.vectors[numbers])


# --------------------------------------------------------------------------------------------------
# Rank and re-rank
# --------------------------------------------------------------------------------------------------

def percent(x):
    return 100 * x.double().mean().item()


def ranks(scores, right):
    """scores, right (queries, candidates) -> (queries,): how many wrong candidates are not below
    the best right one. "Not below" counts ties, and NaN, which is below nothing."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)      # (queries, 1)
    return (~(scores < best) & ~right).sum(1)                                # (queries,)


def right_answers(queries, known, candidates):
    """Which candidates does each query of a block belong to? By labels: queries (b,), candidates
    (C,), and known (2, n), a query's label above that of a candidate -> (b, C) bool."""
    # A label of the block has a row: that of the last query which has it.
    row = known.new_full((int(known[0].max()) + 1,), -1)                     # (labels of queries,)
    row[queries] = torch.arange(len(queries), device=row.device)
    row_of_pair = row[known[0]]                                              # (n,), -1: not asked
    asked = row_of_pair >= 0
    shape = len(queries), int(known[1].max()) + 1
    table = torch.zeros(shape, dtype=torch.bool, device=row.device)          # (b, of candidates)
    table[row_of_pair[asked], known[1, asked]] = True
    return table[row[queries]][:, candidates]                                # (b, C)


def rank_all(captions, direction, K):
    """Ranks every query's candidates by cosine, BATCH queries at a time -> {"rank": (Q,), "right":
    (Q, K) of the K best, both also with _equal, "best": their numbers, "cosine": (Q, K)}. With
    _equal, captions that read the same are right for the images of all of them."""
    texts = captions.texts.vectors
    image = torch.arange(len(captions.images), device=texts.device)          # (I,)
    caption = torch.arange(len(captions.place), device=texts.device)         # (n,)
    queries = caption if direction == "t2i" else image
    parts = []
    for block in queries.split(BATCH):
        if direction == "t2i":
            cosine = texts[captions.place[block]] @ captions.vectors.T       # (b, I)
        else:                           # equal texts are multiplied once, so that they tie
            cosine = texts @ captions.vectors[block].T                       # (U, b)
            cosine = cosine[captions.place].T                                # (U, b) -> (b, n)
        best = cosine.topk(min(K, cosine.shape[1]), dim=1)                   # (b, K)
        part = {"best": best.indices, "cosine": best.values}
        # A caption's label is its number, or one that it shares with those that read the same.
        for suffix, label in (("", caption), ("_equal", captions.label)):
            known = torch.stack([label, captions.owner])                     # (2, n)
            if direction == "t2i":
                right = right_answers(label[block], known, image)            # (b, I)
            else:
                right = right_answers(block, known.flip(0), label)           # (b, n)
            part[f"rank{suffix}"] = ranks(cosine, right)
            part[f"right{suffix}"] = right.gather(1, best.indices)           # (b, K)
        parts.append(part)
    # Of the blocks' matrices only these columns are left.
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def recalls(direction, found):
    """found: rank_all's, perhaps with re-ranked scores (Q, K) -> {key of results.json: %}, for
    example "reranked_i2t_r5_equal"."""
    result = {}
    for suffix in ("", "_equal"):
        orders = {"": found[f"rank{suffix}"]}
        right = found[f"right{suffix}"]
        for prefix in ("reranked_", "matched_"):
            if prefix in found:
                # Not found at all: no right answer is among the candidates, or its score is NaN.
                lost = ~(right & (found[prefix] > -torch.inf)).any(1)        # (Q,)
                orders[prefix] = ranks(found[prefix], right).masked_fill(lost, sys.maxsize)
        for prefix, rank in orders.items():
            for k in (1, 5, 10):
                result[f"{prefix}{direction}_r{k}{suffix}"] = percent(rank < k)
    return result


def mean_recalls(result):
    """The mean of R@1, R@5 and R@10 of both directions, of each order: what the paper reports for
    Multi30K and COCO -> {"matched_mean_recall": %, ...}"""
    prefixes = [key.removesuffix("t2i_r1") for key in result if key.endswith("t2i_r1")]
    keys = [f"{direction}_r{k}" for direction in ("t2i", "i2t") for k in (1, 5, 10)]
    return {f"{prefix}mean_recall": fmean(result[prefix + key] for key in keys)
            for prefix in prefixes}


def new_names(rows, language, trained):
    """Which captions does no other training language share, in any case? -> list of n bool."""
    new = []
    for row in rows:
        texts = [row["captions"].get(other, []) for other in trained if other != language]
        others = {text.casefold() for text in itertools.chain(*texts)}
        new += [text.casefold() not in others for text in row["captions"].get(language, [])]
    return new


def match_logits(model, texts, images, text, image):
    """R pairs by number, text (R,) and image (R,), of what is Encoded -> (R, 2): the match head's
    "no" and "yes"."""
    # Equal pairs are read once. So their scores agree to the last bit, and they tie. In the order
    # of images: a batch has few different ones, and projects each of them once.
    U = len(texts.vectors)
    pairs, inverse = (image * U + text).unique(return_inverse=True)          # (R',), (R,)
    # A batch ends where the tokens of all pairs up to there pass a multiple of ROWS.
    number = texts.lengths[pairs % U].cumsum(0) // ROWS                      # (R',): which batch
    sizes = number.unique_consecutive(return_counts=True)[1]
    logits = []
    for batch in bar(pairs.split(sizes.tolist()), "pairs"):
        # Only the batch's different texts and images are packed. Query sequence i is a copy of
        # text query_text[i] and reads image query_view[i].
        text, query_text = (batch % U).unique(return_inverse=True)
        image, query_view = (batch // U).unique(return_inverse=True)
        few_texts = texts.select(text)
        few_images = images.select(image)
        # The head reads the first token of each query sequence.
        first = offsets(few_texts.starts.diff()[query_text])[:-1].long()     # (pairs,)
        with inference_context(pairs.device):
            states = model.fuse(few_texts, few_images, query_text, query_view, first)
            logits.append(model.itm_head(states).float())                    # (pairs, D) -> (.., 2)
    return torch.cat(logits)[inverse]                                        # (R', 2) -> (R, 2)


def both_scores(model, captions, images, pairs, cosine):
    """pairs of a text and an image of the captions, two of (R,), and their cosine (R,) ->
    {"reranked_": (R,) the sum, "matched_": (R,) the match head's yes}."""
    text, image = pairs
    logits = match_logits(model, captions.texts, images, text, captions.images[image])
    no, yes = logits.T                                                       # (R, 2) -> 2 x (R,)
    together = cosine / model.temperature + LOG_ODDS_WEIGHT * (yes - no)
    return {"reranked_": together, "matched_": yes}


def rerank(model, captions, images, found):
    """found {direction: rank_all's} gets "reranked_" and "matched_": the scores of the K best."""
    # Both directions are read together, so that pairs which both have are read once.
    # Caption c is paired with images best[0][c], image i with captions best[1][i].
    best = [x["best"] for x in found.values()]                               # (n, K), (I, K)
    image = torch.arange(len(captions.images), device=captions.place.device)                # (I,)
    text = captions.place[:, None].expand_as(best[0]), captions.place[best[1]]
    image = best[0], image[:, None].expand_as(best[1])
    cosine = [x["cosine"] for x in found.values()]
    text, image, cosine = (torch.cat([x.flatten() for x in both]) for both in (text, image, cosine))
    for name, values in both_scores(model, captions, images, (text, image), cosine).items():
        parts = values.split([x.numel() for x in best])                      # (n K,), (I K,)
        for x, part in zip(found.values(), parts):
            x[name] = part.view_as(x["best"])


def false_caption_scores(model, captions, images):
    """% of images whose first true caption beats the false one; chance 50, a tie is lost."""
    image = torch.arange(len(captions.false_place), device=captions.place.device)           # (I,)
    first = torch.searchsorted(captions.owner, image)                        # (I,): owners ascend
    text = torch.cat([captions.place[first], captions.false_place])          # (2 I,) true, false
    image = image.repeat(2)                                                  # (2 I,)
    cosine = (captions.texts.vectors[text] * captions.vectors[image]).sum(1)  # (2 I, E) -> (2 I,)
    scores = both_scores(model, captions, images, (text, image), cosine)
    scores = {"": scores["reranked_"], "_match": scores["matched_"], "_cosine": cosine}
    result = {}
    for name, score in scores.items():
        true, false = score.chunk(2)                                         # (2 I,) -> 2 x (I,)
        result[f"false_caption_accuracy{name}"] = percent(true > false)
    return result


# --------------------------------------------------------------------------------------------------
# Results by language, and their tables
# --------------------------------------------------------------------------------------------------

def language_scores(model, tokenizer, rows, images, language, K, trained):
    """rows, their images Encoded -> {key: %} of one language."""
    captions = encode_captions(model, tokenizer, rows, images, language)
    found = {direction: rank_all(captions, direction, K) for direction in ("t2i", "i2t")}
    if K:
        rerank(model, captions, images, found)
    count = len(captions.images)
    result = {"images": count, "n": len(captions.place), "chance_r1": 100 / count}
    for direction in found:
        result |= recalls(direction, found[direction])
    result |= mean_recalls(result)
    new = torch.tensor(new_names(rows, language, trained), device=captions.place.device)     # (n,)
    if trained and new.any():
        result["new_n"] = int(new.sum())
        result["new_t2i_r1"] = percent(found["t2i"]["rank"][new] < 1)
    if len(captions.false_place):
        result |= false_caption_scores(model, captions, images)
    return result


def retrieval(*arguments, **options):
    """As each_language -> {language: {key of results.json: %}}"""
    return dict(each_language(*arguments, **options))


@torch.inference_mode()
def each_language(model, tokenizer, rows, languages=None, rerank=16, trained=(), common=False):
    """rows of evaluation_set -> yields (language, {key of results.json: %}), with n captions and
    images. The images are encoded once.

    Candidates are the images with a caption in the language; with common, those with a caption in
    all of `languages` (None: all that occur). rerank: K, 0 for none. trained: the languages of
    training, for new_t2i_r1, R@1 of the new_n captions that no other of them shares. ValueError for
    a language that no caption is in. Images that cannot be read are named and left out."""
    present = list(dict.fromkeys(k for row in rows for k in row["captions"] if row["captions"][k]))
    languages = list(dict.fromkeys(languages or present))
    for k in set(languages) - set(present):
        raise ValueError(f"no caption is in language {k!r}: choose from {' '.join(present)}")
    # Only what can be an answer in one of the languages is read.
    wanted = all if common else any
    rows = [row for row in rows if wanted(row["captions"].get(k) for k in languages)]
    if not rows:
        raise ValueError(f"no image has a caption in each of {' '.join(languages)}")
    training = model.training
    bad = []
    try:
        good, images = encode_images(model.eval(), bar(rows, "images"), bad)
        report_bad(bad, len(rows))
        languages = [k for k in languages if any(row["captions"].get(k) for row in good)]
        for k in bar(languages, "languages"):
            yield k, language_scores(model, tokenizer, good, images, k, rerank, trained)
    finally:
        model.train(training)


def group_means(scores, languages):
    """{language: {key: %}} -> {"seen" | "text_only" | "never": {key: mean over the group's
    languages that have it}}; "languages" is their number. languages: a checkpoint's, {"seen": [..],
    "text_only": [..]}; None: it has none, all are the one group "all"."""
    groups = {"all": scores}
    if languages:
        known = set(itertools.chain(*languages.values()))
        groups = languages | {"never": [k for k in scores if k not in known]}
    members = {group: [scores[k] for k in codes if k in scores] for group, codes in groups.items()}
    return {group: means_of(members[group]) for group in groups if members[group]}


def means_of(scores):
    """[{key: %}] of some languages -> {key: mean over those that have it}, and how many "languages"
    these are."""
    means = {"languages": len(scores)}
    for key in dict.fromkeys(itertools.chain(*scores)):
        means[key] = fmean(x[key] for x in scores if key in x)
    return means


def demo_report(model, tokenizer, sets=TEST_SETS, rerank=16):
    """-> results.json's {set: {language: {key: %}}, "groups": {set: {group: {key: mean}}}}."""
    languages = {group: emoji.languages(group) for group in ("seen", "text_only")}
    trained = list(itertools.chain(*languages.values()))
    report = {name: retrieval(model, tokenizer, emoji.split(name), None, rerank, trained)
              for name in sets}
    groups = {name: group_means(scores, languages) for name, scores in report.items()}
    return report | {"groups": groups}


def validation_scores(model, tokenizer, rows, languages=None):
    """R@1 by cosine, means over languages -> {group: {"t2i_r1": %, "i2t_r1": %}}. languages: as
    group_means takes them."""
    means = group_means(retrieval(model, tokenizer, rows, rerank=0), languages)
    return {group: {k: x[k] for k in ("t2i_r1", "i2t_r1")} for group, x in means.items()}


def print_scores(name, lines):
    """lines {label: {key: %}} -> a table for each direction, and one of false captions where the
    set has them."""
    print(f"\n{name}: {max(x['images'] for x in lines.values()):,g} images, %")
    for direction, title, n in (("t2i", "text to image", "n"), ("i2t", "image to text", "images")):
        columns = {key.format(direction): head for key, head in COLUMNS.items()}
        print_columns(title, lines, {n: "n"} | columns)
    if any("false_caption_accuracy" in x for x in lines.values()):
        print_columns("true beats false (chance 50)", lines, FALSE_COLUMNS)


def print_columns(title, lines, columns):
    """One table, its title above the labels; columns that no line has are left out."""
    columns = {key: head for key, head in columns.items() if any(key in x for x in lines.values())}
    formats = {"n": ",.0f", "images": ",.0f", "chance_r1": ".2f"}
    table = {title: list(columns.values())}
    for label, x in lines.items():
        cells = [format(x[key], formats.get(key, ".1f")) if key in x else "" for key in columns]
        table[label] = cells
    first = max(map(len, table)) + 2
    for label, cells in table.items():
        padded = [cell.rjust(max(8, len(head) + 2)) for cell, head in zip(cells, table[title])]
        print(f"{label:{first}}" + "".join(padded))


def group_lines(means):
    """The lines of print_scores for group_means."""
    return {f"{GROUPS.get(k, 'all')} ({x['languages']})": x for k, x in means.items()}


def print_table(report):
    """The end-of-run table of a demo_report."""
    for name, groups in report["groups"].items():
        print_scores(name, group_lines(groups))
    print("\nMeans over a group's languages. R@1, R@5 and R@10 rank by cosine; the others are R@1:"
          "\nchance       R@1 of a model that knows nothing; R@k: about k times as much"
          "\nequal        captions that read the same are equally right"
          "\nre-ranked    the 16 best by cosine in the order of cosine and match head together"
          "\nby match     the same in the order of the match head alone"
          "\nnew names    captions that no other training language shares")


# --------------------------------------------------------------------------------------------------
# Benchmarks
# --------------------------------------------------------------------------------------------------

@torch.inference_mode()
def task_scores(task, model, tokenizer, split, languages, translated=False):
    """Yields (language, {key: number}) of a benchmark (tasks/), each as soon as it is known. split:
    "val" or "test". translated: the test sets after machine translation into English."""
    # Languages share pictures: these are encoded once for all of them.
    if isinstance(task, Retrieval):
        rows = task.rows(split, *languages, translated=translated)
        K = task.k if split == "test" else task.validation_k
        yield from each_language(model, tokenizer, rows, languages, K)
        return
    training = model.training
    model.eval()
    try:
        for language in bar(languages, "languages"):
            yield language, task.scores(model, tokenizer, split, language, translated)
    finally:
        model.train(training)


def task_report(task, scores, trained):
    """{language: {key: number}} -> as results.json, with the means over all languages but English
    and over those of a group. trained: the checkpoint's languages, or None."""
    others = {k: x for k, x in scores.items() if k != "en"}
    means = {"others": means_of(others.values())} if others else {}
    return {task.name: scores, "groups": {task.name: means | group_means(scores, trained)}}


def print_task(task, report):
    """The table of a benchmark's report, and the paper's rows below it: other models, at other
    sizes, so they say what is possible and not how good this code is."""
    lines = report[task.name] | {TASK_GROUPS.get(k, k): x
                                 for k, x in report["groups"][task.name].items()}
    print_columns(f"{task.name}, %", lines, task.columns)
    for regime, rows in task.published.items():
        shown = ", ".join(f"{model} {value}" for model, value in rows.items())
        print(f"published, {regime}, {task.published_as}: {shown}")


# --------------------------------------------------------------------------------------------------
# One example, explained
# --------------------------------------------------------------------------------------------------

def patch_grid(model, parts):
    """parts (P,) of an image -> those of its patches, row by row (side, side). Row 0, which stands
    for the whole image, is left out."""
    side = model.config.image_size // model.config.patch_size
    return parts[1:].view(side, side)


@torch.inference_mode()
def cosine_map(model, tokenizer, image, text):
    """How much of the cosine of an RGB image and a text comes from each patch? -> (side, side).

    Where the image's vector is of the mean of its states (pool="mean", BEiT-2), it is a sum over
    patches, and so is the cosine. Else this says how alike each patch and the text are."""
    view = next(image_batches(model, [image]))                               # states (P, D)
    sentence = next(text_batches(model, [tokenizer.encode(text, longest_text(model))]))
    projected = model.vision_proj(view.states.float())                       # (P, D) -> (P, E)
    parts = projected @ sentence.vectors[0]                                  # (P,)
    return patch_grid(model, parts / len(parts) / projected.mean(0).norm())


def attention_map(model, tokenizer, image, text):
    """What does the match head's answer owe to each patch of an RGB image? -> (side, side).

    In the last cross-attention the first token reads a sum over patches: weight times value. Each
    term counts times the gradient of the log-odds of yes (Grad-CAM; arXiv 2107.07651, Figure 4).
    The weights alone say less: much is read that does not matter. Not for two threads at once."""
    cross = model.fusion.layers[-1].cross
    kept = {}

    def keep_inputs(module, given):
        kept["x"], kept["y"], *_ = given

    def keep_sum(module, given):
        kept["sum"] = given[0].detach().requires_grad_()
        return (kept["sum"],)

    hooks = [cross.register_forward_pre_hook(keep_inputs),
             cross.out.register_forward_pre_hook(keep_sum)]
    try:
        with torch.inference_mode(False), torch.no_grad():
            view = next(image_batches(model, [image]))                       # states (P, D)
            sentence = next(text_batches(model, [tokenizer.encode(text, longest_text(model))]))
            first = torch.zeros(1, dtype=torch.long, device=view.states.device)
            with torch.enable_grad(), inference_context(first.device):
                no, yes = model.itm_head(model.fuse(sentence, view, first, first, first))[0]
                gradient, = torch.autograd.grad(yes - no, kept["sum"])       # (1, D)
            # The kernels do not return weights: they are computed again.
            H = cross.heads
            q = cross.q(kept["x"].float()).view(H, -1)                       # (1, D) -> (H, D/H)
            k, v = cross.project(kept["y"].float(), cross.k, cross.v)        # (P, H, D/H)
            scores = torch.einsum("hd,phd->hp", q, k) / q.shape[1] ** 0.5
            parts = torch.einsum("hp,phd,hd->p", scores.softmax(1), v, gradient.float().view(H, -1))
            return patch_grid(model, parts)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def explain(model, tokenizer, image_batch):
    """Prints what the first pair of an image-text batch (data.Batches) becomes on its way to the
    losses, with real numbers and shapes."""
    ids, sentences, masked = (image_batch[key] for key in ("ids", "b", "masked"))
    B = len(ids)
    end = int(sentences.starts[1])                                           # of caption 0
    positions = masked.positions[masked.positions < end].tolist()            # in caption 0

    def read(token_ids):
        return " ".join(tokenizer.pieces(token_ids))

    # Batch: B images, and their captions packed one after the other.
    print(f"a batch         {B} images {tuple(image_batch['images'].shape)} uint8 and their "
          f"captions: {len(sentences.token_ids)} tokens in one row, no padding\n"
          f"caption 0       {read(sentences.token_ids[:end])}\n"
          f"  token ids     {sentences.token_ids[:end].tolist()}, rows 0 to {end - 1}\n"
          f"  masked        {read(masked.token_ids[:end])}, masked positions {positions}")
    # The two encoders: views of the images, of the captions, and of the masked captions.
    a = model.encode_image(normalise(image_batch["images"]), ids)
    b = model.encode_text(sentences.token_ids, sentences.starts, ids)
    masked_states = model.encode_text(masked.token_ids, sentences.starts, ids).states
    masked_text = MaskedText(masked_states, masked.positions, masked.labels)
    print(f"view a          image 0: {a.starts[1]} states of width {a.states.shape[1]} and one "
          f"unit vector of {a.vectors.shape[1]}\nview b          caption 0: {end} states and one "
          f"unit vector; their cosine is {a.vectors[0] @ b.vectors[0]:.3f}")
    # Contrastive loss: image 0 looks for its caption among all. Its hard negative is a wrong one,
    # drawn by probability.
    logits = a.vectors[0] @ b.vectors.T / model.temperature                  # (E,), (B, E) -> (B,)
    rank = 1 + int((logits > logits[0]).sum())
    temperature = model.temperature.item()
    negatives = hard_negatives(a, b, model.temperature, seed=0)
    j = int(negatives[1][0])
    negative = sentences.token_ids[sentences.starts[j]:sentences.starts[j + 1]]
    print(f"contrastive     cosine / temperature {temperature:.3f} against all {B} captions: "
          f"the true one comes {rank}. of {B}, its probability is {logits.softmax(0)[0]:.4f}\n"
          f"hard negative   drawn for image 0: caption {j}, {read(negative)}")
    # Fusion encoder: B true pairs, 2B with a hard negative, B masked captions, all in one pass. The
    # match head reads the first token of the 3B pairs.
    pairs, fused = fuse_pairs(model, a, b, masked_text, negatives)
    yes = model.itm_head(pairs).softmax(-1)[:, 1].view(3, B)                 # (3B, 2) -> (3, B)
    print(f"fusion          {4 * B} query sequences read {B} images; the heads read {len(pairs)} "
          f"first tokens and {len(fused)} masked ones\nmatching        probability of belonging "
          f"together: image 0 with caption 0 {yes[0, 0]:.3f}, with caption {j} {yes[2, 0]:.3f}")
    # Masked LM: what stood at the masked positions of caption 0, and the three best guesses.
    head = model.mlm_head
    guesses = F.linear(head(fused), head.weight, head.bias).softmax(-1)      # (M, D) -> (M, V)
    for position, guess in zip(positions, guesses):
        label = int(sentences.token_ids[position])
        best = guess.topk(3)
        named = zip(tokenizer.pieces(best.indices), best.values)
        print(f"masked LM       position {position} was {read([label])} (probability "
              f"{guess[label]:.4f}); best guesses", ", ".join(f"{w} {p:.3f}" for w, p in named))
    got = cross_view(model, a, b, masked_text, seed=0)
    print(f"losses          contrastive {got['contrast']:.3f}, matching {got['match']:.3f}, "
          f"masked LM {got['mask']:.3f}")


# --------------------------------------------------------------------------------------------------
# Pairs that do not fit
# --------------------------------------------------------------------------------------------------

def pair_of(row):
    """A row of row_of -> its first text, {name of the pair: another text}."""
    texts = {language: group[0] for language, group in row["captions"].items()}
    name = "image" if "image" in row else next(iter(texts))
    return texts.pop(name, None), {f"{name} and {k}": text for k, text in texts.items()}


@torch.inference_mode()
def lost_pairs(model, tokenizer, reader, bad):
    """Which pairs of a file do not find each other among BATCH neighbours, in one direction or the
    other? -> {name of the pair: (how many pairs, how many are lost, [(margin, where, text)])}. The
    list has the ten worst; margin: the pair's cosine minus that of the best wrong one. Why records
    are bad goes to the list `bad`."""
    count = collections.Counter()
    lost = collections.Counter()
    worst = collections.defaultdict(list)
    read = functools.partial(row_of, reader)
    for first in bar(range(0, len(reader), BATCH), reader.path):
        block = range(first, min(first + BATCH, len(reader)))
        rows = list(readable(read, block, [], bad))
        if reader.images:
            rows, images = encode_images(model, rows, bad)
        if not rows:
            continue
        firsts, others = zip(*map(pair_of, rows))
        if reader.images:
            a = images.vectors                                               # (rows, E)
        else:
            encoded, place = encode_texts(model, tokenizer, firsts)
            a = encoded.vectors[place]                                       # (rows, E)
        for name in dict.fromkeys(itertools.chain(*others)):
            index = [i for i, texts in enumerate(others) if name in texts]
            texts = [others[i][name] for i in index]
            encoded, place = encode_texts(model, tokenizer, texts)
            cosine = a[index] @ encoded.vectors[place].T                     # (n, n)
            # A pair is lost where a wrong partner of one of its sides is nearer than its own.
            own = cosine.diag()                                              # (n,)
            wrong = cosine.clone().fill_diagonal_(-torch.inf)
            margin = own - torch.maximum(wrong.amax(0), wrong.amax(1))       # (n,)
            count[name] += len(index)
            lost[name] += int((margin < -1e-4).sum())                        # equal ones are right
            numbers = [rows[i]["number"] for i in index]
            found = list(zip(margin.tolist(), numbers, texts))
            worst[name] = heapq.nsmallest(10, worst[name] + found)
    return {name: (n, lost[name], worst[name]) for name, n in count.items()}


def pairs_command(args, device):
    model, tokenizer, _ = load(args.ckpt, device)
    bad = []
    total = 0
    for source in parse_all(args.data):
        for reader in open_readers(source, cache=args.cache, root=args.image_root):
            total += len(reader)
            for name, (n, lost, worst) in lost_pairs(model, tokenizer, reader, bad).items():
                print(f"{reader.path}: {name}: {lost:,} of {n:,} pairs ({100 * lost / n:.1f} %) do "
                      f"not find each other among {min(n, BATCH)}; the worst:")
                for margin, number, text in worst:
                    print(f"  {margin:6.2f}  {reader.where(number)}: {text[:80]}")
    report_bad(bad, total)


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------

def retrieval_command(args, device):
    if args.rerank < 0:
        raise ValueError("--rerank must be 0 (none) or more")
    model, tokenizer, languages = load(args.ckpt, device)
    trained = list(itertools.chain(*languages.values())) if languages else ()
    rows = evaluation_set(args.data, None, args.cache, args.image_root)
    scores = retrieval(model, tokenizer, rows, args.languages, args.rerank, trained, args.common)
    groups = group_means(scores, languages)
    name = " ".join(args.data)
    print_scores(name, scores | group_lines(groups))
    if args.json:
        name = name.removeprefix("demo:")
        report = {name: scores, "groups": {name: groups}}
        data.write_output(args.json, json.dumps(report, indent=1).encode())
        print(f"\nwrote {args.json}")


def done_before(partial, of):
    """The scores that an interrupted run of the same command left: {language: {key: number}}."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(partial.read_text()) if partial else {}
        return found["scores"] if found["of"] == of else {}
    return {}


def task_command(args, device):
    """`evaluate.py xvnli ...`: one benchmark's test sets, by language."""
    task = TASKS[args.task](args.data, args.image_root)
    model, state = load_model(args.ckpt, task)
    tokenizer = data.Tokenizer(state["tokenizer"])
    languages = args.languages or task.languages
    if args.translate_test:
        languages = [k for k in languages if k != "en"]
    task.check("test", languages, args.translate_test)
    # Each language is written as soon as it is done: the same command goes on after the last.
    partial = args.json and args.json.with_name(f"{args.json.name}.partial")
    written = pathlib.Path(args.ckpt).stat()
    of = [args.ckpt, written.st_mtime_ns, written.st_size, args.data, args.translate_test]
    # A checkpoint or data that changed since then make other scores.
    scores = done_before(partial, of)
    left = [k for k in languages if k not in scores]
    for language, values in task_scores(task, model.to(device), tokenizer, "test", left,
                                        args.translate_test):
        scores[language] = values
        if partial:
            data.write_output(partial, json.dumps({"of": of, "scores": scores}).encode())
    scores = {k: scores[k] for k in languages}
    report = task_report(task, scores, state["config"].get("languages"))
    print_task(task, report)
    if args.json:
        data.write_output(args.json, json.dumps(report, indent=1).encode())
        partial.unlink(missing_ok=True)
        print(f"\nwrote {args.json}")


def main(argv=None):
    """The command line -> exit status; a user's mistake is one line and status 2."""
    strict = {"usage": argparse.SUPPRESS, "allow_abbrev": False}             # errors are one line
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, **strict)
    names = ",".join(("retrieval", "pairs", *TASKS))
    commands = parser.add_subparsers(required=True, metavar=f"{{{names}}}", prog=parser.prog)
    style = argparse.ArgumentDefaultsHelpFormatter
    score = commands.add_parser("retrieval", help="recall by language, both directions",
                                formatter_class=style, **strict)
    score.set_defaults(run=retrieval_command)
    add = score.add_argument
    add("--data", nargs="+", default=["demo:test_style"], help="or what train.py --images takes")
    add("--rerank", type=int, default=16, metavar="K", help="candidates to re-rank; 0: none")
    add("--languages", nargs="+", help="only these; None: all that occur")
    add("--common", action="store_true", help="only images with a caption in each language")
    add("--json", type=pathlib.Path, metavar="FILE", help="write all numbers, as in results.json")
    pairs = commands.add_parser("pairs", help="pairs whose vectors do not find each other",
                                formatter_class=style, **strict)
    pairs.set_defaults(run=pairs_command, json=None)
    pairs.add_argument("--data", nargs="+", required=True, default=argparse.SUPPRESS,
                       help="what train.py --images or --texts takes")
    tasks = []
    for name in TASKS:
        command = commands.add_parser(name, help="a benchmark", formatter_class=style, **strict)
        command.set_defaults(run=task_command, task=name)
        add = command.add_argument
        add("--data", required=True, default=argparse.SUPPRESS, metavar="ROOT",
            help="folder of the annotations (docs/data.md, Benchmarks)")
        add("--languages", nargs="+", help="only these; None: the published ones")
        add("--translate_test", action="store_true", help="the test set translated into English")
        add("--json", type=pathlib.Path, metavar="FILE", help="write all numbers")
        tasks.append(command)
    for command in (score, pairs, *tasks):
        add = command.add_argument
        add("--ckpt", required=True, default=argparse.SUPPRESS, help="checkpoint of train.py")
        add("--image_root", metavar="DIR", help="folder of the images that JSON lines name")
        add("--cache", metavar="DIR", help="folder for indices of the files; None: beside them")
    args = parser.parse_args(argv)
    try:
        data.check_target(args.json)
        args.run(args, "cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, OSError, BadRecord) as error:
        return data.fail(error)
    return 0


if __name__ == "__main__":
    data.run(main)
