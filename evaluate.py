"""Retrieval in many languages: which image does this sentence mean, which sentence says what this image shows?

    dual encoder   score = cosine of two vectors made without seeing each other: n + I encodings give n x I scores
    re-ranking     the fusion encoder reads a query's top K again: score = cosine / temperature + 1/4 match log-odds
    by match       the same K in the order of the match logit alone, as published (F5.4)
    recall R@k     share of queries (%) with a right answer among the first k; an image's best caption counts

Why the sum: the match head learned to tell true pairs from wrong ones drawn by softmax(cosine / temperature). The best
log-odds for that are log(p(true) / p(drawn)): all that the cosine does NOT know. They correct the cosine, they do not
replace it. (Theory says weight 1; 1/4 was best on val and val_scenes of 1/4, 1/2, 1 and 2.)

Ties never help: what scores like the right answer (or NaN) ranks before it; a match head that says the same to all gets
0 % by match. Keys: reranked_ and matched_ for the two, t2i text to image, i2t image to text; with _equal, captions that
read the same are equally right.

Letters: I images, n captions of a language, U different texts among them, K candidates, R pairs, T tokens, D width.

    python evaluate.py retrieval --ckpt out/ckpt.pt --data demo:test_style --json scores.json
"""
import argparse
import json
import os
import pathlib
import sys

import numpy as np
import torch
from tqdm import tqdm

import data
from demo import emoji
from formats.images import normalise, eval_transform
from formats.sources import evaluation_rows
from kernels.packed import offsets, gather_sequences
from losses import MaskedText, cross_view, fuse_pairs, hard_negatives
from model import View
from weights import load_model

GROUPS = {"seen": "seen with images", "text_only": "only in parallel text", "never": "never in training"}
TEST_SETS = ("test_style", "test_concept", "test_scenes")
LOG_ODDS_WEIGHT = 0.25                                                       # of match head's log-odds in re-ranking


# ------------------------------------------------------------------------------------------------------------------
# Encode, score, rank
# ------------------------------------------------------------------------------------------------------------------

def load(path, device="cpu"):
    """A checkpoint of train.py -> (model in eval mode on device, tokenizer). ValueError for anything else."""
    model, state = load_model(path)
    return model.eval().to(device), data.Tokenizer(state["tokenizer"])


def join(views):
    """Several Views, one after the other, as one."""
    lengths = torch.cat([v.starts.diff() for v in views])
    ids = torch.arange(len(lengths), device=lengths.device)
    return View(torch.cat([v.states for v in views]), offsets(lengths), torch.cat([v.vectors for v in views]), ids)


def encode_images(model, images, device, batch):
    """PIL images -> View of I images."""
    size, views = model.config.image_size, []
    for first in range(0, len(images), batch):
        part = np.stack([eval_transform(image, size) for image in images[first:first + batch]])
        views.append(model.encode_image(normalise(torch.from_numpy(part).to(device)), None))
    return join(views)


def encode_texts(model, tokenizer, texts, device, batch):
    """n texts -> View of the U different ones, shortest first (less padding), and each text's place in it (n,)."""
    longest = min(data.LONGEST, model.text.longest)
    ids = [tuple(tokenizer.encode(text, longest)) for text in texts]
    order, views = sorted(set(ids), key=lambda x: (len(x), x)), []
    for first in range(0, len(order), batch):
        words, starts = data.pack(order[first:first + batch])
        views.append(model.encode_text(words.to(device), starts.to(device), None))
    place = {x: i for i, x in enumerate(order)}
    return join(views), torch.tensor([place[x] for x in ids], device=device)


def percent(x):
    return 100 * x.double().mean().item()


def match_logits(model, texts, images, pairs, batch):
    """pairs (R, 2) of (text, image) -> (R, 2): the match head's "no" and "yes". A repeated pair is read once: its
    scores agree to the last bit. Sorted by image, so that few images serve many texts."""
    pairs, place = pairs.unique(dim=0, return_inverse=True)
    logits = torch.empty(len(pairs), 2, device=pairs.device)
    for part in pairs[:, 1].argsort(stable=True).split(batch):
        (said, query_text), (shown, query_view) = (column.unique(return_inverse=True) for column in pairs[part].T)
        text_rows, text_starts = gather_sequences(texts.starts, said)
        image_rows, image_starts = gather_sequences(images.starts, shown)
        first = offsets(text_starts.diff()[query_text])[:-1].long()             # (batch,) their first tokens
        some_texts = View(texts.states[text_rows], text_starts, None, None)
        some_images = View(images.states[image_rows], image_starts, None, None)
        fused = model.fuse(some_texts, some_images, query_text, query_view, first)       # (batch, D)
        logits[part] = model.itm_head(fused).float()
    return logits[place]


def both_scores(model, texts, images, pairs, cosine, batch):
    """pairs (R, 2) of (text, image), their cosine (R,) -> {"reranked_": (R,), "matched_": (R,)}: sum, match alone."""
    no, yes = match_logits(model, texts, images, pairs, batch).T             # (R, 2) -> 2 x (R,)
    return {"reranked_": cosine / model.temperature + LOG_ODDS_WEIGHT * (yes - no), "matched_": yes}


def ranks(scores, right):
    """scores, right (queries, candidates) -> (queries,) how many wrong candidates are not below the best right one."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~right).sum(1)


def rerank_scores(model, texts, place, images, cosine, K, batch):
    """cosine (n, I) -> {"reranked_", "matched_": scores (n, I) of text to image, and of image to text}, -inf outside a
    query's top K."""
    none, (n, I) = torch.zeros_like(cosine, dtype=torch.bool), cosine.shape
    of_text = none.scatter(1, cosine.topk(min(K, I), 1).indices, True)
    of_image = none.scatter(0, cosine.topk(min(K, n), 0).indices, True)
    caption, image = (of_text | of_image).nonzero(as_tuple=True)
    pairs, table = torch.stack([place[caption], image], 1), {}
    for name, x in both_scores(model, texts, images, pairs, cosine[caption, image], batch).items():
        scores = cosine.new_full((n, I), -torch.inf)
        scores[caption, image] = x                                           # (R,) -> (n, I)
        table[name] = [scores.masked_fill(~candidates, -torch.inf) for candidates in (of_text, of_image)]
    return table


def language_scores(model, tokenizer, rows, language, images, rerank, trained, batch):
    """rows that all have captions in the language, and the View of their images -> {key: %}."""
    device, result = images.states.device, {"images": len(rows)}
    captions = [(text, i) for i, row in enumerate(rows) for text in row["captions"][language]]
    said, owner = [text for text, _ in captions], torch.tensor([i for _, i in captions], device=device)
    false = [row["false_captions"][language] for row in rows] if "false_captions" in rows[0] else []
    texts, place = encode_texts(model, tokenizer, said + false, device, batch)
    place, false = place[:len(said)], place[len(said):]
    cosine = (texts.vectors @ images.vectors.T)[place]                       # (U, I) -> (n, I)
    own = torch.eye(len(rows), dtype=torch.bool, device=device)[owner]       # (n, I)
    names = {text: i for i, text in enumerate(said)}
    name, equal = torch.tensor([names[text] for text in said], device=device), torch.zeros_like(own)
    equal[name, owner] = True
    rights = {"": own, "_equal": equal[name]}
    read = rerank_scores(model, texts, place, images, cosine, rerank, 8 * batch) if rerank else {}
    for prefix, (forth, back) in ({"": (cosine, cosine)} | read).items():
        for suffix, right in rights.items():
            for direction, rank in (("t2i", ranks(forth, right)), ("i2t", ranks(back.T, right.T))):
                result |= {f"{prefix}{direction}_r{k}{suffix}": percent(rank < k) for k in (1, 5, 10)}
    others = [{t.casefold() for k in trained if k != language for t in row["captions"].get(k, [])} for row in rows]
    new = torch.tensor([text.casefold() not in others[i] for text, i in captions], device=device)      # no loan word
    if trained and new.any():
        result |= {"new_n": int(new.sum()), "new_t2i_r1": percent(ranks(cosine, own)[new] < 1)}
    if len(false):
        true = place[torch.searchsorted(owner, torch.arange(len(rows), device=device))]        # its first caption
        result |= false_caption_scores(model, texts, images, true, false, 8 * batch)
    return result | {"n": len(captions)}


def false_caption_scores(model, texts, images, true, false, batch):
    """true, false (I,): places of texts -> % of images whose true caption wins; chance 50, a tie is lost."""
    text, image = torch.cat([true, false]), torch.arange(len(true), device=true.device).repeat(2)
    cosine = (texts.vectors[text] * images.vectors[image]).sum(1)            # (2 I,)
    scores = both_scores(model, texts, images, torch.stack([text, image], 1), cosine, batch)
    return {f"false_caption_accuracy{name}": percent(torch.gt(*x.chunk(2))) for name, x in
            (("", scores["reranked_"]), ("_match", scores["matched_"]), ("_cosine", cosine))}


# ------------------------------------------------------------------------------------------------------------------
# Per-language results, and the table
# ------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def retrieval(model, tokenizer, rows, languages=None, rerank=16, device="cpu", batch=256, progress=False, trained=()):
    """rows of evaluation_set -> {language: {key: %}}: keys of results.json, *_equal, n captions, images.
    Candidates: images with a caption in the language. rerank: K, 0 for none. batch: texts or images; 8 x as many pairs.
    trained: languages of training, for new_t2i_r1, R@1 of the new_n captions that no other of them shares."""
    present = list(dict.fromkeys(k for row in rows for k, texts in row["captions"].items() if texts))
    for language in set(languages or ()).difference(present):
        raise ValueError(f"no caption is in language {language!r}: choose from {' '.join(present)}")
    training, result = model.training, {}
    try:
        everything = encode_images(model.eval(), [row["image"] for row in rows], device, batch)
        for language in tqdm(dict.fromkeys(languages or present), disable=not progress, leave=False):
            index = torch.tensor([i for i, row in enumerate(rows) if row["captions"].get(language)], device=device)
            where, starts = gather_sequences(everything.starts, index)
            images = View(everything.states[where], starts, everything.vectors[index], index)
            result[language] = language_scores(model, tokenizer, [rows[i] for i in index.tolist()], language, images,
                                               rerank, trained, batch)
    finally:
        model.train(training)
    return result


def group_means(scores):
    """{language: {key: %}} of a demo set -> {"seen" | "text_only" | "never": {key: mean over its languages}}."""
    groups = {group: [scores[k] for k in emoji.languages(group) if k in scores] for group in GROUPS}
    return {group: {key: sum(x.get(key, 0) for x in members) / sum(key in x for x in members) for key in
                    dict.fromkeys(key for x in members for key in x)} | {"languages": len(members)}
            for group, members in groups.items() if members}


def demo_report(model, tokenizer, device, rerank=16, sets=TEST_SETS, progress=False):
    """-> results.json's {set: {language: {key: %}}, "groups": {set: {group: {key: mean}}}}."""
    trained = emoji.languages("seen") + emoji.languages("text_only")
    report = {name: retrieval(model, tokenizer, emoji.split(name), None, rerank, device, 256, progress, trained)
              for name in sets}
    return report | {"groups": {name: group_means(scores) for name, scores in report.items()}}


COLUMNS = {"t2i_r1": "image R@1", "t2i_r1_equal": "equal", "reranked_t2i_r1": "re-ranked", "matched_t2i_r1": "by match",
           "new_t2i_r1": "new names", "t2i_r5": "R@5", "t2i_r10": "R@10", "i2t_r1": "| text R@1",
           "i2t_r1_equal": "equal", "reranked_i2t_r1": "re-ranked", "i2t_r5": "R@5", "i2t_r10": "R@10"}
FALSE_COLUMNS = {"false_caption_accuracy_cosine": "cosine", "false_caption_accuracy": "re-ranked",
                 "false_caption_accuracy_match": "by match"}


def print_scores(name, lines):
    """lines {label: {key: %}} -> a table that ends with chance, and one of false captions where there are any. "equal"
    and "new names" appear where they print another number than the plain R@1."""
    some = next(iter(lines.values()))
    plain = {"equal": lambda key: key.removesuffix("_equal"), "new names": lambda key: "t2i_r1"}
    columns = {key: head for key, head in COLUMNS.items() if any(key in x for x in lines.values()) and not (
        head in plain and all(round(x.get(key, same), 1) == round(same, 1) for x in lines.values()
                             for same in [x[plain[head](key)]]))}
    chance = {key: min(100.0, 100 * int(key.split("_r")[-1]) / some["images"]) for key in columns
              if "equal" not in key and "matched" not in key}                # by match: the cosine chose the K
    print_columns(f"{name}: {some['images']:g} images, {some['n']:g} captions, %", lines | {"chance": chance}, columns)
    if any(FALSE_COLUMNS.keys() & x.keys() for x in lines.values()):
        print_columns(f"{name}: true captions that beat one with a thing swapped, %",
                      lines | {"chance": dict.fromkeys(FALSE_COLUMNS, 50.0)}, FALSE_COLUMNS)


def print_columns(title, lines, columns):
    first, widths = max(map(len, lines)) + 2, [max(5, len(head)) for head in columns.values()]       # 5: 100.0
    print(f"\n{title}\n{'':{first}}" + "  ".join(f"{head:>{w}}" for head, w in zip(columns.values(), widths)))
    for label, x in lines.items():
        cells = (f"{x[key]:.1f}" if key in x else "" for key in columns)
        print(f"{label:{first}}" + "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths)))


def print_table(report):
    """The end-of-run table of a demo_report."""
    for name, groups in report["groups"].items():
        print_scores(name, {f"{GROUPS[group]} ({x['languages']})": x for group, x in groups.items()})
    print("\nimage: a caption asks for its image; text: an image asks for its caption; means over a group's languages."
          "\nR@1 ranks by cosine; re-ranked: cosine and match head together; by match: the head alone, of the 16 best."
          "\nnew names: R@1 of captions that no other training language shares.")


# ------------------------------------------------------------------------------------------------------------------
# One example through every station
# ------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def explain(model, tokenizer, image):
    """Prints what the first pair of an image-text batch (data.Batches) becomes, with real numbers and shapes."""
    words, s, masked, m = tokenizer.pieces, image["b"], image["masked"], image["masked"].positions
    end, hidden = s.starts[1], image["masked"].positions < image["b"].starts[1]
    print(f"a batch         {len(image['ids'])} images {tuple(image['images'].shape)} uint8 and their captions: "
          f"{len(s.token_ids)} words in one row, no padding\n"
          f"caption 0       {' '.join(words(s.token_ids[:end]))}\n"
          f"  as numbers    {s.token_ids[:end].tolist()}, rows 0 to {end - 1}\n"
          f"  some hidden   {' '.join(words(masked.token_ids[:end]))}, hidden rows {m[hidden].tolist()}")
    a = model.encode_image(normalise(image["images"]), image["ids"])
    b, blind = (model.encode_text(w, s.starts, image["ids"]) for w in (s.token_ids, masked.token_ids))
    print(f"view a          image 0: {a.starts[1]} states of width {a.states.shape[1]} "
          f"and one unit vector of {a.vectors.shape[1]}\n"
          f"view b          caption 0: {end} states and one unit vector; "
          f"their cosine is {a.vectors[0] @ b.vectors[0]:.3f}")
    logits = a.vectors @ b.vectors.T / model.temperature
    rank = 1 + int((logits[0] > logits[0, 0]).sum())
    print(f"contrast        cosine / temperature {model.temperature.item():.3f} against all {len(logits)} captions: "
          f"the true one comes {rank}. of {len(logits)}, its probability is {logits[0].softmax(0)[0]:.4f}")
    wrong = hard_negatives(a, b, model.temperature, seed=0)
    masked_text = MaskedText(blind.states, m, masked.labels)
    j = int(wrong[1][0])
    print(f"hard negative   drawn for image 0: caption {j}, {' '.join(words(s.token_ids[s.starts[j]:s.starts[j + 1]]))}")
    pairs, blanks = fuse_pairs(model, a, b, masked_text, wrong)
    sure = model.itm_head(pairs).softmax(-1)[:, 1].view(3, -1)
    print(f"fusion          {4 * len(logits)} query sequences over {len(logits)} images; "
          f"read: {len(pairs)} first words and {len(blanks)} hidden ones\n"
          f"match           probability of belonging together: image 0 with caption 0 {sure[0, 0]:.3f}, "
          f"with caption {j} {sure[2, 0]:.3f}")
    guesses = torch.nn.functional.linear(model.mlm_head(blanks), model.mlm_head.weight, model.mlm_head.bias).softmax(-1)
    for row, guess in zip(m[hidden].tolist(), guesses):
        best = guess.topk(3)
        print(f"mask            row {row} was {words(s.token_ids[row:row + 1])[0]} "
              f"(probability {guess[s.token_ids[row]]:.4f}); best guesses "
              + ", ".join(f"{w} {p:.3f}" for w, p in zip(words(best.indices), best.values.tolist())))
    got = cross_view(model, a, b, masked_text, seed=0)
    print("losses          " + ", ".join(f"{name} {got[name].item():.3f}" for name in ("contrast", "match", "mask")))


# ------------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------------

def check_target(file):
    """ValueError before the work, not after it, when an output file cannot be written."""
    if file and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written")


def evaluation_set(name):
    """'demo:SPLIT' or a JSON-lines file -> list of {"image": RGB image, "captions": {language: [text, ...]}, ...}."""
    return emoji.split(name[5:]) if name.startswith("demo:") else evaluation_rows(name)


def retrieval_command(args, device):
    if args.rerank < 0:
        raise ValueError("--rerank must be 0 (none) or more")
    model, tokenizer = load(args.ckpt, device)
    trained = emoji.languages("seen") + emoji.languages("text_only") if args.data.startswith("demo:") else ()
    scores = retrieval(model, tokenizer, evaluation_set(args.data), args.languages, args.rerank, device,
                       progress=sys.stderr.isatty(), trained=trained)
    groups = group_means(scores) if trained else {}
    means = {f"{GROUPS[group]} ({x['languages']})": x for group, x in groups.items() if x["languages"] > 1}
    print_scores(args.data, scores | means)
    name = args.data.removeprefix("demo:")
    if args.json:
        args.json.write_text(json.dumps({name: scores, "groups": {name: groups}}, indent=1), encoding="utf-8")
        print(f"\nwrote {args.json}")


def main(argv=None):
    """The command line -> exit status; a user's mistake is one line and status 2."""
    parser = data.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{retrieval}")
    score = commands.add_parser("retrieval", help="recall per language, both directions",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    score.set_defaults(run=retrieval_command)
    score.add_argument("--ckpt", required=True, default=argparse.SUPPRESS, help="checkpoint of train.py")
    score.add_argument("--data", default="demo:test_style", help="demo:SPLIT or a JSON-lines file (docs/data.md)")
    score.add_argument("--rerank", type=int, default=16, metavar="K", help="candidates to re-rank; 0: none")
    score.add_argument("--languages", nargs="+", help="only these; None: all that occur")
    score.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all numbers there, as in results.json")
    args = parser.parse_args(argv)
    try:
        check_target(args.json)
        args.run(args, "cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, OSError) as error:
        return data.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
