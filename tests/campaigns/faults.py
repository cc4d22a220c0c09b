"""Damages shards on purpose, many times: records, skipped counts and the doctor must agree with a naive parse of the
same bytes, or there must be one clear line that refuses the file. Every tenth shard is also trained on.

    python tests/campaigns/faults.py 300

A small slice runs in tests/test_faults.py. Killed processes: tests/campaigns/kills.py.
"""
import base64
import contextlib
import io
import pathlib
import random
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data                                                                  # noqa: E402
from formats import records                                                               # noqa: E402
import samples                                                               # noqa: E402
from formats import sources                                                               # noqa: E402
import train                                                                 # noqa: E402

N = 40                                                                       # records of a shard
TINY = ("--width 32 --vision_layers 1 --vision_mlp 64 --text_mlp 64 --fusion_mlp 64 --image_size 32 "
        "--patch_size 16 --batch 8 --text_batch 8 --log_every 1 --no-eval --processes 1").split()


# --------------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------------

def make(kind, folder):
    """A whole shard -> its path, and where the records of a tar start."""
    if kind == "tar":
        path = pathlib.Path(samples.write_tar(folder / "a.tar", N, long="v1."))
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        return path, {pathlib.Path(m.name).stem: m.offset for m in members[::2]}
    if kind == "pairs":
        path = folder / "a.tsv"
        path.write_text("".join(f"{samples.PHRASES['en'].format(i)}\t{samples.PHRASES['zh'].format(i)}\n"
                                for i in range(N)), "utf-8")
        return path, None
    for i in range(N):
        (folder / f"{i}.jpg").write_bytes(samples.jpeg(i))
    return pathlib.Path(samples.lines(folder / "a.jsonl", (
        {"image": f"{i}.jpg" if kind == "paths" else base64.b64encode(samples.jpeg(i)).decode(),
         "caption": samples.said(i)} for i in range(N)))), None


def damage(kind, path, draw):
    """Breaks a shard in a way drawn at random -> its name."""
    raw = bytearray(path.read_bytes())
    at, length = draw.randrange(len(raw)), draw.choice([1, 4, 60, 400])
    ways = ["cut", "noise", "zeros", "empty", "garbage", "insert"][:5 if kind == "tar" else 6]
    way = draw.choice(ways + ["image cut", "image empty", "image gone", "image is a folder"] * 2 * (kind == "paths"))
    if way.startswith("image"):
        image = path.parent / f"{draw.randrange(N)}.jpg"
        body = image.read_bytes()
        image.unlink()
        if way != "image gone":
            image.mkdir() if "folder" in way else image.write_bytes(body[:draw.randrange(len(body))] * ("cut" in way))
        return way
    if way == "cut":
        del raw[at:]
    elif way in ("noise", "zeros"):
        raw[at:at + length] = (draw.randbytes(length) if way == "noise" else bytes(length))[:len(raw) - at]
    elif way == "insert":
        raw[at:at] = draw.randbytes(length).replace(b"\n", b"?")
    path.write_bytes(raw if way not in ("empty", "garbage") else b"<html>not found</html>" * (way == "garbage"))
    return way


def one_corruption(number, folder, tokenizer):
    """-> (what was done, how many records were bad). AssertionError where we and the naive parse disagree."""
    draw = random.Random(number)
    kind = draw.choice(["tar", "base64", "paths", "pairs"])
    path, spans = make(kind, folder)
    way = damage(kind, path, draw)
    truth = (samples.expected_tar(path, spans) if kind == "tar" else
             samples.expected_pairs(path) if kind == "pairs" else samples.expected_images(path))
    if kind == "tar" and way == "garbage":
        truth = [None]                                                       # one stretch without any header
    what, images = f"{number}: {kind}, {way}", kind != "pairs"
    try:
        source = data.files(data.ImageFiles, [str(path)], 32) if images else data.files(data.PairFiles, [str(path)])
    except ValueError as error:
        assert not truth and str(path) in str(error), what
        return what + f", refused: {error}", 0
    assert len(source) == len(truth), (what, len(source), len(truth))
    bad = {i for i, thing in enumerate(truth) if thing is None}
    streams = [data.Stream(source, 8), None] if images else [None, data.Stream(source, 8)]
    batches = data.Batches(tokenizer, *streams, seed=number)
    steps = -(-len(truth) // 8)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = data.main([str(path)])
    assert status == bool(bad) and f"broken {'':9} {len(bad) or 'none'}" in said.getvalue(), (what, said.getvalue())
    expected, visits = in_order(truth, steps * 8, number, int(not images))
    if expected[0] is None:                                                  # the first eleven records are bad
        try:
            batches[0]
            raise AssertionError(what)
        except ValueError as error:
            assert "records were bad" in str(error), what
        skipped, stop = None, True
    else:
        found, skipped, stop = [], 0, False
        bad_records = sources.BadRecords()
        with contextlib.redirect_stdout(io.StringIO()):
            for step in range(steps):
                item = batches[step]
                found += item[not images]["ids"].tolist()
                count, too_many = bad_records.count(item[2]["bad_records"])
                skipped, stop = skipped + count, stop or too_many
        assert (found, skipped, stop) == (expected, visits, visits > 10), (what, skipped, visits)
    if number % 10 == 0:
        trained(path, images, folder, tokenizer, None if stop else skipped, steps, number, what)
    return what + (", stopped" if stop else ""), len(bad)


def in_order(truth, count, seed, stream):
    """What `count` positions of training hold: identities of the next good records, after eleven bad ones the last good
    one (None: there was none yet) -> (identities, how many bad ones were met)."""
    expected, visits, last = [], 0, None
    for position in range(count):
        _, index = data.example_at(position, len(truth), seed, stream)
        for i in range(index, index + 11):
            thing = truth[i % len(truth)]
            if thing is not None:
                last = records.identity(thing if isinstance(thing, bytes) else thing.read_bytes())
                break
            visits += 1
        expected.append(last)
    return expected, visits


def trained(path, images, folder, tokenizer, skipped, steps, seed, what):
    """train.py on the damaged shard: its log counts the same skipped records, or it ends with status 2 and one line."""
    (folder / "spm.model").write_bytes(tokenizer.model)
    given = ["--images", str(path)] if images else ["--images", "demo", "--texts", str(path), "--image_size", "64"]
    words = ["--out", str(folder / "out"), "--tokenizer", str(folder / "spm.model"), *TINY, *given, "--workers", "0",
             "--steps", str(steps), "--seed", str(seed)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        status = train.main(words)
    if skipped is None:
        assert status == 2 and len(error.getvalue().splitlines()) == 1 and "were bad" in error.getvalue(), what
    else:
        rows = (folder / "out" / "log.csv").read_text().splitlines()
        column = rows[0].split(",").index("bad_records")
        assert status == 0 and sum(int(row.split(",")[column]) for row in rows[1:]) == skipped, what


if __name__ == "__main__":
    tokenizer, damaged, bad = data.demo_tokenizer(4000), 0, 0
    for number in range(int(sys.argv[1])):
        with tempfile.TemporaryDirectory() as folder:
            what, count = one_corruption(number, pathlib.Path(folder), tokenizer)
            damaged, bad = damaged + (count > 0 or "refused" in what), bad + count
            print(what.replace(folder, ""), f"{count} bad", flush=True)
    print(f"{sys.argv[1]} damaged shards read as a naive parse reads them: {damaged} of them had bad records or were "
          f"refused, {bad} records were bad")
