"""Pictures of a folder, or those of training data, by sentences in any language.

They are encoded once: vectors and names are kept in a file beside the folder, and the next start
encodes only what is new or changed. A picture's score is its cosine with the query. The best are
printed, and shown in one HTML file with small copies of them. --serve opens a page for this
computer instead: results as you type, pictures that are like another, and which part of a picture
speaks for the query. One picture at a time is decoded.

Letters: I pictures, Q queries, E embedding.

    python search.py --ckpt out/ckpt.pt --images photos/ "two dogs and a ball" "zwei Hunde"
    python search.py --ckpt out/ckpt.pt --images photos/ --serve
    python search.py --ckpt out/ckpt.pt --images photos/ --features vectors.npz
"""
import argparse
import functools
import hashlib
import html
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import data
import evaluate
import serve
from formats.images import open_image
from formats.records import (SUFFIXES, BadRecord, is_picture, place_beside, printable, reason,
                             replacing, stamp_of)
from formats.sources import ImageFiles, parse_all

THUMBNAIL = 160                         # pixels of the longer side, in the gallery
PORT = 8000                             # of --serve
DARK = 0.2                              # brightness where a map is lowest

# --------------------------------------------------------------------------------------------------
# Find
# --------------------------------------------------------------------------------------------------

class Picture(NamedTuple):
    name: str                           # its path, or the file that holds it and where
    stamp: tuple                        # size and time of that file
    read: Callable                      # without arguments -> path or bytes


def find_pictures(argument):
    """A folder with pictures, at any depth, or what train.py --images reads -> [Picture]."""
    files = sorted(file for file in pathlib.Path(argument).rglob("*")
                   if is_picture(file) and file.is_file())
    if files:
        return [Picture(str(file), tuple(stamp_of(file.stat())), lambda file=file: file)
                for file in files]
    dataset = ImageFiles(parse_all([argument]), None)
    records = map(dataset.find, range(len(dataset)))
    return [Picture(reader.where(i), tuple(reader.stamp),
                    lambda reader=reader, i=i: reader.record(i)[0]) for reader, i in records]


def read_picture(picture, size):
    """-> RGB image, not below twice `size` where it is larger. BadRecord."""
    try:
        return open_image(picture.read(), size)
    except Exception as error:                  # broad for the reasons of records.reading
        raise BadRecord(f"{printable(picture.name)}: {reason(error)}") from error


# --------------------------------------------------------------------------------------------------
# The index: vectors of pictures, kept on disk
# --------------------------------------------------------------------------------------------------

def fingerprint(model):
    """Of what decides an image's vector: another model, or a later checkpoint, has another one."""
    digest = hashlib.sha1(repr(model.config).encode())
    for part in (model.vision, model.vision_proj):
        for parameter in part.state_dict().values():
            digest.update(parameter.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def read_index(place, model):
    """{(name, *stamp): vector (E,)}. Empty where there is no index, a damaged one, or one of
    another model."""
    try:
        with np.load(place) as index:
            if index["model"] == model:
                keys = zip(index["names"].tolist(), *index["stamps"].T.tolist())
                return dict(zip(keys, index["vectors"], strict=True))        # (I, E) -> I of (E,)
    except Exception:                           # broad: a damaged archive raises almost anything
        pass
    return {}


def write_index(place, model, vectors):
    """vectors {(name, *stamp): vector (E,)}"""
    names, *stamps = zip(*vectors)
    with replacing(place) as file:
        np.savez(file, model=model, names=names, stamps=np.stack(stamps, 1),
                 vectors=np.stack(list(vectors.values())))                   # (I, E)


def encode_pictures(model, pictures, good, bad):
    """Yields (picture, vector (E,)). What can be read goes to the list `good`; where a picture
    cannot, the reason goes to the list `bad`."""
    read = functools.partial(read_picture, size=model.config.image_size)
    images = evaluate.readable(read, evaluate.bar(pictures, "pictures"), good, bad)
    with torch.inference_mode():
        for view in evaluate.image_batches(model, images):
            yield from zip(good[-len(view.vectors):], view.vectors.cpu().numpy())


def index_pictures(model, pictures, place):
    """-> (the pictures that can be read, their vectors (I, E)). Only those are encoded that the
    index at `place` does not hold; then it holds these pictures and no others. Those that cannot
    be read are named on stderr."""
    # Where a picture lies, seen from the index, and a stamp that changes when its file does.
    folder = os.path.dirname(os.path.abspath(place))
    keys = {picture.name: (os.path.relpath(picture.name, folder), *picture.stamp)
            for picture in pictures}
    model_print = fingerprint(model)
    index = read_index(place, model_print)
    new = [picture for picture in pictures if keys[picture.name] not in index]
    changed = bool(index.keys() - keys.values())
    bad = []
    try:
        for picture, vector in encode_pictures(model, new, [], bad):
            index[keys[picture.name]] = vector
            changed = True
    finally:                                    # Ctrl-C keeps what is done
        index = {key: index[key] for key in keys.values() if key in index}
        if index and changed:
            write_index(place, model_print, index)
    evaluate.report_bad(bad, len(pictures))
    good = [picture for picture in pictures if keys[picture.name] in index]
    return good, torch.from_numpy(np.stack(list(index.values())))            # (I, E)


# --------------------------------------------------------------------------------------------------
# Ask
# --------------------------------------------------------------------------------------------------

class Library(NamedTuple):
    """Pictures to ask for. A number is a picture's place in the list."""
    model: torch.nn.Module
    tokenizer: data.Tokenizer
    pictures: list
    vectors: torch.Tensor               # (I, E)

    def best(self, queries, top):
        """[(cosine, number)] of the `top` best pictures, for each query."""
        with torch.inference_mode():
            texts, place = evaluate.encode_texts(self.model, self.tokenizer, queries)
            return self.nearest(texts.vectors[place].cpu(), top)

    def like(self, number, top):
        """The same for a picture; it comes first itself."""
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
        """The picture, darkened where a map of evaluate is low. kind: "cosine" or "attention"."""
        image = self.image(number, size)
        maps = {"cosine": evaluate.cosine_map, "attention": evaluate.attention_map}
        parts = maps[kind](self.model, self.tokenizer, image, query)         # (side, side)
        parts = parts.clamp(min=0) / parts.max().clamp(min=1e-9)
        light = Image.fromarray((255 * parts).byte().cpu().numpy()).resize(image.size)
        return Image.composite(image, image.point(lambda value: DARK * value), light)

    def name(self, number):
        return printable(os.path.basename(self.pictures[number].name))

    def told(self, query):
        """The query, and that it is cut, where it is."""
        longest = evaluate.longest_text(self.model)
        if len(self.tokenizer.encode(query, None)) <= longest:
            return query
        return f"{query} (cut at {longest} tokens)"


def open_library(args, device):
    """Reads the checkpoint, and indexes the pictures."""
    origin = args.images
    if not os.path.exists(origin):                                           # a pattern
        origin = parse_all([origin])[0].files[0]
    place = place_beside(origin, ".vectors.npz", args.cache)
    found = find_pictures(args.images)
    model, tokenizer, _ = evaluate.load(args.ckpt, device)
    try:
        pictures, vectors = index_pictures(model, found, place)
    except OSError as error:
        raise ValueError(f"index {place} cannot be written ({error.strerror}): name a folder with "
                         f"--cache") from None
    return Library(model, tokenizer, pictures, vectors)


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
        told = library.told(query)
        lines.append(told)
        figures = []
        for rank, (cosine, number) in enumerate(hits, 1):
            lines.append(f"{rank:4}  {cosine:6.3f}  {library.pictures[number].name}")
            name = library.name(number)
            source = serve.picture_url(library.image(number, THUMBNAIL))
            figures.append(serve.figure(source, name, f"{rank}. {html.escape(name)} {cosine:.3f}"))
        body.append(serve.results(told, figures))
    # Before the lines, whose reader may end (| head).
    page = serve.page("Pictures by sentences", "".join(body))
    data.write_output(file, page.encode())
    print(*lines, f"\nwrote {file}", sep="\n")


def run_server(library, port):
    with serve.open_server(port) as server:
        server.site = serve.Site(library)
        print(f"{len(library.pictures):,} pictures at http://127.0.0.1:{server.server_port}/ "
              "(Ctrl-C ends it)", flush=True)
        server.serve_forever()


def search(args, device):
    if args.top < 1:
        raise ValueError(f"--top {args.top} must be at least 1")
    check_queries(args.queries)
    if args.serve is not None:                  # before the work: is the port free?
        serve.open_server(args.serve).server_close()
    library = open_library(args, device)
    if args.features:
        names = [(picture.name, *picture.stamp) for picture in library.pictures]
        vectors = dict(zip(names, library.vectors.numpy()))
        write_index(args.features, fingerprint(library.model), vectors)
        print(f"wrote {args.features}")
    if args.queries:
        answer_queries(library, args.queries, args.top, args.html)
    if args.serve is not None:
        run_server(library, args.serve)


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
    add("--cache", metavar="DIR", help="folder for the index (default: beside the pictures' folder)")
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
