"""Kills training on files of one's own at random moments: SIGKILL to the process, to one of two processes under
torchrun, to a process that prepares batches. Each time: the checkpoint is whole or absent, who survives says one clear
line and does not hang, and the same command ends bitwise where an uninterrupted run ends, log and skipped counts too.

    python tests/campaigns/kills.py 30
    unshare -m python tests/campaigns/kills.py shm       64 MB of shared memory, as Docker has (Linux, root)
"""
import csv
import functools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data                                                                  # noqa: E402
import samples                                                               # noqa: E402

STEPS = 16
TINY = (f"--width 32 --vision_layers 1 --vision_mlp 64 --text_mlp 64 --fusion_mlp 64 --image_size 32 --keep 1 "
        f"--patch_size 16 --batch 8 --text_batch 8 --log_every 1 --steps {STEPS} --save_every 2 --dropout 0.1 "
        f"--processes 1").split()
NOT_BITWISE = {"seconds", "images_per_s", "sentences_per_s", "data_wait", "memory_mb"}


@functools.cache
def tokenizer():
    return data.demo_tokenizer(4000).model


def prepare(folder):
    """A shard with two bad records, and pairs."""
    path = pathlib.Path(samples.write_tar(folder / "a.tar", 30))
    raw = bytearray(path.read_bytes())
    for i in (7, 21):
        at = raw.index(b"\xff\xd8\xff", raw.index(f"{i:06}.jpg".encode()))
        raw[at:at + 4] = b"gone"
    path.write_bytes(raw)
    samples.multi30k(folder, 25)
    (folder / "spm.model").write_bytes(tokenizer())
    return folder


def start(folder, out, processes, workers=1):
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    texts = [str(folder / "multi30k" / f"train.{k}") for k in ("en", "de")]
    files = ["--images", str(folder / "a.tar"), "--texts", *texts, "--tokenizer", str(folder / "spm.model")]
    command = [sys.executable, *run, "train.py", "--out", str(out), *TINY, "--workers", str(workers), *files]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(folder, out, processes, workers=1):
    run = start(folder, out, processes, workers)
    text = run.communicate(timeout=280)[0]
    assert run.returncode == 0, text[-3000:]
    return out


def children(pid):
    """Processes below a process, its direct children first."""
    try:
        direct = list(map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except FileNotFoundError:
        return []
    return direct + [p for child in direct for p in children(child)]


def steps_done(out):
    log = out / "log.csv"
    return max(0, len(log.read_text().splitlines()) - 1) if log.exists() else 0


def kill(folder, out, processes, victim, draw):
    """Starts a run, kills `victim` ("process" or "worker") at a random moment -> (exit status, what was printed)."""
    run, step = start(folder, out, processes), draw.randint(1, STEPS - 2)
    while steps_done(out) < step and run.poll() is None:
        time.sleep(0.002)
    time.sleep(draw.random() * 0.2)
    trainers = [run.pid] if processes == 1 else children(run.pid)[:processes]
    target = draw.choice(trainers)
    if victim == "worker":
        target = (children(target) or [target])[0]
    if run.poll() is None:
        os.kill(target, signal.SIGKILL)
    text = run.communicate(timeout=280)[0]
    return run.returncode, text


def same(a, b, steps=STEPS):
    """Are two runs equal to the bit?"""
    x, y = (torch.load(out / "ckpt.pt", weights_only=True) for out in (a, b))
    assert x["step"] == y["step"] == steps
    assert all(torch.equal(value, y["model"][name]) for name, value in x["model"].items())
    assert all(torch.equal(value, y["optimizer"]["state"][i][name]) for i, moments in x["optimizer"]["state"].items()
               for name, value in moments.items())
    first, second = (list(csv.DictReader(open(out / "log.csv", newline=""))) for out in (a, b))
    assert len(first) == steps and sum(int(row["bad_records"]) for row in first) > 0
    for left, right in zip(first, second, strict=True):
        assert {k: v for k, v in left.items() if k not in NOT_BITWISE} == {
            k: v for k, v in right.items() if k not in NOT_BITWISE}


def one_kill(number, folder, whole):
    """whole: {processes: an uninterrupted run} -> what happened. AssertionError when anything is not as promised."""
    draw, out = random.Random(number), folder / f"kill{number}"
    processes, victim = 1 + number % 2, "worker" if number % 5 == 4 else "process"
    status, text = kill(folder, out, processes, victim, draw)
    reached = steps_done(out)
    survivors = processes > 1 or victim == "worker"
    if status != 0 and survivors:                                            # 0: it ended before it was hit
        died = "a data worker died" if victim == "worker" else "another process of this run died"
        first = re.search(r"rank +: 0 .*\n.*exitcode +: -9", text)           # the one that speaks: torchrun tells it
        assert f"error: {died}" in text or first, text[-2000:]
        assert 'train.py", line' not in text, text[-2000:]                   # a traceback is torchrun's own, not ours
    for path in out.glob("*.pt"):
        torch.load(path, weights_only=True)
    finish(folder, out, processes)
    same(out, whole[processes])
    return f"{number}: {victim} of {processes}, status {status}, stood at step {reached} of {STEPS}: resumed exactly", (
        status != 0)


def small_shared_memory():
    """Four workers prepare batches of 19 MB: they do not fit, the run says so at once, and goes on with --workers 0."""
    subprocess.run("mount -t tmpfs -o size=64m tmpfs /dev/shm".split(), check=True)
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "train.py", "--out", out, *TINY, "--image_size", "224", "--patch_size", "32", "--batch", "128"]
        before = time.monotonic()
        full = subprocess.run([*words, "--workers", "4"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        print(f"status {full.returncode} after {time.monotonic() - before:.1f} s: {full.stderr.splitlines()[-1]}")
        assert full.returncode == 2 and "--ipc=host" in full.stderr and "Traceback" not in full.stderr
        assert subprocess.run([*words, "--workers", "0", "--no-eval"], cwd=ROOT, capture_output=True).returncode == 0


if __name__ == "__main__":
    if sys.argv[1:] == ["shm"]:
        sys.exit(small_shared_memory())
    with tempfile.TemporaryDirectory() as base:
        folder = prepare(pathlib.Path(base))
        whole, hit = {processes: finish(folder, folder / f"whole{processes}", processes) for processes in (1, 2)}, 0
        for number in range(int(sys.argv[1])):
            what, killed = one_kill(number, folder, whole)
            hit += killed
            print(what, flush=True)
    print(f"{sys.argv[1]} of {sys.argv[1]} ended bitwise as an uninterrupted run, {hit} of them after a kill")
