"""One example of each stream at every station of a step, with real tokens, shapes and numbers.

    python train.py --explain                      of the run in out/, or of a new model
    python train.py --explain --html explain.html  the same as a page, with the pictures

Below the two encoders both streams go through the same lines: that is the paper.
Letters: B items of a batch, E embedding, V vocabulary, M masked tokens.
"""
import base64
import html
import io
import math
import pathlib
import textwrap

import torch
import torch.nn.functional as F
from PIL import Image

from formats.images import normalise
from losses import MaskedText, cross_view, fuse_pairs, hard_negatives

WIDTH = 100                             # columns: it fits a projector
MATRIX = 8                              # items whose cosines are shown


# --------------------------------------------------------------------------------------------------
# Stations
# --------------------------------------------------------------------------------------------------

class Sentence:
    """Number i of packed sentences, for a reader."""

    def __init__(self, tokenizer, sentences, i):
        self.first, self.end = sentences.starts[i:i + 2].tolist()
        self.ids = sentences.token_ids[self.first:self.end]
        self.text = " ".join(tokenizer.pieces(self.ids))


def stations(model, tokenizer, batch, name, seed):
    """Yields (station, text) for the first pair of a batch of data.Batches, an image and its
    caption or a sentence and its translation. name: of the stream."""
    yield from received(tokenizer, batch)
    # The encoders. From here on it does not matter what a is.
    ids, b_tokens, masked = batch["ids"], batch["b"], batch["masked"]
    a = encode_a(model, batch)
    b = model.encode_text(b_tokens.token_ids, b_tokens.starts, ids)
    states = model.encode_text(masked.token_ids, b_tokens.starts, ids).states
    masked_text = MaskedText(states, masked.positions, masked.labels)
    for side, view in (("a", a), ("b", b)):
        yield f"view {side}", (f"states {shape(view.states)}, of which {side} 0 has "
                               f"{view.starts[1].item()} rows; unit vectors {shape(view.vectors)}")
    negatives = hard_negatives(a, b, model.temperature, seed)
    yield from contrasted(model, tokenizer, b_tokens, a, b, negatives)
    yield from fused(model, tokenizer, b_tokens, a, b, masked_text, negatives)
    # The losses of the whole batch, each beside what a model gets that knows nothing.
    found = cross_view(model, a, b, masked_text, seed, negatives)
    chance = {"contrast": math.log(len(ids)), "match": 0.6365, "mask": math.log(tokenizer.size)}
    for loss, value in chance.items():
        yield "loss", f"{name}_{loss} {found[loss].item():.3f} (knows nothing: {value:.3f})"


def received(tokenizer, batch):
    """What the data workers sent."""
    B = len(batch["ids"])
    own = Sentence(tokenizer, batch["b"], 0)
    if "images" in batch:
        yield "batch", f"{B} images {shape(batch['images'])} uint8, their captions and ids"
    else:
        yield "batch", f"{B} pairs of sentences, in two random languages each, and their ids"
        yield "a", Sentence(tokenizer, batch["a"], 0).text
    yield "b", own.text
    yield "packed", (f"all {B} b are ONE row of {len(batch['b'].token_ids)} tokens, without "
                     f"padding; b 0 is tokens 0 to {own.end - 1} of it, {own.ids.tolist()}")
    hidden = " ".join(tokenizer.pieces(batch["masked"].token_ids[:own.end]))
    yield "masked", f"{hidden}   (positions {masked_of(batch['masked'], own)} of the row)"


def masked_of(masked, sentence):
    """The masked positions of the first sentence."""
    return masked.positions[masked.positions < sentence.end].tolist()


def encode_a(model, batch):
    if "images" in batch:
        return model.encode_image(normalise(batch["images"]), batch["ids"])
    return model.encode_text(batch["a"].token_ids, batch["a"].starts, batch["ids"])


def contrasted(model, tokenizer, b_tokens, a, b, negatives):
    """Each a looks for its b among all, and each b for its a. Hard negatives are drawn where the
    cosine is high."""
    B = len(a.vectors)
    cosine = a.vectors @ b.vectors.T                                         # (B, B)
    logits = cosine / model.temperature
    rank = 1 + int((logits[0] > logits[0, 0]).sum())
    yield "cosine", (f"of a 0 with b 0: {cosine[0, 0]:.3f}; divided by the temperature "
                     f"{model.temperature.item():.4f}: {logits[0, 0]:.1f}")
    yield "contrast", (f"among all {B} b, the true one comes {rank}. for a 0; its probability is "
                       f"{logits[0].softmax(0)[0]:.4f} (that of a guess: {1 / B:.4f})")
    j, k = (int(wrong[0]) for wrong in negatives)
    if min(j, k) >= 0:
        yield "negative a", f"for b 0, a {j} is drawn (cosine {cosine[j, 0]:.3f})"
        yield "negative b", (f"for a 0, b {k} is drawn (cosine {cosine[0, k]:.3f}): "
                             f"{Sentence(tokenizer, b_tokens, k).text}")


def fused(model, tokenizer, b_tokens, a, b, masked_text, negatives):
    """What the fusion encoder reads, and what its two heads say of it."""
    B = len(a.vectors)
    pairs, states = fuse_pairs(model, a, b, masked_text, negatives)
    yield "fusion", (f"{3 * B} pairs and {B} masked sentences are {4 * B} query sequences, which "
                     f"read the {B} a; the heads see {len(pairs)} first tokens and {len(states)} "
                     f"masked ones")
    j, k = (int(wrong[0]) for wrong in negatives)
    yes = model.itm_head(pairs).softmax(-1)[:, 1].view(3, B)                 # (3B, 2) -> (3, B)
    yield "match", (f"do they belong together? a 0 and b 0: {yes[0, 0]:.3f}; a {j} and b 0: "
                    f"{yes[1, 0]:.3f}; a 0 and b {k}: {yes[2, 0]:.3f} (a guess: 0.333)")
    # Masked tokens of b 0, predicted from what is left of it and from a.
    head = model.mlm_head
    guesses = F.linear(head(states), head.weight, head.bias).softmax(-1)     # (M, D) -> (M, V)
    positions = masked_of(masked_text, Sentence(tokenizer, b_tokens, 0))
    for position, guess in zip(positions, guesses):
        label = int(b_tokens.token_ids[position])
        best = guess.topk(3)
        pieces = tokenizer.pieces([label, *best.indices.tolist()])
        named = ", ".join(f"{piece} {p:.3f}" for piece, p in zip(pieces[1:], best.values))
        yield "mask", (f"position {position} was {pieces[0]}, its probability is "
                       f"{guess[label]:.4f}; the best guesses: {named}")


def shape(x):
    return "(" + ", ".join(map(str, x.shape)) + ")"


def explain(objective, image, text, gradient_norms, page=None):
    """Prints the stations of both streams (text may be None), and what the sum of their losses
    gives each tower. gradient_norms: train.py's. page: also written there, as HTML."""
    sections = []
    for name, batch in (("image", image), ("text", text)):
        if batch:
            with torch.no_grad():
                model = objective.model if name == "image" else objective.model.for_parallel_text()
                found = list(stations(model, objective.tokenizer, batch, name, seed=0))
            sections.append((name, batch, found))
    loss, _ = objective(image, text, seed=0)
    loss.backward()
    norms = ", ".join(f"{name.removeprefix('norm_')} {norm.item():.2f}"
                      for name, norm in gradient_norms(objective).items())
    end = [("gradient", f"of the sum of all losses, {loss.item():.3f}; its norm: {norms}")]

    for name, _, found in (*sections, ("both streams", None, end)):
        print(f"\n{name}")
        for station, what in found:
            indent = " " * 13
            lines = textwrap.wrap(what, WIDTH - len(indent), break_long_words=False)
            print(f"{station:11}  " + f"\n{indent}".join(lines))
    if page:
        pathlib.Path(page).write_text(page_of(objective, sections, end), encoding="utf-8")
        print(f"\nwrote {page}")


# --------------------------------------------------------------------------------------------------
# Page
# --------------------------------------------------------------------------------------------------

STYLE = """:root {color-scheme: light dark}
body {font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem}
dl {display: grid; grid-template-columns: 7rem 1fr; gap: .25rem 1rem}
dt {font-weight: bold} dd {margin: 0; overflow-wrap: anywhere}
table {border-collapse: collapse; font-size: .8rem} td, th {padding: .2rem .4rem; text-align: right}
img {width: 64px; image-rendering: pixelated; vertical-align: middle} .scroll {overflow-x: auto}
@media (max-width: 40rem) {dl {grid-template-columns: 1fr}}"""


def picture_of(pixels, label):
    """(3, s, s) uint8 -> an <img> that holds it."""
    out = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(out, "PNG")
    return (f'<img alt="{html.escape(label)}" src="data:image/png;base64,'
            f'{base64.b64encode(out.getvalue()).decode()}">')


@torch.no_grad()
def matrix_of(objective, batch):
    """The cosines of the first a and b of a batch, as a table: the diagonal should be darkest."""
    model, tokenizer = objective.model, objective.tokenizer
    n = min(MATRIX, len(batch["ids"]))
    a = encode_a(model, batch)
    b = model.encode_text(batch["b"].token_ids, batch["b"].starts, batch["ids"])
    if "images" in batch:
        heads = [picture_of(batch["images"][i], f"image {i}") for i in range(n)]
    else:
        heads = [html.escape(Sentence(tokenizer, batch["a"], i).text) for i in range(n)]
    rows = ["<tr><th></th>" + "".join(f"<th>b {j}</th>" for j in range(n)) + "</tr>"]
    for i, cosines in enumerate((a.vectors[:n] @ b.vectors[:n].T).tolist()):
        cells = "".join(f'<td style="background: rgb(128 160 255 / {max(0, cosine):.2f})">'
                        f"{cosine:.2f}</td>" for cosine in cosines)
        rows.append(f"<tr><th>{heads[i]}</th>{cells}</tr>")
    captions = "".join(f"<li value={j}>{html.escape(Sentence(tokenizer, batch['b'], j).text)}"
                       for j in range(n))
    return (f'<div class="scroll"><table>{"".join(rows)}</table></div>'
            f"<p>Cosine of a (rows) and b (columns):</p><ol>{captions}</ol>")


def page_of(objective, sections, end):
    """-> the HTML of both streams, a table of cosines after each."""
    parts = ['<!doctype html><html lang="en"><meta charset="utf-8">'
             '<meta name="viewport" content="width=device-width">'
             f"<title>One example, step by step</title><style>{STYLE}</style>"
             "<h1>One example, step by step</h1>"]
    for name, batch, found in (*sections, ("both streams", None, end)):
        rows = "".join(f"<dt>{station}<dd>{html.escape(what)}" for station, what in found)
        parts.append(f"<h2>{name}</h2><dl>{rows}</dl>")
        if batch:
            parts.append(matrix_of(objective, batch))
    return "\n".join(parts) + "\n"
