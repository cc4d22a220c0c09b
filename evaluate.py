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

Letters: I images, n captions of one language, U different texts, K candidates of a query, R pairs
of a text and an image, B sequences, T tokens, M masked tokens, D width, E embedding, V vocabulary.

    python evaluate.py retrieval --ckpt out/ckpt.pt --data demo:test_style --json scores.json
"""
import argparse
import itertools
import json
import os
import pathlib
import sys
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from demo import emoji
from formats.images import eval_transform, normalise
from formats.records import BadRecord
from formats.sources import ImageFiles, parse_all
from kernels.packed import gather_sequences, offsets
from losses import MaskedText, cross_view, fuse_pairs, hard_negatives
from model import View, training_dtype
from weights import load_model

GROUPS = {"seen": "seen with images", "text_only": "only in parallel text",
          "never": "never in training"}
COLUMNS = {"{}_r1": "R@1", "{}_r1_equal": "equal", "reranked_{}_r1": "re-ranked",
           "matched_{}_r1": "by match", "new_{}_r1": "new names", "{}_r5": "R@5", "{}_r10": "R@10"}
FALSE_COLUMNS = {"false_caption_accuracy_cosine": "cosine", "false_caption_accuracy": "re-ranked",
                 "false_caption_accuracy_match": "by match"}
TEST_SETS = ("test_style", "test_concept", "test_scenes")
SENTENCE_TOKENS = 64                    # a longer caption or query is cut, <s> and </s> included
BATCH = 256                             # images or texts encoded at once
PAIRS = 2048                            # pairs that the fusion encoder reads at once
LOG_ODDS_WEIGHT = 0.25                  # of the match head's log-odds in re-ranking


# --------------------------------------------------------------------------------------------------
# Encode a set
# --------------------------------------------------------------------------------------------------

def load(path, device="cpu"):
    """A checkpoint of train.py -> (model in eval mode on device, tokenizer); else ValueError."""
    model, state = load_model(path)
    return model.eval().to(device), data.Tokenizer(state["tokenizer"])


def inference_context(device):
    """For the encoders and the fusion encoder: the autocast of training (model.training_dtype)."""
    dtype, _ = training_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def join(views):
    """Concatenates Views into one packed View. On CUDA its states take half the memory: under
    autocast encoders return float32, which the fusion encoder does not need."""
    dtype = torch.bfloat16 if views[0].states.is_cuda else views[0].states.dtype
    states = torch.cat([view.states.to(dtype) for view in views])            # (T, D)
    starts = offsets(torch.cat([view.starts.diff() for view in views]))      # (I+1,)
    return View(states, starts, torch.cat([view.vectors for view in views]), None)


def select(view, index):
    """Sequences `index` (ascending) of a View as a packed View; all of them are no copy."""
    if len(index) == len(view.vectors):
        return view
    rows, starts = gather_sequences(view.starts, index)
    return View(view.states[rows], starts, view.vectors[index], None)        # (T, D) -> (T', D)


def encode_images(model, images):
    """Pillow images -> View of I images."""
    views = []
    for first in range(0, len(images), BATCH):
        part = [eval_transform(x, model.config.image_size) for x in images[first:first + BATCH]]
        pixels = torch.from_numpy(np.stack(part)).to(model.temperature.device)     # (B, 3, s, s)
        with inference_context(pixels.device):
            views.append(model.encode_image(normalise(pixels), None))
    return join(views)


def longest_text(model):
    """The most tokens of a caption or query that this model reads."""
    return min(SENTENCE_TOKENS, model.text.longest)


def encode_texts(model, tokenizer, texts):
    """n texts -> View of the U different ones, and each text's place in it (n,)."""
    device = model.temperature.device
    token_ids = [tuple(tokenizer.encode(text, longest_text(model))) for text in texts]
    different = sorted(set(token_ids), key=lambda ids: (len(ids), ids))      # a batch: like lengths
    views = []
    for first in range(0, len(different), BATCH):
        packed, starts = data.pack(different[first:first + BATCH])           # (T,), (B+1,)
        with inference_context(device):
            views.append(model.encode_text(packed.to(device), starts.to(device), None))
    place = {ids: i for i, ids in enumerate(different)}
    return join(views), torch.tensor([place[ids] for ids in token_ids], device=device)


class Captions(NamedTuple):
    """The captions of one language, image after image, and one false caption of each image."""
    texts: list                         # n captions
    owner: torch.Tensor                 # (n,) the image that each describes, ascending
    view: View                          # the U different texts of captions and false captions
    place: torch.Tensor                 # (n,) where each caption is in the View
    false_place: torch.Tensor           # (I,) where each false caption is; (0,) in a set without


def encode_captions(model, tokenizer, rows, language):
    """rows that all have captions in the language -> Captions."""
    texts, owner, false = [], [], []
    for image, row in enumerate(rows):
        texts += row["captions"][language]
        owner += [image] * len(row["captions"][language])
        if "false_captions" in row:
            false.append(row["false_captions"][language])
    view, place = encode_texts(model, tokenizer, texts + false)
    owner = torch.tensor(owner, device=place.device)                         # (n,)
    return Captions(texts, owner, view, place[:len(texts)], place[len(texts):])


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


def right_answers(captions, images):
    """Which image is right for which caption: {"": (n, I), "_equal": (n, I)} bool. With "_equal",
    captions that read the same are right for the images of all of them."""
    own = torch.eye(images, dtype=torch.bool, device=captions.owner.device)  # (I, I)
    own = own[captions.owner]                                                # (n, I)
    # Captions that read the same meet in the row of the last one: it collects their images.
    last = {text: i for i, text in enumerate(captions.texts)}
    row = torch.tensor([last[text] for text in captions.texts], device=own.device)          # (n,)
    collected = torch.zeros_like(own)                                        # (n, I)
    collected[row, captions.owner] = True
    return {"": own, "_equal": collected[row]}


def recalls(orders, rights):
    """orders {prefix: (scores t2i, scores i2t)} and rights {suffix: right}, matrices (n, I) ->
    {key of results.json: %}, for example "reranked_i2t_r5_equal"."""
    result = {}
    for prefix, (t2i, i2t) in orders.items():
        for suffix, right in rights.items():
            both = {"t2i": ranks(t2i, right), "i2t": ranks(i2t.T, right.T)}  # (n,) and (I,)
            for direction, rank in both.items():
                for k in (1, 5, 10):
                    result[f"{prefix}{direction}_r{k}{suffix}"] = percent(rank < k)
    return result


def new_names(rows, language, trained):
    """Which captions does no other training language share, in any case? -> list of n bool."""
    new = []
    for row in rows:
        texts = [row["captions"].get(other, []) for other in trained if other != language]
        others = {text.casefold() for text in itertools.chain(*texts)}
        new += [text.casefold() not in others for text in row["captions"][language]]
    return new


def match_logits(model, texts, images, pairs):
    """pairs (R, 2) of (text, image) in two Views -> (R, 2): the match head's "no" and "yes"."""
    # Equal pairs are read once. So their scores agree to the last bit, and they tie.
    pairs, inverse = pairs.unique(dim=0, return_inverse=True)                # (R', 2), (R,)
    logits = torch.empty(len(pairs), 2, device=pairs.device)                 # (R', 2)
    # In the order of images: a batch has few different ones, and projects each of them once.
    for batch in pairs[:, 1].argsort(stable=True).split(PAIRS):
        # Only the batch's different texts and images are packed. Query sequence i is a copy of
        # text query_text[i] and reads image query_view[i].
        text, query_text = pairs[batch, 0].unique(return_inverse=True)
        image, query_view = pairs[batch, 1].unique(return_inverse=True)
        few_texts = select(texts, text)
        few_images = select(images, image)
        # The head reads the first token of each query sequence.
        first = offsets(few_texts.starts.diff()[query_text])[:-1].long()     # (PAIRS,)
        with inference_context(pairs.device):
            states = model.fuse(few_texts, few_images, query_text, query_view, first)
            logits[batch] = model.itm_head(states).float()                   # (PAIRS, D) -> (.., 2)
    return logits[inverse]                                                   # (R, 2)


def both_scores(model, texts, images, pairs, cosine):
    """pairs (R, 2) and their cosine (R,) -> {"reranked_": (R,) the sum, "matched_": (R,) match}."""
    no, yes = match_logits(model, texts, images, pairs).T                    # (R, 2) -> 2 x (R,)
    together = cosine / model.temperature + LOG_ODDS_WEIGHT * (yes - no)
    return {"reranked_": together, "matched_": yes}


def rerank_scores(model, captions, images, cosine, K):
    """cosine (n, I) -> {"reranked_", "matched_": (scores t2i, scores i2t)}, matrices (n, I) with
    -inf where a pair is not among its query's K candidates."""
    # A caption's candidates are its K best images, an image's candidates its K best captions.
    best_images = cosine.topk(min(K, cosine.shape[1]), dim=1).indices        # (n, K)
    best_captions = cosine.topk(min(K, cosine.shape[0]), dim=0).indices      # (K, I)
    nothing = torch.zeros_like(cosine, dtype=torch.bool)                     # (n, I)
    t2i = nothing.scatter(1, best_images, True)                              # (n, I)
    i2t = nothing.scatter(0, best_captions, True)                            # (n, I)
    # The match head reads all candidates, those of both directions once.
    caption, image = (t2i | i2t).nonzero(as_tuple=True)                      # (R,), (R,)
    pairs = torch.stack([captions.place[caption], image], 1)                 # (R, 2)
    scores = both_scores(model, captions.view, images, pairs, cosine[caption, image])
    # Back from lists of pairs to matrices, where a direction sees only its own candidates.
    orders = {}
    for name, values in scores.items():
        table = torch.full_like(cosine, -torch.inf)
        table[caption, image] = values                                       # (R,) -> (n, I)
        orders[name] = [table.masked_fill(~known, -torch.inf) for known in (t2i, i2t)]
    return orders


def false_caption_scores(model, captions, images):
    """% of images whose first true caption beats the false one; chance 50, a tie is lost."""
    image = torch.arange(len(captions.false_place), device=captions.place.device)           # (I,)
    first = torch.searchsorted(captions.owner, image)                        # (I,): owners ascend
    text = torch.cat([captions.place[first], captions.false_place])          # (2 I,) true, false
    image = image.repeat(2)                                                  # (2 I,)
    cosine = (captions.view.vectors[text] * images.vectors[image]).sum(1)    # (2 I, E) -> (2 I,)
    pairs = torch.stack([text, image], 1)                                    # (2 I, 2)
    scores = both_scores(model, captions.view, images, pairs, cosine)
    scores = {"": scores["reranked_"], "_match": scores["matched_"], "_cosine": cosine}
    result = {}
    for name, score in scores.items():
        true, false = score.chunk(2)                                         # (2 I,) -> 2 x (I,)
        result[f"false_caption_accuracy{name}"] = percent(true > false)
    return result


# --------------------------------------------------------------------------------------------------
# Results by language, and their tables
# --------------------------------------------------------------------------------------------------

def language_scores(model, tokenizer, rows, language, images, rerank, trained):
    """rows that all have captions in the language, and the View of their images -> {key: %}."""
    captions = encode_captions(model, tokenizer, rows, language)
    cosine = (captions.view.vectors @ images.vectors.T)[captions.place]      # (U, I) -> (n, I)
    rights = right_answers(captions, len(rows))
    orders = {"": (cosine, cosine)}
    if rerank:
        orders |= rerank_scores(model, captions, images, cosine, rerank)
    result = {"images": len(rows)} | recalls(orders, rights)
    new = torch.tensor(new_names(rows, language, trained), device=cosine.device)            # (n,)
    if trained and new.any():
        result["new_n"] = int(new.sum())
        result["new_t2i_r1"] = percent(ranks(cosine, rights[""])[new] < 1)
    if len(captions.false_place):
        result |= false_caption_scores(model, captions, images)
    return result | {"n": len(captions.texts)}


@torch.inference_mode()
def retrieval(model, tokenizer, rows, languages=None, rerank=16, trained=(), progress=False):
    """rows of evaluation_set -> {language: {key of results.json: %}}, with n captions and images.

    Candidates are the images with a caption in the language. languages: only these (None: all).
    rerank: K, 0 for none. trained: the languages of training, for new_t2i_r1, R@1 of the new_n
    captions that no other of them shares. ValueError for a language that no caption is in."""
    present = list(dict.fromkeys(k for row in rows for k in row["captions"] if row["captions"][k]))
    languages = list(dict.fromkeys(languages or present))
    for k in set(languages) - set(present):
        raise ValueError(f"no caption is in language {k!r}: choose from {' '.join(present)}")
    result = {}
    training = model.training
    try:
        all_images = encode_images(model.eval(), [row["image"] for row in rows])
        for k in tqdm(languages, disable=not progress, leave=False):
            index = [i for i, row in enumerate(rows) if row["captions"].get(k)]
            images = select(all_images, torch.tensor(index, device=all_images.states.device))
            some = [rows[i] for i in index]
            result[k] = language_scores(model, tokenizer, some, k, images, rerank, trained)
    finally:
        model.train(training)
    return result


def group_means(scores):
    """{language: {key: %}} of a demo set -> {"seen" | "text_only" | "never": {key: mean over the
    group's languages that have it}}; "languages" is their number."""
    means = {}
    for group in GROUPS:
        members = [scores[k] for k in emoji.languages(group) if k in scores]
        for key in dict.fromkeys(key for x in members for key in x):
            values = [x[key] for x in members if key in x]
            means.setdefault(group, {})[key] = fmean(values)
        if members:
            means[group]["languages"] = len(members)
    return means


def demo_report(model, tokenizer, sets=TEST_SETS, rerank=16, progress=False):
    """-> results.json's {set: {language: {key: %}}, "groups": {set: {group: {key: mean}}}}."""
    trained = emoji.languages("seen") + emoji.languages("text_only")
    report = {}
    for name in sets:
        rows = emoji.split(name)
        report[name] = retrieval(model, tokenizer, rows, None, rerank, trained, progress)
    return report | {"groups": {name: group_means(scores) for name, scores in report.items()}}


def validation_scores(model, tokenizer, rows):
    """R@1 by cosine, means over languages -> {group: {"t2i_r1": %, "i2t_r1": %}}. Rows of the demo
    (they have concept ids) have its groups of languages, others the one group "all"."""
    scores = retrieval(model, tokenizer, rows, rerank=0)
    if "ids" in rows[0]:
        means = group_means(scores)
    else:
        means = {"all": {k: fmean(x[k] for x in scores.values()) for k in ("t2i_r1", "i2t_r1")}}
    return {group: {k: x[k] for k in ("t2i_r1", "i2t_r1")} for group, x in means.items()}


def print_scores(name, lines):
    """lines {label: {key: %}} -> a table for each direction, and one of false captions where the
    set has them; each ends with chance."""
    some = next(iter(lines.values()))
    images = max(x["images"] for x in lines.values())      # a language may have captions of fewer
    print(f"\n{name}: {images:g} images, {some['n']:g} captions, %")
    for direction, title in (("t2i", "text to image"), ("i2t", "image to text")):
        chance = {f"{direction}_r{k}": min(100.0, 100 * k / images) for k in (1, 5, 10)}
        columns = {key.format(direction): head for key, head in COLUMNS.items()}
        print_columns(title, lines | {"chance": chance}, columns)
    if "false_caption_accuracy" in some:
        chance = dict.fromkeys(FALSE_COLUMNS, 50.0)
        print_columns("true beats false caption", lines | {"chance": chance}, FALSE_COLUMNS)


def print_columns(title, lines, columns):
    """One table, its title above the labels; columns that no line has are left out."""
    columns = {key: head for key, head in columns.items() if any(key in x for x in lines.values())}
    first = max(map(len, [title, *lines])) + 2
    print(f"{title:{first}}" + "".join(f"{head:>11}" for head in columns.values()))
    for label, x in lines.items():
        cells = [f"{x[key]:.1f}" if key in x else "" for key in columns]
        print(f"{label:{first}}" + "".join(f"{cell:>11}" for cell in cells))


def print_table(report):
    """The end-of-run table of a demo_report."""
    for name, groups in report["groups"].items():
        print_scores(name, {f"{GROUPS[k]} ({x['languages']})": x for k, x in groups.items()})
    print("\nMeans over a group's languages. R@1, R@5 and R@10 rank by cosine; the others are R@1:"
          "\nequal        captions that read the same are equally right"
          "\nre-ranked    the 16 best by cosine in the order of cosine and match head together"
          "\nby match     the same in the order of the match head alone"
          "\nnew names    captions that no other training language shares")


# --------------------------------------------------------------------------------------------------
# One example, explained
# --------------------------------------------------------------------------------------------------

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
# Commands
# --------------------------------------------------------------------------------------------------

def check_target(file):
    """ValueError before the work, not after it, when an output file cannot be written."""
    if file and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written")


def evaluation_set(name):
    """'demo:SPLIT', or files that train.py --images can read -> rows of {"image": RGB image,
    "captions": {language: [text]}}. ValueError that names the first record that is bad."""
    if name.startswith("demo:"):
        return emoji.split(name.removeprefix("demo:"))
    dataset = ImageFiles(parse_all([name]), None)
    try:
        return [dataset.row(i) for i in range(len(dataset))]
    except BadRecord as error:
        raise ValueError(error) from None


def retrieval_command(args, device):
    if args.rerank < 0:
        raise ValueError("--rerank must be 0 (none) or more")
    model, tokenizer = load(args.ckpt, device)
    demo = args.data.startswith("demo:")
    trained = emoji.languages("seen") + emoji.languages("text_only") if demo else ()
    scores = retrieval(model, tokenizer, evaluation_set(args.data), args.languages, args.rerank,
                       trained, progress=sys.stderr.isatty())
    # Groups are the demo's: its languages were chosen to be seen, text-only or never seen.
    groups = group_means(scores) if demo else {}
    means = {f"{GROUPS[k]} ({x['languages']})": x for k, x in groups.items() if x["languages"] > 1}
    print_scores(args.data, scores | means)
    if args.json:
        name = args.data.removeprefix("demo:")
        report = {name: scores, "groups": {name: groups}}
        args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
        print(f"\nwrote {args.json}")


def main(argv=None):
    """The command line -> exit status; a user's mistake is one line and status 2."""
    strict = {"usage": argparse.SUPPRESS, "allow_abbrev": False}             # errors are one line
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, **strict)
    commands = parser.add_subparsers(required=True, metavar="{retrieval}", prog=parser.prog)
    style = argparse.ArgumentDefaultsHelpFormatter
    score = commands.add_parser("retrieval", help="recall by language, both directions",
                                formatter_class=style, **strict)
    score.set_defaults(run=retrieval_command)
    add = score.add_argument
    add("--ckpt", required=True, default=argparse.SUPPRESS, help="checkpoint of train.py")
    add("--data", default="demo:test_style", help="demo:SPLIT, or files that --images reads")
    add("--rerank", type=int, default=16, metavar="K", help="candidates to re-rank; 0: none")
    add("--languages", nargs="+", help="only these; None: all that occur")
    add("--json", type=pathlib.Path, metavar="FILE", help="write all numbers, as in results.json")
    args = parser.parse_args(argv)
    try:
        check_target(args.json)
        args.run(args, "cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, OSError) as error:
        return data.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
