"""The Triton kernels against dense float64 references and against torch.

    TRITON_INTERPRET=1 pytest tests/test_kernels_numbers.py        in the interpreter, on CPU tensors
    pytest -m gpu tests/test_kernels_numbers.py                    on a GPU
Started plainly on a machine without a GPU, all of it is skipped; test_kernels_interpreter.py starts it as above.
"""
import collections
import functools
import inspect
import pathlib
import traceback

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import train

from kernels import attention_triton, contrastive_triton, interpreting
from kernels.attention import attention
from kernels.contrastive import contrastive
from kernels.packed import offsets
from kernels.reference import (ALLOWED, DTYPES, attention_case, attention_errors, attention_of_groups, contrast_errors,
                               contrast_loss, random_attention, random_contrast)
from test_packing import gradients_in_chunks_and_with_checkpointing

DEVICE = "cpu" if interpreting() else "cuda"
if interpreting():
    from triton.runtime import interpreter

    @functools.cache
    def built_in(package):
        return [name for name, member in inspect.getmembers(package) if interpreter.tl.core.is_builtin(member)]

    def patch_builtin(package, builder, scope):
        """As triton's own, which lists all members again for every function that a kernel calls: half of the time."""
        for name in built_in(package):
            member = getattr(package, name)
            if interpreter.tl.core.is_builtin(member):                               # not patched yet
                interpreter._patch_attr(package, name, member, builder, scope)
    interpreter._patch_builtin = patch_builtin
else:
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, and not in the interpreter")
    pytestmark = [pytest.mark.gpu, no_gpu]
TYPES = [name for name in DTYPES if interpreting() or name != "fp64"]                # on a GPU float64 is left to torch
CASES = 50                                                                           # per dtype: 200 in all


@pytest.mark.parametrize("name", TYPES)
def test_attention_equals_dense_float64_on_random_ragged_batches(name):
    for seed in range(CASES):
        case = random_attention(CASES * TYPES.index(name) + seed, DTYPES[name], DEVICE, 200 if seed % 3 == 0 else 70)
        errors = attention_errors(case)
        assert max(errors.values()) <= ALLOWED[name], (seed, errors)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("sizes", [(128, 128), (32, 64), (64, 32)])
def test_attention_of_groups_equals_dense_float64_whatever_the_tile(name, sizes, monkeypatch):
    if interpreting():
        monkeypatch.setattr(attention_triton, "tile_sizes", lambda *_: (*sizes, 4, 1))
    lengths = torch.tensor([137, 137])
    biased = attention_case(torch.Generator().manual_seed(1), lengths, lengths, True, (1, 32), DTYPES[name], DEVICE)
    for case in (attention_of_groups(DTYPES[name], DEVICE), biased):
        errors = attention_errors(case)
        assert max(errors.values()) <= ALLOWED[name], errors


@pytest.mark.parametrize("name", TYPES)
def test_contrast_equals_dense_float64(name):
    shapes = [(1, 1, 0), (2, 3, 1), (37, 91, 50), (130, 130, 0), (259, 600, 341)]
    for B, N, first_row in shapes:
        for t in (0.5, 0.07, 0.02, 0.001):
            errors = contrast_errors(random_contrast(N, (B, N, first_row), t, DTYPES[name], DEVICE))
            extreme = 10 if t == 0.001 and name in ("fp64", "fp32") else 1               # one rounding of logit 1,000
            assert max(errors.values()) <= extreme * ALLOWED[name], (B, N, t, errors)


def test_gradcheck():
    if not interpreting():
        pytest.skip("float64 kernels run in the interpreter only")
    for seed in (2, 4, 5):                                                           # fast_mode: random projections
        *inputs, q_starts, k_starts, bias = random_attention(seed, torch.float64, longest=5)
        inputs += [] if bias is None else [bias]
        run = lambda q, k, v, b=None: attention(q, k, v, q_starts, k_starts, b)
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    case = random_contrast(0, (4, 9, 3), 0.2, torch.float64, E=5)
    assert torch.autograd.gradcheck(lambda *x: contrastive(*x, *case[3:]), case[:3])


def test_logits_of_ten_thousand_give_no_inf_and_no_nan():
    case = random_attention(3, torch.float32, DEVICE)
    q, k, v = (x.detach() * 100 for x in case[:3])
    assert attention(q, k, v, *case[3:]).isfinite().all()
    a, b, t, *rest = random_contrast(0, (70, 150, 20), 0.001, torch.float32, DEVICE)
    a, b = (30 * x.detach() for x in (a, b))
    loss = contrast_loss(*contrastive(a.requires_grad_(), b.requires_grad_(), t, *rest))
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, (a, b, t))))


def test_keys_nobody_reads_have_gradient_zero_and_queries_without_keys_are_zero():
    q_starts, k_starts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 3, 3, 7], [0, 4, 7, 7]))
    q, k, v = (torch.randn(7, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, q_starts, k_starts)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (out[3:] == 0).all() and (dq[3:] == 0).all() and (dk[4:] == 0).all() and (dv[4:] == 0).all()
    assert (out[:3] != 0).any() and (dv[:4] != 0).any()


@pytest.mark.parametrize("rows", [16, 64])
def test_every_row_is_in_one_block_and_spare_programs_have_none(rows):
    """The arithmetic of find_block, for 3,000 sequences of 0 to 99 tokens."""
    lengths = torch.randint(0, 100, (3000,), generator=torch.Generator().manual_seed(rows))
    starts = offsets(lengths).long()
    number = starts[:-1] // rows + torch.arange(3000)                                # of each sequence's first block
    found = torch.zeros(int(starts[-1]), dtype=torch.int64)
    for block in range(len(found) // rows + 3000):
        i = int((number <= block).sum()) - 1
        first = int(starts[i] + (block - number[i]) * rows)
        found[first:min(first + rows, int(starts[i + 1]))] += 1
    assert (found == 1).all()


def test_more_sequences_than_one_slice_of_starts(monkeypatch):
    count = 3000
    if interpreting():
        monkeypatch.setattr(attention_triton, "SLICE", attention_triton.tl.constexpr(8))     # not 1,024
        count = 30
    g = torch.Generator().manual_seed(2)
    lengths = [torch.randint(0, 5, (count,), generator=g) for _ in range(2)]
    case = attention_case(g, *lengths, False, (1, 16), torch.float32, DEVICE)
    assert max(attention_errors(case).values()) <= ALLOWED["fp32"]


def test_checkpointing_and_the_gradient_cache_work_with_the_kernels():
    """Gradients equal the plain step's; a checkpoint unpacks each saved tensor only once."""
    few = {"vision_heads": 1, "text_heads": 1, "fusion_heads": 1, "vision_layers": 1, "text_layers": 1}
    gradients_in_chunks_and_with_checkpointing(DEVICE, torch.float32, 1e-5, 4, vision="beit2", **few)


def test_rows_that_lie_apart_give_the_same_bits():
    """q, k and v of one product are read where they are."""
    x = torch.randn(70, 3, 2, 48, device=DEVICE, requires_grad=True)
    starts = offsets(torch.tensor([13, 0, 57])).to(DEVICE)
    results = []
    for q, k, v in (x.unbind(1), [y.contiguous() for y in x.unbind(1)]):
        out = attention(q, k, v, starts, starts)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(a.equal(b) for a, b in zip(*results))


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for a GPU's numbers: {(function of ours, operation): times}. On a CPU nobody waits,
    but the operations are the same. Inside custom operators nothing is counted: they only launch."""
    SIZES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero",
             "_local_scalar_dense")                                                  # the last one is .item()

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def count(self, what):
        ours = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and f.filename != __file__]
        self.found[f"{pathlib.Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else "torch", what] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.split("::")[1], kwargs or {}
        by_mask = name.startswith(("index", "_index")) and isinstance(args[1], (list, tuple)) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        lengths = name == "repeat_interleave" and kwargs.get("output_size") is None
        to_host = name == "_to_copy" and args[0].is_cuda and torch.device(kwargs.get("device") or "cuda").type == "cpu"
        checks = name == "segment_reduce" and not kwargs.get("unsafe")
        if name in self.SIZES or by_mask or lengths or to_host or checks:
            self.count(name)
        return function(*args, **kwargs)


def test_a_training_step_reads_three_things_from_the_device(tmp_path, monkeypatch):
    """How many tokens the drawn texts have, once a stream, and the sums of train_step: for log and verdict."""
    words = ("--batch 4 --text_batch 4 --width 32 --vision_mlp 32 --text_mlp 32 --fusion_mlp 32 --vision beit2 "
             "--no-stem --image_size 32 --vision_layers 2 --drop_path 0.5 --dropout 0.1 --vision_heads 1 "
             "--text_heads 1 --fusion_heads 1 --workers 0 --steps 2 --out").split()
    run = train.prepare(train.settings([*words, str(tmp_path)]), torch.device(DEVICE))
    *batch, stats = run.batches[0]
    batch = [train.to_device(stream, run.device) for stream in batch]
    reads = Reads()
    for name in ("tolist", "numpy", "cpu"):                                          # these pass no dispatch on a CPU
        def read(x, *more, plain=getattr(torch.Tensor, name), name=name):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is reads:   # not inside an operator
                reads.count(name)
            return plain(x, *more)
        monkeypatch.setattr(torch.Tensor, name, read)
    with reads:
        row, verdict = train.train_step(run, batch, stats, 0)
    assert verdict.finite and row["text_match"] > 0
    assert reads.found == {("packed.gather_sequences", "repeat_interleave"): 2, ("train.train_step", "tolist"): 1}


def test_a_column_that_lost_every_row_is_minus_infinity_with_gradient_zero():
    a, b, t, *_ = random_contrast(0, (3, 9, 0), 0.07, torch.float32, DEVICE)
    ids, all_ids = torch.full((3,), 100, device=DEVICE), torch.arange(9, device=DEVICE)
    all_ids[7] = 100
    out = contrastive(a, b, t, ids, all_ids, 0)
    assert out.column_lse[7] == -torch.inf and out.column_lse[:7].isfinite().all()
    da, db, dt = torch.autograd.grad(out.column_lse, (a, b, t), torch.ones_like(out.column_lse))
    assert (db[7] == 0).all() and all(x.isfinite().all() for x in (da, db, dt))


def everything(moat=0):
    """Outputs and gradients of both kernels on fixed cases, as one list."""
    results = []
    for case in (*(random_attention(seed, torch.float32, DEVICE, moat=moat) for seed in (3, 4)),
                 attention_of_groups(torch.float32, DEVICE, moat)):
        out, inputs = attention(*case), [x for x in (*case[:3], case[5]) if x is not None]
        results += [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]
    case = random_contrast(1, (150, 333, 100), 0.07, torch.float32, DEVICE)
    if moat:                                                                         # vectors in a matrix of nan
        wide = [torch.full((len(x) + 2 * moat, 48), torch.nan, device=DEVICE) for x in case[:2]]
        for w, x in zip(wide, case[:2]):
            w[moat:-moat, :32] = x.detach()
        case = (*(w[moat:-moat, :32].requires_grad_() for w in wide), *case[2:])
    out = contrastive(*case)
    return results + [*out, *torch.autograd.grad(contrast_loss(*out), case[:3])]


def test_no_kernel_reads_or_writes_outside_its_matrices(monkeypatch):
    """Inputs lie in seas of nan; outputs start as nan between canaries."""
    plain, guarded = everything(), []

    def new_empty(x, *shape, dtype=None, **_):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        dtype = dtype or x.dtype
        canary = torch.nan if dtype.is_floating_point else 77
        buffer = torch.full((shape.numel() + 512,), canary, dtype=dtype, device=x.device)
        guarded.append(buffer)
        return buffer[256:256 + shape.numel()].view(shape)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, dtype=None, **_: new_empty(x, x.shape, dtype=dtype))
    moated = everything(moat=64)
    monkeypatch.undo()
    assert len(plain) == len(moated) and len(guarded) > 20
    assert all(x.equal(y) for x, y in zip(plain, moated))
    edges = torch.cat([torch.cat([b[:256], b[-256:]]).double() for b in guarded])
    assert ((edges == 77) | edges.isnan()).all()


def test_the_order_of_programs_changes_no_bit(monkeypatch):
    if not interpreting():
        results = [everything() for _ in range(50)]                                  # a GPU's order differs by itself
        assert all(x.equal(y) for run in results[1:] for x, y in zip(results[0], run))
        return
    from triton.runtime.interpreter import InterpreterBuilder
    plain, set_grid_idx = everything(), InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, *at: set_grid_idx(
        self, *(size - 1 - i for size, i in zip(self.grid_dim, at))))
    assert all(x.equal(y) for x, y in zip(plain, everything()))


def test_torch_compile_takes_the_kernels_as_they_are():
    """In one graph, compiled once for any number of tokens or items."""
    compile = lambda function: torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    step = compile(lambda *x: attention(*x).sum())
    cases = [random_attention(seed, torch.float32, DEVICE) for seed in (27, 147)]    # alike in all but their lengths
    assert cases[0][0].shape[1:] == cases[1][0].shape[1:] and len(cases[0][0]) != len(cases[1][0])
    for case, stance in zip(cases, ("default", "fail_on_recompile")):
        expected = torch.autograd.grad(attention(*case).sum(), case[:3])
        with torch.compiler.set_stance(stance):
            assert all(x.equal(y) for x, y in zip(torch.autograd.grad(step(*case), case[:3]), expected))
    step = compile(lambda *x: contrastive(*x, 7))
    for B, N, stance in ((20, 50, "default"), (33, 61, "fail_on_recompile")):
        case = random_contrast(1, (B, N, 7), 0.07, torch.float32, DEVICE)
        with torch.compiler.set_stance(stance):
            got, expected = step(*case[:5]), contrastive(*case)
        assert all(x.equal(y) for x, y in zip(got, expected))
        gradients = [torch.autograd.grad(contrast_loss(*x), case[:3]) for x in (got, expected)]
        assert all(x.equal(y) for x, y in zip(*gradients))


def test_the_kernels_are_what_ran(monkeypatch):
    ran = []
    plain = contrastive_triton.statistics_op
    monkeypatch.setattr(attention_triton, "attention_op", lambda q, *_: ran.append("attention") or (q, q))
    monkeypatch.setattr(contrastive_triton, "statistics_op", lambda *x: ran.append("contrast") or plain(*x))
    attention(*random_attention(3, torch.float32, DEVICE))
    contrastive(*random_contrast(0, (4, 4, 0), 0.07, torch.float32, DEVICE))
    assert ran == ["attention", "contrast"]


def test_many_tiles_per_program_and_many_launches_equal_dense_float64(monkeypatch):
    """The paths of a large batch: sums scaled down as the maximum rises, and partial results of several launches."""
    if interpreting():
        monkeypatch.setattr(contrastive_triton, "tile_sizes", lambda *_: (32, 64, 4))
    monkeypatch.setattr(contrastive_triton, "PROGRAMS", 1)
    monkeypatch.setattr(contrastive_triton, "ROWS_PER_LAUNCH", 128)
    for name in TYPES:
        errors = contrast_errors(random_contrast(0, (259, 600, 341), 0.07, DTYPES[name], DEVICE, E=72))
        assert max(errors.values()) <= ALLOWED[name], errors
