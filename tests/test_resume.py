"""Stopped and resumed == uninterrupted, bitwise: weights, optimizer, and every column of the log but timing and memory.

    python tests/test_resume.py 20          kill 20 runs (1 and 2 processes by turns) at random; how many resume exactly
"""
import argparse
import csv
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train                                                                 # noqa: E402
TINY = ("--steps 14 --save_every 3 --log_every 1 --batch 8 --text_batch 8 --width 32 --vision_mlp 64 "
        "--text_mlp 64 --fusion_mlp 64 --vision_layers 1 --dropout 0.1 --no-eval --processes 1").split()
NOT_BITWISE = {"seconds", "images_per_s", "sentences_per_s", "data_wait", "memory_mb"}


def command(out, processes, *more):
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *run, "train.py", "--out", str(out), *TINY, *more]


def start(out, processes=1, *more):
    """A run in a process group of its own, so that one signal reaches torchrun and all its children."""
    return subprocess.Popen(command(out, processes, *more), cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(out, processes=1, *more):
    run = start(out, processes, *more)
    text = run.communicate(timeout=300)[0]
    assert run.returncode == 0, text[-3000:]
    return text


def here(out, *more):
    """A run in this process: what a child takes to start is most of a short run."""
    return train.main(["--out", str(out), *TINY, *more])


def steps_done(out):
    log = pathlib.Path(out, "log.csv")
    return max(0, len(log.read_text().splitlines()) - 1) if log.exists() else 0


def kill_after(out, step, processes=1, with_signal=signal.SIGKILL):
    """Starts a run and signals all its processes as soon as `step` steps are logged -> its exit status. By name:
    torchrun puts every process in a session of its own, which a signal to one group does not reach."""
    run = start(out, processes)
    while steps_done(out) < step and run.poll() is None:
        time.sleep(0.002)
    if run.poll() is None:
        subprocess.run(["pkill", f"-{int(with_signal)}", "-f", "--", f"--out {out} "], check=True)
    run.communicate(timeout=120)
    return run.returncode


def same(a, b):
    """Are two checkpoints and logs equal to the bit? Raises AssertionError naming the first difference."""
    x, y = (torch.load(pathlib.Path(out, "ckpt.pt"), weights_only=True) for out in (a, b))
    assert x["step"] == y["step"]
    for name, value in x["model"].items():
        assert torch.equal(value, y["model"][name]), name
    for i, moments in x["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, y["optimizer"]["state"][i][name]), (i, name)
    rows = [list(csv.DictReader(open(pathlib.Path(out, "log.csv"), newline=""))) for out in (a, b)]
    assert [r["step"] for r in rows[0]] == [str(i + 1) for i in range(len(rows[0]))]
    for first, second in zip(*rows, strict=True):
        for name in first.keys() - NOT_BITWISE:
            assert first[name] == second[name], (first["step"], name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole")
    assert here(out) == 0
    return out


@pytest.fixture(scope="module")
def whole2(tmp_path_factory):
    """The same of two."""
    out = tmp_path_factory.mktemp("whole2")
    finish(out, 2)
    return out


def test_a_killed_run_resumes_bitwise(tmp_path, whole):
    kill_after(tmp_path, 8)
    assert steps_done(tmp_path) < 14 and here(tmp_path) == 0
    same(tmp_path, whole)


def test_two_killed_processes_resume_bitwise(tmp_path, whole2):
    kill_after(tmp_path, 7, 2)
    assert steps_done(tmp_path) < 14
    finish(tmp_path, 2)
    same(tmp_path, whole2)


def test_n_plus_n_steps_equal_two_n(tmp_path, whole):
    """--stop_after stops inside the same schedule; the command without it goes on; a finished run trains no more."""
    assert here(tmp_path, "--stop_after", "7") == 0 and steps_done(tmp_path) == 7
    assert here(tmp_path) == 0
    same(tmp_path, whole)
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert here(tmp_path) == 0 and (tmp_path / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_saves_and_exits_with_status_0(tmp_path, whole, name):
    """SIGTERM from a scheduler, Ctrl-C, a closed terminal, SLURM's warning: workers get it too and stay until the end."""
    assert kill_after(tmp_path, 4, with_signal=getattr(signal, name)) == 0
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert 4 <= saved < 14 and saved == steps_done(tmp_path)
    assert here(tmp_path) == 0
    same(tmp_path, whole)


def test_torchrun_stops_on_sigterm_although_its_processes_get_it_twice(tmp_path):
    """From the sender, and again from torchrun. Both save the same step, and the same command continues."""
    kill_after(tmp_path, 4, 2, signal.SIGTERM)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert 4 <= saved < 14 and saved == steps_done(tmp_path)
    assert finish(tmp_path, 2) and steps_done(tmp_path) == 14


def test_a_run_listens_to_every_signal_by_which_schedulers_and_terminals_end_it():
    """That each saves is shown of two of them above; here, that the others have the same handler."""
    run = argparse.Namespace(signal="", waiting=False)
    with train.signals_noted(run):
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, name))
            assert run.signal == name


def test_on_cpus_a_run_starts_its_second_process_itself_and_ctrl_c_reaches_both(tmp_path, whole2):
    run = start(tmp_path, 1, "--processes", "2")
    while steps_done(tmp_path) < 4 and run.poll() is None:
        time.sleep(0.002)
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate()[0]
    assert run.returncode == 0 and said.count("SIGINT: saved") == 1 and "2 process(es)" in said
    assert "error" not in finish(tmp_path, 1, "--processes", "2")
    same(tmp_path, whole2)


def test_other_settings_are_refused_and_fresh_starts_over(tmp_path, whole, capsys):
    assert here(tmp_path, "--stop_after", "3") == 0
    assert here(tmp_path, "--lr", "0.5") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "--lr" in said[0]
    assert here(tmp_path, "--fresh") == 0
    same(tmp_path, whole)


def test_kept_checkpoints_are_those_before_the_last(tmp_path):
    assert here(tmp_path, "--keep", "2") == 0
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["ckpt.pt", "ckpt_12.pt", "ckpt_9.pt"]


if __name__ == "__main__":
    count, exact, killed = int(sys.argv[1]), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            finish(f"{folder}/whole{processes}", processes)
        for i in range(count):
            processes, step = 1 + i % 2, random.Random(i).randint(1, 13)
            kill_after(f"{folder}/{i}", step, processes)
            reached = steps_done(f"{folder}/{i}")
            finish(f"{folder}/{i}", processes)
            same(f"{folder}/{i}", f"{folder}/whole{processes}")
            exact += 1
            killed += reached < 14
            print(f"{i + 1:3}: {processes} process(es), stood at step {reached} of 14: resumed exactly", flush=True)
    print(f"{exact} of {count} resumed exactly, {killed} of them killed before their last step")
