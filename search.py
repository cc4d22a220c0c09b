"""Pictures of a folder by sentences in any language.

A folder is encoded once for all queries; an image's score is its cosine with the query. The best
are printed, and shown in one HTML file with small copies of them.

Letters: I images, Q queries, E embedding.

    python search.py --ckpt out/ckpt.pt --images photos/ "two dogs and a ball" "zwei Hunde"
"""
import argparse
import base64
import html
import io
import pathlib
import sys

import torch

import data
import evaluate
from formats.images import open_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")           # what is taken for an image
HEAD = ('<!doctype html><meta charset="utf-8"><title>Images by sentences</title>'
        "<style>figure {display: inline-block; vertical-align: top}</style>")


def image_files(folder):
    """The images of a folder, sorted by name; ValueError where there are none."""
    files = []
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder} is not a folder with images ({' '.join(SUFFIXES)})")
    return files


def encode_folder(model, files):
    """Files -> (those that can be read, their vectors (I, E)). The others are named on stderr;
    ValueError where none can be read."""
    readable, vectors, errors = [], [], []
    # One batch at a time: the decoded images of a large folder do not fit into memory together.
    for first in range(0, len(files), evaluate.BATCH):
        images = []
        for file in files[first:first + evaluate.BATCH]:
            try:
                images.append(open_image(file))
                readable.append(file)
            except ValueError as error:
                errors.append(error)
        if images:
            vectors.append(evaluate.encode_images(model, images).vectors)    # (<= BATCH, E)
    if not readable:
        raise ValueError(f"no image can be read: {errors[0]}")
    for error in errors:
        print("left out:", error, file=sys.stderr)
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


def figure(rank, score, file):
    """A small copy of an image and its caption as HTML; the file's name is escaped."""
    image = open_image(file)
    png = io.BytesIO()
    image.thumbnail((160, 160))
    image.save(png, "PNG")
    picture = base64.b64encode(png.getvalue()).decode()
    return (f'<figure><img alt="" src="data:image/png;base64,{picture}">'
            f"<figcaption>{rank}. {html.escape(file.name)} {score:.3f}</figcaption></figure>")


@torch.inference_mode()
def search(args, device):
    files = image_files(args.images)
    if args.top < 1:
        raise ValueError(f"--top {args.top} must be at least 1")
    check_queries(args.queries)
    model, tokenizer = evaluate.load(args.ckpt, device)
    files, vectors = encode_folder(model, files)
    cosines, images = best_images(model, tokenizer, args.queries, vectors, args.top)
    page = [HEAD]
    longest = evaluate.longest_text(model)
    for query, scores, numbers in zip(args.queries, cosines.tolist(), images.tolist()):
        if len(tokenizer.encode(query, None)) > longest:
            query += f" (cut at {longest} tokens)"
        print(query)
        page.append(f'<h2 dir="auto">{html.escape(query)}</h2>')
        for rank, (score, i) in enumerate(zip(scores, numbers), 1):
            print(f"{rank:4}  {score:6.3f}  {files[i]}")
            page.append(figure(rank, score, files[i]))
    args.html.write_text("\n".join(page), encoding="utf-8")
    print(f"\nwrote {args.html}")


def main(argv=None):
    """The command line -> exit status; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", nargs="+", help="sentences in any language")
    parser.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    parser.add_argument("--images", type=pathlib.Path, required=True, metavar="DIR",
                        help="folder of " + " ".join(SUFFIXES))
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
    sys.exit(main())
