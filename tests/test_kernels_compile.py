"""Would the kernels run on a GPU that is not here? Compiled offline, in processes that do not interpret.

By default a few on sm_80 and sm_90. KERNELS_FULL=1 pytest tests/test_kernels_compile.py compiles every kernel, type and
width for sm_80 and sm_90: some minutes.
"""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from kernels import triton_installed

pytestmark = pytest.mark.skipif(not triton_installed(), reason="triton is not installed (pip install triton)")

BAD = """
import triton, triton.language as tl, torch
from kernels.bench import compiled
@triton.jit
def product(x, K: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, K)
    a = tl.load(x + i[:, None] * K + k[None, :])
    tl.store(x + i[:, None] * 16 + i[None, :], tl.dot(a, a.T).to(tl.bfloat16))
for K in (16, 8):
    try:
        print(K, compiled(product, dict(x=torch.zeros(256, dtype=torch.bfloat16), K=K), "sm_90")["tensor"])
    except Exception as error:
        print(K, "refused", type(error).__name__)
"""


EXTENT = () if os.environ.get("KERNELS_FULL") else ("--quick",)


@pytest.mark.ahead("-m", "kernels.bench", "--only", "resources", *EXTENT, TRITON_INTERPRET="0")
def test_kernels_compile_without_spills_and_use_tensor_cores(ahead):
    status, said = ahead()
    print(said)
    assert status == 0, said
    rows = [line for line in said.splitlines() if line.startswith(("| attention", "| contrast"))]
    assert len(rows) >= 13 and "!" not in "".join(rows)


def test_a_product_too_small_for_tensor_cores_is_refused(tmp_path):
    """The interpreter would take it: this is why compiling is a test."""
    (tmp_path / "bad.py").write_text(BAD)
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, tmp_path / "bad.py"], env=env, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert int(lines[0].split()[1]) > 0 and lines[1].startswith("8 refused"), run.stdout + run.stderr[-2000:]
