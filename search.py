"""Pictures of a folder by sentences in any language.

    python search.py --ckpt out/ckpt.pt --images photos/ "two dogs and a ball" "zwei Hunde und ein Ball"
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

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")                                # what is taken for an image


def read_images(files):
    """-> (the files that can be read, their images, what was wrong with the others)"""
    read, wrong = [], []
    for file in files:
        try:
            read.append((file, open_image(file)))
        except ValueError as error:
            wrong.append(str(error))
    return [file for file, _ in read], [image for _, image in read], wrong


@torch.inference_mode()
def search(args, device, batch=256):
    files = sorted(f for f in args.images.iterdir() if f.suffix.lower() in SUFFIXES) if args.images.is_dir() else []
    if not files:
        raise ValueError(f"{args.images} is not a folder with images ({' '.join(SUFFIXES)})")
    if args.top < 1:
        raise ValueError(f"--top {args.top} must be at least 1")
    for query in args.queries:
        if not query.strip() or query != query.encode(errors="ignore").decode():
            raise ValueError(f"query {query!r} is empty or not UTF-8")
    model, tokenizer = evaluate.load(args.ckpt, device)
    parts = [read_images(files[i:i + batch]) for i in range(0, len(files), batch)]
    files, wrong = ([x for part in parts for x in part[k]] for k in (0, 2))
    if not files:
        raise ValueError(f"no image in {args.images} can be read: {wrong[0]}")
    for reason in wrong:
        print("left out:", reason, file=sys.stderr)
    images = torch.cat([evaluate.encode_images(model, part[1], device, batch).vectors for part in parts if part[1]])
    texts, place = evaluate.encode_texts(model, tokenizer, args.queries, device, batch)
    scores, best = (texts.vectors @ images.T)[place].topk(min(args.top, len(files)), 1)
    page = ['<!doctype html><meta charset="utf-8"><title>Images by sentences</title>'
            "<style>figure {display: inline-block; vertical-align: top}</style>"]
    for query, *hits in zip(args.queries, scores.tolist(), best.tolist()):
        cut = f" (cut at {64} tokens)" * (len(tokenizer.encode(query, None)) > 64)
        print(query + cut)
        page.append(f'<h2 dir="auto">{html.escape(query + cut)}</h2>')
        for rank, (score, i) in enumerate(zip(*hits), 1):
            print(f"{rank:4}  {score:6.3f}  {files[i]}")
            image, out = open_image(files[i]), io.BytesIO()
            image.thumbnail((160, 160))
            image.save(out, "PNG")
            page.append(f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'
                        f"<figcaption>{rank}. {html.escape(files[i].name)} {score:.3f}</figcaption></figure>")
    args.html.write_text("\n".join(page), encoding="utf-8")             # one file: the pictures are inside
    print(f"\nwrote {args.html}")


def main(argv=None):
    """The command line -> exit status; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", nargs="+", help="sentences in any language")
    parser.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    parser.add_argument("--images", type=pathlib.Path, required=True, metavar="DIR",
                        help="folder of " + " ".join(SUFFIXES))
    parser.add_argument("--top", type=int, default=5, help="images per query (default: 5)")
    parser.add_argument("--html", type=pathlib.Path, default="gallery.html", metavar="FILE",
                        help="the gallery (default: gallery.html)")
    args = parser.parse_args(argv)
    try:
        evaluate.check_target(args.html)
        search(args, "cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, OSError) as error:
        return data.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
