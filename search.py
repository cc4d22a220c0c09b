"""Pictures of a folder, or those of training data, by sentences in any language.

They are encoded once for all queries; an image's score is its cosine with the query. The best are
printed, and shown in one HTML file with small copies of them. One image at a time is decoded.

Letters: I images, Q queries, E embedding.

    python search.py --ckpt out/ckpt.pt --images photos/ "two dogs and a ball" "zwei Hunde"
"""
import argparse
import base64
import html
import io
import os
import pathlib

import torch

import data
import evaluate
from formats.images import open_image
from formats.records import SUFFIXES, is_picture, reason
from formats.sources import ImageFiles, parse_all

THUMBNAIL = 160                                         # pixels of the longer side
HEAD = ('<!doctype html><meta charset="utf-8"><title>Images by sentences</title>'
        "<style>figure {display: inline-block; vertical-align: top}</style>")


def find_pictures(argument):
    """A folder with pictures, at any depth, or what train.py --images reads -> [(name, function
    without arguments -> path or bytes)]."""
    files = sorted(file for file in pathlib.Path(argument).rglob("*")
                   if is_picture(file) and file.is_file())
    if files:
        return [(str(file), lambda file=file: file) for file in files]
    dataset = ImageFiles(parse_all([argument]), None)
    records = map(dataset.find, range(len(dataset)))
    return [(reader.where(i), lambda reader=reader, i=i: reader.record(i)[0])
            for reader, i in records]


def encode_pictures(model, pictures):
    """-> (those that can be read, their vectors (I, E)). The others are named on stderr."""
    readable = []
    errors = []

    def images():
        for name, read in pictures:
            try:
                image = open_image(read(), model.config.image_size)
            except Exception as error:              # broad for the reasons of records.reading
                errors.append(f"{name}: {reason(error)}")
                continue
            readable.append((name, read))
            yield image

    vectors = [view.vectors for view in evaluate.image_batches(model, images())]
    evaluate.report_bad(errors, len(pictures))
    return readable, torch.cat(vectors)                                      # (I, E)


def check_queries(queries):
    for query in queries:
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        if not query.strip() or query != query.encode(errors="ignore").decode():
            raise ValueError(f"query {query!r} is empty or not UTF-8")


def best_images(model, tokenizer, queries, vectors, top):
    """Image vectors (I, E) -> cosines and numbers of each query's `top` best, two (Q, top)."""
    texts, place = evaluate.encode_texts(model, tokenizer, queries)
    cosine = texts.vectors[place] @ vectors.T                                # (Q, E) -> (Q, I)
    return cosine.topk(min(top, len(vectors)), 1)                            # (Q, I) -> (Q, top)


def figure(rank, score, name, read):
    """A small copy of an image and its caption as HTML; the file's name is escaped."""
    image = open_image(read(), THUMBNAIL)
    png = io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(png, "PNG")
    picture = base64.b64encode(png.getvalue()).decode()
    name = html.escape(os.path.basename(name))
    return (f'<figure><img alt="" src="data:image/png;base64,{picture}">'
            f"<figcaption>{rank}. {name} {score:.3f}</figcaption></figure>")


@torch.inference_mode()
def search(args, device):
    if args.top < 1:
        raise ValueError(f"--top {args.top} must be at least 1")
    check_queries(args.queries)
    found = find_pictures(args.images)
    model, tokenizer, _ = evaluate.load(args.ckpt, device)
    pictures, vectors = encode_pictures(model, found)
    cosines, images = best_images(model, tokenizer, args.queries, vectors, args.top)
    page = [HEAD]
    lines = []
    longest = evaluate.longest_text(model)
    for query, scores, numbers in zip(args.queries, cosines.tolist(), images.tolist()):
        if len(tokenizer.encode(query, None)) > longest:
            query += f" (cut at {longest} tokens)"
        lines.append(query)
        page.append(f'<h2 dir="auto">{html.escape(query)}</h2>')
        for rank, (score, i) in enumerate(zip(scores, numbers), 1):
            lines.append(f"{rank:4}  {score:6.3f}  {pictures[i][0]}")
            page.append(figure(rank, score, *pictures[i]))
    # Before the lines, whose reader may end (| head). A name that is not UTF-8 is escaped.
    data.write_output(args.html, "\n".join(page).encode("utf-8", "backslashreplace"))
    print(*lines, f"\nwrote {args.html}", sep="\n")


def main(argv=None):
    """The command line -> exit status; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", nargs="+", help="sentences in any language")
    parser.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of "
                        + " ".join(SUFFIXES) + ", or files that train.py --images reads")
    parser.add_argument("--top", type=int, default=5, help="images per query (default: 5)")
    parser.add_argument("--html", type=pathlib.Path, default="gallery.html", metavar="FILE",
                        help="the gallery (default: gallery.html)")
    args = parser.parse_args(argv)
    try:
        data.check_target(args.html)
        search(args, "cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, OSError) as error:
        return data.fail(error)
    return 0


if __name__ == "__main__":
    data.run(main)
