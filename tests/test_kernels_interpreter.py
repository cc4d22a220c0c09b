"""Runs tests/test_kernels_numbers.py in Triton's interpreter: in a process of its own, as a process has one mode.

    KERNELS_FULL=1 pytest tests/test_kernels_interpreter.py        also trains the demo by the kernels: a minute or two
"""
import csv
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from kernels import triton_installed

pytestmark = pytest.mark.skipif(not triton_installed(), reason="triton is not installed (pip install triton)")


def python(*command, interpret):
    env = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
    return child.stdout


@pytest.mark.ahead("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels_numbers.py",
                   TRITON_INTERPRET="1")
def test_the_kernels_pass_their_tests_in_the_interpreter(ahead):
    status, said = ahead()
    assert status == 0, said[-6000:]
    assert int(re.search(r"(\d+) passed", said)[1]) >= 32 and "skipped" not in said


@pytest.mark.skipif(not os.environ.get("KERNELS_FULL"), reason="takes minutes: KERNELS_FULL=1 runs it")
def test_the_demo_trained_by_the_kernels_has_the_losses_of_torch(tmp_path):
    rows = []
    for interpret in (False, True):
        out = tmp_path / str(interpret)
        python("train.py", "--batch", "8", "--text_batch", "8", "--steps", "3", "--no-eval", "--out", str(out), "--processes", "1",
               interpret=interpret)
        rows.append(list(csv.DictReader(open(out / "log.csv"))))
    assert len(rows[0]) == len(rows[1]) == 3
    for x, y in zip(*rows):
        for column in (c for c in x if c == "loss" or c.startswith(("image_", "text_"))):
            assert float(x[column]) == pytest.approx(float(y[column]), rel=1e-4), (column, x[column], y[column])
