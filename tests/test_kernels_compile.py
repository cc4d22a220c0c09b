"""Would the kernels run on a GPU that is not here? Compiled offline, in processes that do not interpret.

By default a few, for all of NVIDIA's GPUs from Ampere on. KERNELS_FULL=1 pytest tests/test_kernels_compile.py compiles
every kernel, type and width: a quarter of an hour. And what is done around the kernels, and in vain, is counted.
"""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import bench, triton_installed
from kernels.attention import attention_torch

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


class Operations(TorchDispatchMode):
    """What torch does, but for views and for memory that it only reserves."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        out = function(*args, **(kwargs or {}))
        reserves = name.startswith(("empty", "new_empty", "detach"))
        if isinstance(out, torch.Tensor) and not function.is_view and not reserves:
            self.names.append(name)
        return out

    def __enter__(self):
        self.names = []
        return super().__enter__()


@pytest.mark.parametrize("biased, before, after", [(False, [], []), (True, ["constant_pad_nd"], ["sum"])])
def test_at_most_one_operation_stands_before_and_after_the_kernels(biased, before, after, monkeypatch):
    """q, k and v as one product gives them."""
    from kernels import attention_triton as module
    forward, backward = (operator._init_fn for operator in (module.attention_op, module.attention_backward_op))
    q, k, v = torch.zeros(8, 3, 2, 64, dtype=torch.bfloat16).unbind(1)
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    given = []
    monkeypatch.setattr(module, "attention_op", lambda *x: given.extend(x) or (q, q))

    def call():
        with Operations() as around:
            module.attention_triton(q, k, v, starts, starts, torch.zeros(2, 4, 4) if biased else None)
            out, lse = forward(*given)                               # the function: no mode sees inside an operator
        with Operations() as behind:
            backward(out, *given, out, lse)
        assert ([name for name in around.names if name != "zeros"], behind.names) == (before, after)
    assert len(bench.launches(module, call)) == (4 if biased else 3)


def test_few_products_are_executed_in_vain():
    """Attention of preset base, by the tiles of a GPU: times the products of real rows."""
    found = {title: bench.work(*case)["ours"] for title, case in bench.base_cases().items()}
    shares = {title: flops / needed for title, (flops, needed, _) in found.items()}
    assert 1 < shares["512 captions read 128 images"] <= 1.9 and 1 < shares["512 sentences read 128 sentences"] <= 3


def test_the_bench_compares_ways_that_compute_the_same(monkeypatch):
    """On a CPU, varlen_attn being attention_torch."""
    import torch.nn.attention.varlen as varlen
    monkeypatch.setattr(varlen, "varlen_attn", lambda *x: attention_torch(*x[:5]))
    q_lengths, k_lengths = torch.tensor([[3, 1], [2, 5], [4, 4]]), torch.tensor([6, 2, 4])
    ways = bench.ways(q_lengths, k_lengths, False, "cpu", torch.float32)
    outs = {name: run() for name, (run, _) in ways.items()}
    real = torch.arange(5) < q_lengths.flatten()[:, None]
    outs["padded SDPA"] = outs["padded SDPA"].transpose(1, 2)[real]
    assert len(outs) == 4 and all(torch.allclose(out, outs["ours"], atol=1e-5) for out in outs.values())
    assert all(x.grad is None and x.requires_grad for _, inputs in ways.values() for x in inputs)
