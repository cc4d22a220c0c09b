"""How fast and how large are reading and evaluation? Numbers for the docs; nothing here is a test.

    python tests/campaigns/bench_data.py index [--megabytes 2000]        building the index: GB/min and records/s of each kind
    python tests/campaigns/bench_data.py images [--photos DIR]           224 px images/s on one core, beside Pillow decoding alone
    python tests/campaigns/bench_data.py memory --dir BIG [--pairs 5000000 --pictures 1000000]
                                                               resident memory of training, beside 10,000 records
    python tests/campaigns/bench_data.py search [--photographs 200]  peak memory of search.py over 20 JPEGs of 12 megapixels, and
                                                               over so many
    python tests/campaigns/bench_data.py retrieval [--small 5000]  peak memory of evaluate.py retrieval over 1,500 images of 100 x 75
                                                               pixels, and over so many; 400 KB of token states each
    python tests/campaigns/bench_data.py base [--layers 6] [--rerank 1]  peak memory of evaluate.py retrieval at base width and 64
                                                               pixels: 5,000 images with 25,000 captions
    python tests/campaigns/bench_data.py rerank [--layers 6]   CPU seconds of re-ranking both directions at base size, and of the
                                                               padded loop over queries on the same work
    python tests/campaigns/bench_data.py xgqa [--questions 1000]  CPU seconds and peak memory of ranking 1,842 answers for each
                                                               question at demo size, CPU seconds of one pass for each answer
"""
import argparse
import io
import itertools
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
import torch
from PIL import Image, ImageFilter

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data                                                                  # noqa: E402
from formats import records                                                  # noqa: E402

TRAIN = ("--steps 40 --log_every 40 --batch 32 --text_batch 64 --width 32 --vision_layers 1 --vision_mlp 64 "
         "--text_mlp 64 --fusion_mlp 64 --image_size 32 --no-eval --workers 1 --processes 1").split()


def picture(seed, width, height, quality=90):
    """JPEG bytes that are about as hard to decode as a photo: blurred noise at three scales."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for share, scale in ((0.6, 40), (0.3, 8), (0.1, 2)):
        small = Image.fromarray(rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), dtype=np.uint8))
        total += share * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), float)
    out = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).filter(ImageFilter.SMOOTH).save(out, "JPEG", quality=quality)
    return out.getvalue()


def write_tar(path, pictures, first=0):
    with tarfile.open(path, "w") as tar:
        for i, raw in enumerate(pictures, first):
            text = json.dumps({"captions": {"en": f"picture number {i}", "de": f"Bild Nummer {i}"}}).encode()
            for name, body in ((f"{i:08}.jpg", raw), (f"{i:08}.json", text)):
                info = tarfile.TarInfo(name)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return path


def write_pairs(path, first, last):
    words = "time year people way day man thing woman life child world school state family".split()
    draw = random.Random(first)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(first, last):
            said = " ".join(draw.choices(words, k=8))
            file.write(f"{said} {i}\t{said[::-1]} {i}\n")
    return path


def bench_index(args):
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder, size = pathlib.Path(folder), args.megabytes << 20
        photo = picture(0, 500, 375)
        made = {"tar, photos": write_tar(folder / "a.tar", [photo] * (size // (len(photo) + 2048))),
                "tar, thumbnails": write_tar(folder / "b.tar", [picture(1, 32, 32)] * (size // 10 // 3072)),
                "tsv": write_pairs(folder / "c.tsv", 0, size // 100)}
        for name, path in made.items():
            path.read_bytes()                                                # into the page cache: disks differ
            start = time.perf_counter()
            found = len((records.Tar if path.suffix == ".tar" else records.Columns)(str(path)))
            spent, gigabytes = time.perf_counter() - start, path.stat().st_size / 1e9
            print(f"{name:16} {gigabytes:6.2f} GB, {found:10,} records: {60 * gigabytes / spent:7.1f} GB/min, "
                  f"{found / spent:12,.0f} records/s")


# Photos take about half a byte a pixel: the 83 thousand of COCO's training set, 640 pixels wide, 13 GB. CC3M, as it is
# shared in webdataset's tars, has a shorter side of at most 512. The lower the quality, the easier to decode.
PICTURES = {"1024 x 768, quality 90": (1024, 768, 90), "683 x 512, quality 95": (683, 512, 95),
            "640 x 480, quality 98": (640, 480, 98), "640 x 480, quality 90": (640, 480, 90),
            "500 x 375, quality 98": (500, 375, 98), "500 x 375, quality 90": (500, 375, 90)}


def bench_images(args):
    if args.photos:
        photos = [path.read_bytes() for path in sorted(pathlib.Path(args.photos).glob("*.jp*g"))][:args.count]
        return compare(args.photos, photos, args.rounds) if photos else sys.exit(f"no .jpg in {args.photos}")
    for name, shape in PICTURES.items():
        compare(name, [picture(i, *shape) for i in range(args.count)], args.rounds)


def compare(name, raws, rounds):
    """Pillow and we do the same pictures by turns: medians, process time."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = data.files(data.ImageFiles, [str(write_tar(pathlib.Path(folder, "a.tar"), raws))], 224)
        floor, ours = [0.0] * rounds, [0.0] * rounds
        for turn, i in itertools.product(range(rounds), range(len(raws))):
            start = time.process_time()
            Image.open(io.BytesIO(raws[i])).load()
            middle = time.process_time()
            image, *_ = dataset[i, data.generator(turn, i)]
            floor[turn], ours[turn] = floor[turn] + middle - start, ours[turn] + time.process_time() - middle
            assert image.shape == (3, 224, 224)
    floor, ours = (len(raws) / statistics.median(times) for times in (floor, ours))
    size = statistics.mean(map(len, raws))
    pixels = statistics.mean(math.prod(Image.open(io.BytesIO(raw)).size) for raw in raws)
    print(f"{name:22} {size / pixels:.2f} bytes a pixel: Pillow decodes "
          f"{floor:4.0f}/s, we read, decode and augment to 224 px {ours:3.0f}/s: {ours / floor:.2f}", flush=True)


def peak(pid):
    """{process: highest resident size in MB} of a process and its children."""
    found = {}
    for p in [pid, *map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        for line in pathlib.Path(f"/proc/{p}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                found["main" if p == pid else "worker"] = int(line.split()[1]) / 1024
    return found


def train_on(folder, out):
    """Trains on a folder's pictures and pairs -> {process: highest resident MB}, seconds."""
    command = [sys.executable, "train.py", "--out", str(out), "--images", str(folder / "pictures"), "--texts",
               str(folder / "pairs"), "--tokenizer", str(folder.parent / "spm.model"), *TRAIN]
    run, highest, start = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL), {}, time.perf_counter()
    while run.poll() is None:
        try:
            for name, size in peak(run.pid).items():
                highest[name] = max(highest.get(name, 0), size)
        except (FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(0.05)
    if run.returncode:
        sys.exit(f"train.py ended with status {run.returncode}")
    return highest, time.perf_counter() - start


def bench_memory(args):
    base = pathlib.Path(args.dir or tempfile.mkdtemp())
    small, large = base / "small", base / "large"
    for folder, pairs, pictures in ((small, 10_000, 10_000), (large, args.pairs, args.pictures)):
        if not folder.exists():
            for kind in ("pictures", "pairs"):
                (folder / kind).mkdir(parents=True)
            thumbnails = [picture(i, 32, 32) for i in range(100)]
            for first in range(0, pictures, 50_000):
                write_tar(folder / "pictures" / f"{first:08}.tar",
                          (thumbnails[i % 100] for i in range(min(50_000, pictures - first))), first)
            for first in range(0, pairs, 1_000_000):
                write_pairs(folder / "pairs" / f"{first:08}.tsv", first, min(first + 1_000_000, pairs))
            print(f"made {folder}: {pictures:,} pictures, {pairs:,} pairs", flush=True)
    if not (base / "spm.model").exists():
        subprocess.run([sys.executable, "data.py", "tokenizer", "--texts", str(small / "pairs"), "--vocab", "500",
                        "--out", str(base / "spm.model")], cwd=ROOT, check=True)
    results = {}
    for name, folder in (("small", small), ("large, index is built", large), ("large, index is there", large)):
        for stale in folder.glob("*/.*.index") if "built" in name else ():
            stale.unlink()
        with tempfile.TemporaryDirectory(dir=base) as out:
            results[name], seconds = train_on(folder, out)
        print(f"{name:22} " + ", ".join(f"{p} {size:.0f} MB ({size - results['small'][p]:+.0f})"
                                        for p, size in results[name].items()) + f", {seconds:.0f} s", flush=True)


def write_checkpoint(path, preset="demo", **changes):
    import dataclasses
    from model import CCLM, PRESETS
    tokenizer = data.demo_tokenizer(4000)
    config = dataclasses.replace(PRESETS[preset], **{"vocabulary": tokenizer.size} | changes)
    torch.save({"model": CCLM(config).state_dict(), "step": 1, "tokenizer": tokenizer.model,
                "config": {"model": dataclasses.asdict(config), "train": {}}}, path)


def peak_of(program, name, *words):
    """Runs a command and prints its peak resident memory. ru_maxrss would be that of this process: it survives exec."""
    code = (f"import re, sys, {program}; status = {program}.main(sys.argv[1:]); "
            "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024, file=sys.stderr); "
            "sys.exit(status)")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    print(f"{name}: peak {done.stderr.strip()} MB, {time.perf_counter() - start:.0f} s", flush=True)


def bench_retrieval(args):
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder, raws = pathlib.Path(folder), [picture(i, 100, 75) for i in range(100)]
        write_checkpoint(folder / "ckpt.pt", image_size=224, patch_size=8, stem=False, width=128, vision_layers=1,
                         vision_mlp=128, text_layers=1, text_mlp=128, fusion_layers=1, fusion_mlp=128)
        for count in (1_500, args.small):
            write_tar(folder / f"{count}.tar", (raws[i % 100] for i in range(count)))
            for K in ("0", "16"):
                peak_of("evaluate", f"retrieval --rerank {K:2} over {count:6,} images, two languages", "retrieval", "--ckpt",
                        folder / "ckpt.pt", "--data", folder / f"{count}.tar", "--rerank", K)


def bench_base(args):
    """The captions are all different. With fewer layers it is quicker: a layer of each of the three parts is 90 MB."""
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder, draw = pathlib.Path(folder), random.Random(0)
        pieces = data.demo_tokenizer(4000).pieces(range(4000))               # as many tokens as XLM-R makes of a caption
        words = [piece[1:] for piece in pieces if piece[0] == "\u2581" and piece[1:].isalpha()]
        write_checkpoint(folder / "ckpt.pt", "base", vocabulary=250002, image_size=64, vision_layers=2 * args.layers,
                         text_layers=2 * args.layers, fusion_layers=args.layers)
        for i in range(100):
            (folder / f"{i}.jpg").write_bytes(picture(i, 64, 64))
        with open(folder / "a.jsonl", "w") as file:
            for i in range(args.small):
                said = [" ".join(draw.choices(words, k=11)) for _ in range(5)]
                file.write(json.dumps({"image": f"{i % 100}.jpg", "captions": {"en": said}}) + "\n")
        peak_of("evaluate", f"retrieval --rerank {args.rerank} over {args.small:,} images, {5 * args.small:,} captions, base width, "
                f"{2 * args.layers} layers", "retrieval", "--ckpt", folder / "ckpt.pt", "--data", folder / "a.jsonl", "--rerank",
                str(args.rerank))


@torch.no_grad()
def bench_rerank(args):
    """12 images with 60 captions, the 8 best of each, in fp32. Both sides get the same states and the same pairs."""
    import evaluate
    from kernels.packed import offsets
    from model import CCLM, View, build
    import reference
    model = CCLM(build("base", vocabulary=4000, fusion_layers=args.layers, vision_layers=1, text_layers=1)).eval()
    torch.nn.init.normal_(model.itm_head[-1].weight)                         # it begins at 0: all pairs alike
    I, n, K, D, P = 12, 60, 8, 768, evaluate.image_tokens(model.config)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 21, (n,), generator=draw)                     # mean 14, as captions have

    def encoded(lengths):
        states = torch.randn(int(lengths.sum()), D, generator=draw)
        view = View(states, offsets(lengths), None, None)
        vectors = torch.nn.functional.normalize(torch.randn(len(lengths), 256, generator=draw), dim=1)
        found = evaluate.Encoded.__new__(evaluate.Encoded)
        found.vectors, found.lengths, found.view, found.again = vectors, lengths, view, None
        return found
    images, texts = encoded(torch.full((I,), P)), encoded(lengths)
    captions = evaluate.Captions(texts, torch.arange(n), torch.arange(n), torch.zeros(0), torch.arange(n) // 5,
                                 torch.arange(I), images.vectors)
    found = {way: evaluate.rank_all(captions, way, K) for way in ("t2i", "i2t")}

    def ours():
        evaluate.rerank(model, captions, images, found)
        return [x["matched_"] for x in found.values()]

    def loop():
        """The official way: a query and its K candidates are a padded batch."""
        image = images.view.states.view(I, P, D)
        text = torch.nn.utils.rnn.pad_sequence(texts.view.states.split(lengths.tolist()), batch_first=True)    # (n, L, D)
        mask = torch.arange(text.shape[1]) < lengths[:, None]
        seen = torch.ones(K, P, dtype=torch.bool)

        def yes(t, i):
            return model.itm_head(reference.fuse(model, text[t], mask[t], image[i], seen)[:, 0])[:, 1]
        t2i = [yes(torch.full((K,), c), best) for c, best in enumerate(found["t2i"]["best"])]
        i2t = [yes(best, torch.full((K,), i)) for i, best in enumerate(found["i2t"]["best"])]
        return [torch.stack(t2i), torch.stack(i2t)]
    evaluate.inference_context = lambda device: torch.autocast("cpu", enabled=False)     # fp32 on both sides
    seconds = {ours: [], loop: []}
    for _ in range(args.rounds):
        results = []
        for side in (ours, loop):
            start = time.process_time()
            results.append(side())
            seconds[side].append(time.process_time() - start)
        difference = max((a - b).abs().max().item() for a, b in zip(*results))
    mine, theirs = (statistics.median(seconds[side]) for side in (ours, loop))
    print(f"re-ranking {n} captions and {I} images, {K} candidates each, base size, {args.layers} fusion layers, fp32: "
          f"{mine:.1f} CPU s, the padded loop {theirs:.1f}: {theirs / mine:.1f} times as long; largest difference "
          f"{difference:.1e}")


@torch.no_grad()
def bench_xgqa(args):
    """One pass for each answer is timed for 200 answers of one question; the rest is a product."""
    import test_xgqa
    from model import CCLM, build
    from tasks.common import Examples, to_batch
    from tasks.xgqa import Xgqa
    tokenizer, draw = data.demo_tokenizer(), random.Random(0)
    words = [piece[1:] for piece in tokenizer.pieces(range(8000)) if piece[0] == "\u2581" and piece[1:].isalpha()]
    answers = {}
    while len(answers) < 1842:                                               # GQA's have 1.4 words on average
        answers[" ".join(draw.choices(words, k=draw.choice((1, 1, 1, 1, 2, 2, 3))))] = 0
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root, images = test_xgqa.gqa(pathlib.Path(folder), n=args.questions)
        path = root / "gqa" / "annotations" / "trainval_ans2label.json"
        path.write_text(json.dumps({answer: i for i, answer in enumerate(answers)}))
        task = Xgqa(root, images)
        torch.manual_seed(0)
        model = CCLM(build("demo", vocabulary=tokenizer.size)).eval()
        model.task_head = task.head(model.config)
        task.begin(model)
        trie = task.trie(tokenizer, torch.device("cpu"))
        examples = task.examples("test", "de")
        dataset = Examples(examples, model.config.image_size)
        batches = [to_batch(examples[i:i + 64], [dataset.whole(j) for j in range(i, min(i + 64, len(examples)))], tokenizer,
                            40, "cpu") for i in range(0, len(examples), 64)]
        start = time.process_time()
        for batch in batches:
            task.rank(model, batch, trie)
        mine = time.process_time() - start
        highest = peak(os.getpid())["main"]
        question = task.question(model, batches[0])
        pieces = [tokenizer.encode(answer)[1:-1] for answer in list(answers)[:200]]
        start = time.process_time()
        for some in pieces:
            test_xgqa.step_by_step(model, question.states[:question.starts[1]], some)
        each = (time.process_time() - start) / len(pieces)
    theirs = each * len(answers) * len(examples)
    print(f"{len(examples):,} questions, {len(answers):,} answers of {len(trie.token):,} prefixes, demo size, fp32: {mine:.1f} "
          f"CPU s, peak {highest:,.0f} MB; one pass for each question and answer takes {1000 * each:.1f} ms, {theirs:,.0f} s in all: "
          f"{theirs / mine:,.0f} times as long")


def bench_search(args):
    """The JPEGs are links to twenty: what counts is how many are decoded."""
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        folder = pathlib.Path(folder)
        write_checkpoint(folder / "ckpt.pt")
        for i in range(20):
            (folder / f"{i}.jpg").write_bytes(picture(i, 4000, 3000))
        for count in (20, args.photographs):
            (folder / str(count)).mkdir()
            for i in range(count):
                os.link(folder / f"{i % 20}.jpg", folder / str(count) / f"{i:06}.jpg")
            peak_of("search", f"search over {count:6,} JPEGs of 12 megapixels", "--ckpt", folder / "ckpt.pt", "--images",
                    folder / str(count), "--html", folder / "g.html", "a dog")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["index", "images", "memory", "search", "retrieval", "base", "rerank", "xgqa"])
    parser.add_argument("--dir", help="where large files may lie")
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--photos", help="a folder of your own JPEG files instead of made ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--photographs", type=int, default=200)
    parser.add_argument("--small", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--rerank", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"                                      # of the runs of train.py
    torch.set_num_threads(1)                                                 # as in a worker of the DataLoader
    {"index": bench_index, "images": bench_images, "memory": bench_memory, "search": bench_search,
     "retrieval": bench_retrieval, "base": bench_base, "rerank": bench_rerank,
     "xgqa": bench_xgqa}[args.what](args)
