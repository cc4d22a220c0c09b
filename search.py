"""Pictures of a folder, or those of training data, by sentences in any language.

A picture's score is its cosine with the query. The best are printed, and shown in one HTML file
with small copies of them. --serve opens a page for this computer instead (serve.py). The pictures'
vectors are kept in a file beside the folder: the next start encodes what is new or changed. One
picture at a time is decoded.

Letters: I pictures, Q queries, E embedding.

    python search.py --ckpt out/ckpt.pt --images photos/ "two dogs and a ball" "zwei Hunde"
    python search.py --ckpt out/ckpt.pt --images photos/ --serve
    python search.py --ckpt out/ckpt.pt --images photos/ --features vectors.npz
"""
import argparse
import hashlib
import html
import io
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import data
import evaluate
import serve
from formats.images import open_image
from formats.records import (SUFFIXES, BadRecord, is_picture, place_beside, printable, reason,
                             stamp_of)
from formats.sources import ImageFiles, parse_all

THUMBNAIL = 160                         # pixels of the longer side, in the gallery
PORT = 8000                             # of --serve

# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------

class Picture(NamedTuple):
    name: str                           # its path, or the file that holds it and where
    stamp: list                         # size and time of that file
    read: Callable                      # without arguments -> path or bytes


def find_pictures(argument, cache=None):
    """A folder with pictures, at any depth, or what train.py --images reads -> [Picture]."""
    files = sorted(file for file in pathlib.Path(argument).rglob("*")
                   if is_picture(file) and file.is_file())
    if files:
        return [Picture(str(file), stamp_of(file.stat()), lambda file=file: file)
                for file in files]
    dataset = ImageFiles(parse_all([argument]), None, cache=cache)
    # Several records may be captions of one picture: the first counts. Bad ones stay, to be named.
    first = {}
    for index in range(len(dataset)):
        first.setdefault(dataset.picture(index) or index, dataset.find(index))
    return [Picture(reader.where(i), reader.stamp, lambda reader=reader, i=i: reader.record(i)[0])
            for reader, i in first.values()]


def read_picture(picture, size):
    """-> RGB image, not below twice `size` where it is larger. BadRecord."""
    try:
        return open_image(picture.read(), size)
    except Exception as error:                  # broad for the reasons of records.reading
        raise BadRecord(f"{printable(picture.name)}: {reason(error)}") from error


@torch.inference_mode()
def encode_pictures(model, pictures, bad):
    """Yields the pictures that can be read, each with its vector (E,). Why the others cannot goes
    to the list `bad`."""
    good = []
    images = evaluate.readable(lambda picture: read_picture(picture, model.config.image_size),
                               evaluate.bar(pictures, "pictures"), good, bad)
    for view in evaluate.image_batches(model, images):
        yield from zip(good[-len(view.vectors):], view.vectors.cpu().numpy())


# --------------------------------------------------------------------------------------------------
# The index: their vectors, on disk
# --------------------------------------------------------------------------------------------------

def fingerprint(model):
    """Of what decides an image's vector: another checkpoint has another one."""
    digest = hashlib.sha1(repr(model.config).encode())
    for part in (model.vision, model.vision_proj):
        for parameter in part.state_dict().values():
            digest.update(parameter.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def read_index(place, model_print):
    """-> {key: vector (E,)}; empty where the index is missing, damaged or of another model."""
    try:
        with np.load(place) as index:
            if index["model"] == model_print:
                return dict(zip(index["keys"].tolist(), index["vectors"], strict=True))
    except Exception:                           # broad: a damaged archive raises almost anything
        pass
    return {}


def write_arrays(file, **arrays):
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    data.write_output(file, raw.getbuffer())


def index_pictures(model, pictures, place):
    """-> (the pictures that can be read, their vectors (I, E)). Encodes only those that the index
    at `place` lacks. Then the index holds these pictures and no others."""
    # A key: the path as seen from the index, and what changes when the file does.
    keys = {picture.name: f"{os.path.relpath(picture.name, place.parent)} {picture.stamp}"
            for picture in pictures}
    model_print = fingerprint(model)
    before = read_index(place, model_print)
    index = {key: before[key] for key in keys.values() if key in before}
    new = [picture for picture in pictures if keys[picture.name] not in index]
    bad = []
    try:
        for picture, vector in encode_pictures(model, new, bad):
            index[keys[picture.name]] = vector
    finally:                                    # Ctrl-C keeps what is done
        if index and index.keys() != before.keys():
            write_arrays(place, model=model_print, keys=list(index),
                         vectors=np.stack(list(index.values())))
    evaluate.report_bad(bad, len(pictures))
    good = [picture for picture in pictures if keys[picture.name] in index]
    vectors = np.stack([index[keys[picture.name]] for picture in good])
    return good, torch.from_numpy(vectors)                                   # (I, E)


# --------------------------------------------------------------------------------------------------
# Ask
# --------------------------------------------------------------------------------------------------

class Library(NamedTuple):
    """Pictures to ask for. A number is a picture's place in the list."""
    model: torch.nn.Module
    tokenizer: data.Tokenizer
    pictures: list
    vectors: torch.Tensor               # (I, E)

    @torch.inference_mode()
    def best(self, queries, top):
        """[(cosine, number)] of the `top` best pictures, for each query."""
        texts, place = evaluate.encode_texts(self.model, self.tokenizer, queries)
        return self.nearest(texts.vectors[place].cpu(), top)

    def like(self, number, top):
        """The same for a picture, which comes first itself."""
        return self.nearest(self.vectors[number:number + 1], top)[0]

    def nearest(self, vectors, top):
        cosine = vectors @ self.vectors.T                                    # (Q, E) -> (Q, I)
        best = cosine.topk(min(top, len(self.vectors)), 1)                   # (Q, I) -> (Q, top)
        return [list(zip(*hits)) for hits in zip(best.values.tolist(), best.indices.tolist())]

    def image(self, number, size):
        """A small copy: RGB, at most `size` pixels on its longer side. BadRecord."""
        image = read_picture(self.pictures[number], size)
        image.thumbnail((size, size))
        return image

    def map(self, kind, number, query, size):
        """The same, bright where a map of evaluate is high. kind: "cosine" or "attention"."""
        make = {"cosine": evaluate.cosine_map, "attention": evaluate.attention_map}[kind]
        image = self.image(number, size)
        return evaluate.lit(image, make(self.model, self.tokenizer, image, query))

    def name(self, number):
        return printable(os.path.basename(self.pictures[number].name))

    def heading(self, query):
        """The query, and that it is cut, where it is."""
        longest = evaluate.longest_text(self.model)
        is_cut = len(self.tokenizer.encode(query, None)) > longest
        return f"{query} (cut at {longest} tokens)" if is_cut else query


def open_library(args, device):
    """Reads the checkpoint and indexes the pictures."""
    origin = args.images
    if not os.path.exists(origin):                                           # a pattern
        origin = parse_all([origin])[0].files[0]
    if args.cache:
        os.makedirs(args.cache, exist_ok=True)
    place = pathlib.Path(place_beside(origin, ".vectors.npz", args.cache))
    if not os.access(place.parent, os.W_OK):
        raise ValueError(f"index {place} cannot be written: name a folder with --cache")
    found = find_pictures(args.images, args.cache)
    model, tokenizer, _ = evaluate.load(args.ckpt, device)
    return Library(model, tokenizer, *index_pictures(model, found, place))


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------

def check_queries(queries):
    for query in queries:
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        if not query.strip() or query != query.encode(errors="ignore").decode():
            raise ValueError(f"query {query!r} is empty or not UTF-8")


def answer_queries(library, queries, top, file):
    """Prints the best pictures of each query and writes the gallery."""
    body = []
    lines = []
    for query, hits in zip(queries, library.best(queries, top)):
        heading = library.heading(query)
        lines.append(heading)
        figures = []
        for rank, (cosine, number) in enumerate(hits, 1):
            lines.append(f"{rank:4}  {cosine:6.3f}  {library.pictures[number].name}")
            name = library.name(number)
            source = serve.picture_url(library.image(number, THUMBNAIL))
            figures.append(serve.figure(source, name, f"{rank}. {html.escape(name)} {cosine:.3f}"))
        body.append(serve.results(heading, figures))
    # Before the lines, whose reader may end (| head).
    page = serve.page("Pictures by sentences", "".join(body))
    data.write_output(file, page.encode())
    print(*lines, f"\nwrote {file}", sep="\n")


def search(args, device):
    if args.top < 1:
        raise ValueError(f"--top {args.top} must be at least 1")
    check_queries(args.queries)
    if args.serve is not None:                  # before the work: is the port free?
        serve.open_server(args.serve).server_close()
    library = open_library(args, device)
    if args.features:
        write_arrays(args.features, names=[picture.name for picture in library.pictures],
                     vectors=library.vectors.numpy())
        print(f"wrote {args.features}")
    if args.queries:
        answer_queries(library, args.queries, args.top, args.html)
    if args.serve is not None:
        with serve.open_server(args.serve, library) as server:
            print(f"{len(library.pictures):,} pictures at http://127.0.0.1:{server.server_port}/ "
                  "(Ctrl-C ends it)", flush=True)
            server.serve_forever()


def main(argv=None):
    """The command line -> exit status; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("queries", nargs="*", help="sentences in any language")
    add("--ckpt", required=True, help="checkpoint of train.py or weights.py import")
    add("--images", required=True, metavar="DIR", help="folder of " + " ".join(SUFFIXES)
        + ", or files that train.py --images reads")
    add("--top", type=int, default=5, help="pictures per query (default: 5)")
    add("--html", type=pathlib.Path, default="gallery.html", metavar="FILE",
        help="the gallery (default: gallery.html)")
    add("--serve", type=int, nargs="?", const=PORT, metavar="PORT",
        help=f"open a page at http://127.0.0.1:PORT/ (default: {PORT})")
    add("--features", type=pathlib.Path, metavar="FILE",
        help="write names and vectors, for numpy.load")
    add("--cache", metavar="DIR", help="folder of the index (default: beside that of the pictures)")
    args = parser.parse_args(argv)
    if not args.queries and args.serve is None and not args.features:
        parser.error("there are no queries: name some, or --serve, or --features FILE")
    try:
        if args.queries:
            data.check_target(args.html)
        data.check_target(args.features)
        search(args, "cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, OSError, BadRecord) as error:
        return data.fail(error)
    return 0


if __name__ == "__main__":
    data.run(main)
