"""Nothing waits for ever and nothing is destroyed: signals while a batch is awaited, batches that cannot be sent, a closed
stdout, two runs in one folder, --keep and --fresh among foreign files, damaged logs, data that moved."""
import csv
import importlib.util
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

import pytest
import samples
import torch

import benchmark
import data
import train
from formats.checkpoints import write_checkpoint
from test_resume import TINY, here, same, steps_done, whole                        # noqa: F401, a fixture

SMALL = ("--steps 4 --save_every 1 --log_every 1 --batch 8 --text_batch 8 --width 32 --vision_mlp 64 --text_mlp 64 "
         "--fusion_mlp 64 --vision_layers 1 --no-eval --workers 0").split()


def small(out, *more):
    return train.main(["--out", str(out), *SMALL, *more])


def checkpoint(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_signal_is_heard_while_the_run_waits_for_data_and_it_resumes_bitwise(tmp_path, whole, monkeypatch, capsys,  # noqa: F811
                                                                               workers):
    plain = data.Batches.__getitem__
    parent = os.getpid()

    def slow(self, step):
        if step == 5:
            threading.Timer(0.3, os.kill, (parent, signal.SIGTERM)).start()
            time.sleep(60)
        return plain(self, step)

    monkeypatch.setattr(data.Batches, "__getitem__", slow)
    before = time.monotonic()
    assert here(tmp_path, "--workers", workers) == 0 and time.monotonic() - before < 20
    saved = steps_done(tmp_path)                                             # 5 but on a very busy machine
    assert f"SIGTERM: saved {tmp_path}/ckpt.pt at step {saved}; the same" in last_line(capsys.readouterr().out)
    assert checkpoint(tmp_path)["step"] == saved and multiprocessing.active_children() == []
    monkeypatch.undo()
    assert here(tmp_path) == 0
    same(tmp_path, whole)


def test_a_batch_that_cannot_be_sent_ends_the_run_with_a_line_about_shared_memory(tmp_path, monkeypatch, capfd):
    """Python's queue drops it: here as it cannot be pickled, in Docker as 64 MB of /dev/shm are full."""
    plain = data.Batches.__getitem__

    def unsendable(self, step):
        *batch, stats = plain(self, step)
        return [*batch, stats | {"no": (lambda: 0) if step == 2 else None}]

    monkeypatch.setattr(data.Batches, "__getitem__", unsendable)
    assert small(tmp_path, "--workers", "2") == 2
    told = capfd.readouterr().err.strip().splitlines()
    assert told[-1].startswith("error: a data worker died") and "--ipc=host" in told[-1] and "--workers 0" in told[-1]
    assert sum("error" in line for line in told) == 1


def child(work):
    """A process of its own that shares what was imported -> (pid, a file of what it prints on stderr)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        os._exit(work())
    os.close(write)
    return pid, os.fdopen(read)


def test_a_closed_stdout_is_like_a_signal(tmp_path, whole):                  # noqa: F811
    """As after `| head`: the run saves at the step at hand, says one line on stderr, ends with status 0 and resumes."""
    def printing():
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(write)
        sys.stdout = open(1, "w", closefd=False)

        def step(*args):
            if args[3] == 4:
                os.close(read)
            return train.train_step(*args)
        return train.main(["--out", str(tmp_path), *TINY, "--workers", "0"], step)

    pid, told = child(printing)
    text = told.read()
    assert os.waitpid(pid, 0)[1] == 0 and text == f"SIGPIPE: saved {tmp_path}/ckpt.pt at step 5; the same command continues\n"
    assert checkpoint(tmp_path)["step"] == 5 == steps_done(tmp_path)
    assert here(tmp_path) == 0
    same(tmp_path, whole)


def test_of_two_runs_in_one_folder_the_second_gets_a_line_and_the_first_goes_on(tmp_path):
    def second(*args):
        if args[3] == 1:
            pid, told = child(lambda: small(tmp_path))
            assert told.read() == f"error: another run writes into {tmp_path}: choose another --out\n"
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        return train.train_step(*args)

    assert train.main(["--out", str(tmp_path), *SMALL], second) == 0
    assert checkpoint(tmp_path)["step"] == 4 == steps_done(tmp_path)


def test_a_second_ctrl_c_ends_at_once_and_a_run_under_nohup_goes_on(tmp_path, capsys):
    def twice(*args):
        if args[3] == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return train.train_step(*args)

    assert train.main(["--out", str(tmp_path), *SMALL], twice) == 2
    assert capsys.readouterr().err .startswith("error: interrupted; a checkpoint in ")
    assert checkpoint(tmp_path)["step"] == 2

    class Slow:                                                              # the second Ctrl-C while a file is written
        def __reduce__(self):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "ckpt.pt", {"a": torch.zeros(9), "b": Slow()})
    assert checkpoint(tmp_path)["step"] == 2 and not list(tmp_path.glob("*.tmp"))

    def hangs_up(*args):
        signal.raise_signal(signal.SIGHUP)
        return train.train_step(*args)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert train.main(["--out", str(tmp_path), *SMALL], hangs_up) == 0
    signal.signal(signal.SIGHUP, before)
    assert checkpoint(tmp_path)["step"] == 4


@pytest.mark.parametrize("links", [True, False])
def test_only_checkpoints_of_this_run_are_counted_and_deleted(tmp_path, capsys, monkeypatch, links):
    def refused(*_):
        raise PermissionError("no hard links here")
    if not links:
        monkeypatch.setattr(os, "link", refused)
    for name in ("ckpt_best.pt", "ckpt_1.pt", "ckpt_700.pt"):
        (tmp_path / name).write_text("of somebody else")
    assert small(tmp_path, "--keep", "1") == 0
    found = {path.name: path.read_bytes()[:4] for path in tmp_path.glob("*.pt*")}
    assert found == {"ckpt_best.pt": b"of s", "ckpt_1.pt": b"of s", "ckpt_700.pt": b"of s", "ckpt_3.pt": b"PK\3\4",
                     "ckpt.pt": b"PK\3\4"}
    assert torch.load(tmp_path / "ckpt_3.pt", weights_only=True)["step"] == 3
    assert f"step 1 is not kept: {tmp_path}/ckpt_1.pt exists" in capsys.readouterr().out


def test_fresh_sets_the_earlier_run_aside_also_a_broken_one(tmp_path):
    (tmp_path / "ckpt_best.pt").write_text("mine")
    for content in (b"", b"broken"):
        (tmp_path / "ckpt.pt").write_bytes(content)
        assert small(tmp_path, "--fresh", "--keep", "2", "--steps", "3") == 0
        time.sleep(1.1)                                                      # the folders are named after the second
    assert small(tmp_path, "--fresh", "--keep", "2") == 0
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["ckpt.pt", "ckpt_2.pt", "ckpt_3.pt", "ckpt_best.pt"]
    first, second, third = sorted(tmp_path.glob("before_*"))
    assert (first / "ckpt.pt").read_bytes() == b"" and (second / "ckpt.pt").read_bytes() == b"broken"
    assert sorted(p.name for p in third.iterdir()) == ["ckpt.pt", "ckpt_1.pt", "ckpt_2.pt", "log.csv"]


@pytest.mark.parametrize("damage", [lambda raw: raw + b"\0" * 999, lambda raw: b"\xef\xbb\xbf" + raw,
                                    lambda raw: raw[:-30] + b"\0" * 99, lambda raw: b"\0" * len(raw), lambda raw: b""])
def test_a_damaged_log_does_not_stop_a_resume(tmp_path, damage):
    assert small(tmp_path, "--stop_after", "3") == 0
    log = tmp_path / "log.csv"
    raw = log.read_bytes()
    log.write_bytes(damage(raw))
    assert small(tmp_path) == 0
    steps = [row["step"] for row in csv.DictReader(open(log, newline=""))]
    whole_rows = 0 if damage(raw).strip(b"\0") == b"" else 3 if raw in damage(raw) else 2
    assert steps == ["1", "2", "3"][:whole_rows] + ["4"]


def own(folder, tokenizer, *more):
    samples.write_tar(folder / "a.tar", 20)
    (folder / "spm.model").write_bytes(tokenizer.model)
    return ["--images", str(folder / "a.tar"), "--tokenizer", str(folder / "spm.model"), "--image_size", "32", *more]


def test_data_may_move_but_not_become_others(tmp_path, tokenizer, capsys):
    (tmp_path / "old").mkdir()
    words = own(tmp_path / "old", tokenizer, "--image_root", str(tmp_path / "old"))
    assert small(tmp_path / "out", *words, "--stop_after", "2") == 0
    (tmp_path / "old").rename(tmp_path / "new")
    assert small(tmp_path / "out", *[word.replace("/old", "/new") for word in words], "--stop_after", "3") == 0
    shutil.copy(tmp_path / "new" / "a.tar", tmp_path / "new" / "b.tar")
    assert small(tmp_path / "out", *[word.replace("/old/a", "/new/b").replace("/old", "/new") for word in words]) == 2
    assert "--images" in last_line(capsys.readouterr().err)


def test_a_run_without_a_step_leaves_nothing_that_blocks_the_next(tmp_path, capsys):
    """Here a signal before the first step; too many bad records in it are the same."""
    def stops(self, step):
        signal.raise_signal(signal.SIGTERM)

    plain = data.Batches.__getitem__
    data.Batches.__getitem__ = stops
    assert small(tmp_path) == 0
    data.Batches.__getitem__ = plain
    assert "SIGTERM: no step is done" in capsys.readouterr().out and not (tmp_path / "ckpt.pt").exists()
    assert small(tmp_path, "--lr", "0.01") == 0


@pytest.mark.parametrize("error, told", [
    ("Failed to find C compiler. Please specify via CC environment variable.", "--compile and Triton on a GPU need a C comp"),
    ("CUDA out of memory. Tried to allocate 2.00 GiB.", "memory is full: choose a smaller --batch"),
    ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", "memory is full")])
def test_what_torch_has_no_exception_for_is_one_line(error, told, tmp_path, capsys):
    def step(*args):
        raise RuntimeError(error)

    assert train.main(["--out", str(tmp_path), *SMALL], step) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_srun_without_torchrun_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert train.main(["--out", str(tmp_path / "out")]) == 2
    assert "torchrun" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_it_can_be_imported_where_there_is_no_fcntl_and_no_resource(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(benchmark, "resource", None)
    spec = importlib.util.spec_from_file_location("train_on_windows", train.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_on_windows", module)
    spec.loader.exec_module(module)
    assert module.speed([None, None], 1.0, 0.0)["memory_mb"] == "0"


def test_the_start_says_what_the_data_are_and_val_names_the_best_step(tmp_path, tokenizer, capsys):
    """Own images to validate on: recall of languages with images, of those only in parallel text, and of the others."""
    samples.write_tar(tmp_path / "a.tar", 20, text="txt")
    samples.write_tar(tmp_path / "val.tar", 9, first=50)
    (tmp_path / "p.tsv").write_text("a red ball\tune balle rouge\n" * 30)
    (tmp_path / "spm.model").write_bytes(tokenizer.model)
    assert small(tmp_path / "out", "--images", f"{tmp_path}/a.tar@en", "--texts", f"{tmp_path}/p.tsv@en,fr", "--val",
                 f"{tmp_path}/val.tar", "--tokenizer", f"{tmp_path}/spm.model", "--image_size", "32", "--steps", "14",
                 "--validate_every", "7") == 0
    said = capsys.readouterr().out
    assert "20 images of 32 x 32 pixels in en: 14 steps of 8 are 5.6 epochs" in said
    assert "30 pairs in en fr: 14 steps of 8 are 3.73 epochs" in said and "2 steps to go: until" in said
    assert checkpoint(tmp_path / "out")["config"]["languages"] == {"seen": ["en"], "text_only": ["fr"]}
    rows = list(csv.DictReader(open(tmp_path / "out" / "log.csv", newline="")))
    means = {}
    for row in rows:
        scores = [float(row[f"val_{group}_{k}"] or -1) for group in ("seen", "text_only", "never") for k in train.RECALLS]
        means[row["step"]] = sum(scores) / 6
    best = max(means, key=means.get)
    assert best in ("7", "14") and f"best validation so far: mean {means[best]:.1f} at step " in said
