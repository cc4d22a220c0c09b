"""What breaks while training: one clear line, nothing lost. A slice of campaigns/faults.py and kills.py."""
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

from campaigns import faults
from campaigns import folders
from campaigns import kills
import pytest
import samples
import torch

import data
import train
import weights

ROOT = pathlib.Path(__file__).parents[1]


def test_training_doctor_evaluation_and_search_agree_on_what_is_good_and_see_the_same(tmp_path, tokenizer):
    whats, counts, wrong = zip(*(folders.one_folder(seed, tmp_path / str(seed), tokenizer) for seed in (27, 33)))
    assert wrong == ([], []) and sum(counts) == 44, whats


@pytest.mark.parametrize("numbers", [range(1, 12), range(12, 21), range(21, 30)])
def test_damaged_shards_read_as_a_naive_parse_reads_them(tmp_path, tokenizer, numbers):
    damaged = 0
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        what, bad = faults.one_corruption(number, folder, tokenizer)
        damaged += bad > 0 or "refused" in what
        shutil.rmtree(folder)
    assert damaged > 4


def settings(folder, out, *more):
    return ["--out", str(out), "--images", str(folder / "a.tar"), "--tokenizer", str(folder / "spm.model"),
            *faults.TINY, "--dropout", "0.1", "--steps", "12", "--save_every", "2", "--workers", "0", *more]


def last_line(capsys, status, *said):
    assert status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in said), lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files, and an uninterrupted run on them."""
    folder = kills.prepare(tmp_path_factory.mktemp("whole"))
    assert train.main(settings(folder, folder / "whole")) == 0
    return folder


def forked(folder, out, rank, port, die_at=None):
    """One of two processes as torchrun starts them, but forked (campaigns/kills.py uses torchrun) -> its pid."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(f"{out}.{rank}", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)

    def step(*args):
        return os.kill(os.getpid(), signal.SIGKILL) if args[3] == die_at else train.train_step(*args)

    status = train.main(settings(folder, out), step)
    os._exit(status)


def two(folder, out, die_at=None, other=None):
    """-> exit statuses of two processes; the second is killed in step die_at, or writes into `other`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [forked(folder, (other or out) if rank else out, rank, port, die_at if rank else None) for rank in (0, 1)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_one_of_two_killed_processes_is_told_in_one_line_and_the_run_resumes_bitwise(tmp_path, whole):
    assert two(whole, tmp_path / "whole") == [0, 0]
    assert two(whole, tmp_path / "killed", die_at=7) == [2, -signal.SIGKILL]
    told = pathlib.Path(f"{tmp_path}/killed.0").read_text()
    assert told.count("error: ") == told.count("error: another process of this run died") == 1 and "Trace" not in told
    assert torch.load(tmp_path / "killed" / "ckpt.pt", weights_only=True)["step"] == 6
    assert two(whole, tmp_path / "killed") == [0, 0]
    kills.same(tmp_path / "killed", tmp_path / "whole", 12)


def test_two_nodes_that_see_different_folders_are_told_so(tmp_path, whole):
    assert train.main(settings(whole, tmp_path / "here", "--stop_after", "3")) == 0
    assert two(whole, tmp_path / "here", other=tmp_path / "there") == [2, 2]
    for out in ("here.0", "there.1"):
        told = (tmp_path / out).read_text().splitlines()[-1]
        assert told.startswith("error: processes found checkpoints of steps [0, 3]") and "all nodes" in told


def test_a_killed_worker_is_told_in_one_line_and_another_number_of_workers_resumes_bitwise(tmp_path, whole, capfd):
    def step(*args):
        if args[3] == 7:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.5)
        return train.train_step(*args)

    assert train.main(settings(whole, tmp_path / "out", "--workers", "2"), step) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("error: a data worker died")
    assert train.main(settings(whole, tmp_path / "out", "--workers", "3")) == 0
    kills.same(tmp_path / "out", whole / "whole", 12)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    """A limit on the size of files fails a write exactly as a full disk does: in the middle."""
    path = tmp_path / "ckpt.pt"
    weights.write_checkpoint(path, {"a": torch.ones(10), "step": 1})
    code = (f"import resource, signal, torch, weights, pathlib; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            f"try: weights.write_checkpoint(pathlib.Path({str(path)!r}), {{'a': torch.zeros(1_000_000)}})\n"
            f"except ValueError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "cannot be written" in done.stdout and "MB are free" in done.stdout and done.stderr == ""
    assert torch.load(path, weights_only=True)["a"].sum() == 10 and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on_when_there_is_room(tmp_path):
    folder, out = kills.prepare(tmp_path), tmp_path / "out"
    assert train.main(settings(folder, out, "--stop_after", "4")) == 0
    before = (out / "ckpt.pt").read_bytes()
    limit = len(before) // 2

    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "train.py", *settings(folder, out)]
    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=small)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "cannot be written" in full.stderr.splitlines()[-1] and (out / "ckpt.pt").read_bytes() == before
    assert train.main(settings(folder, out)) == 0
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 12


def test_a_shard_that_is_deleted_during_training_ends_the_run_and_can_be_put_back(tmp_path, capsys):
    """One of two shards is gone after step 3."""
    folder = kills.prepare(tmp_path)
    samples.write_tar(folder / "b.tar", 30, first=100)
    given = ["--images", str(folder / "*.tar")]

    def step(*args):
        if args[3] == 3:
            (folder / "b.tar").rename(folder / "moved")
        return train.train_step(*args)

    status = train.main(settings(folder, tmp_path / "out", *given), step)
    told = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and [line[:7] for line in told[:-1]] == ["process"] * (len(told) - 1), told   # each is named, then
    assert all(word in told[-1] for word in ("more than 10", "b.tar", "No such file", "at step")), told
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"]
    assert 3 <= saved < 12
    (folder / "moved").rename(folder / "b.tar")
    assert train.main(settings(folder, tmp_path / "out", *given)) == 0


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_mistake_in_a_source_is_told_as_itself_and_leaves_no_worker_waiting(tmp_path, monkeypatch, capsys, error):
    def broken(self, key):
        raise error("my own mistake")

    monkeypatch.setattr(data.DemoImages, "__getitem__", broken)
    flags = ["--out", str(tmp_path), *kills.TINY, "--patch_size", "8", "--image_size", "64"]
    if error is ValueError:
        last_line(capsys, train.main(flags), "error: my own mistake")
    else:
        with pytest.raises(RuntimeError, match="my own mistake") as _kept:   # kept, as Python keeps the last error
            train.main(flags)
    assert multiprocessing.active_children() == []
