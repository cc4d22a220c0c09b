"""What the kernels must equal: dense float64 references, random cases, and the error between them.
For tests and bench.

Letters as in the kernel files: B, N, T, H, d, E.
"""
import torch
import torch.nn.functional as F

from kernels.attention import attention
from kernels.contrastive import contrastive, contrastive_naive
from kernels.packed import offsets

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
ALLOWED = {"fp64": 1e-13, "fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2}

# --------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------

def attention_dense(q, k, v, q_starts, k_starts, bias=None):
    """One sequence at a time, one formula: the reference."""
    out = []
    for i in range(len(q_starts) - 1):
        queries = q[q_starts[i]:q_starts[i + 1]]                         # (n, H, d)
        keys = k[k_starts[i]:k_starts[i + 1]]                            # (m, H, d)
        values = v[k_starts[i]:k_starts[i + 1]]                          # (m, H, d)
        s = torch.einsum("thd,shd->hts", queries, keys) / q.shape[2] ** 0.5
        if bias is not None:
            s = s + bias
        out.append(torch.einsum("hts,shd->thd", s.softmax(-1), values))  # (n, H, d)
    return torch.cat(out)


def random_attention(seed: int, dtype, device="cpu", longest: int = 200, moat: int = 0):
    """A random ragged case in which some query reads a key: empty sequences, self-attention, one
    head or two, every width; every fourth with a bias."""
    g = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    def lengths(n):
        return torch.tensor([0 if pick(0, 7) == 0 else pick(1, longest) for _ in range(n)])

    H = 2 if pick(0, 3) == 0 else 1
    d = 16 * pick(1, 8)
    while True:
        k_lengths = lengths(pick(1, 4))
        if seed % 4 == 0:
            k_lengths[:] = pick(1, longest)                              # one length, for the bias
        q_lengths = k_lengths
        if seed % 4 >= 2:
            q_lengths = lengths(len(k_lengths))
        if (q_lengths * k_lengths).any():
            return attention_case(g, q_lengths, k_lengths, seed % 4 == 0, (H, d), dtype, device,
                                  moat)


def attention_case(g, q_lengths, k_lengths, biased, shape, dtype, device="cpu", moat: int = 0):
    """Random numbers from generator g for given lengths; shape: (H, d). moat: so many rows of nan
    lie around every matrix, where no kernel may look. -> the arguments of attention(); q, k, v and
    bias ask for a gradient"""
    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(device, dtype)

    def matrix(lengths):
        rows = int(lengths.sum())
        x = torch.full((rows + 2 * moat, *shape), torch.nan, dtype=dtype, device=device)
        x[moat:moat + rows] = normal(rows, *shape)
        return x[moat:moat + rows].requires_grad_()

    q = matrix(q_lengths)
    k = matrix(k_lengths)
    v = matrix(k_lengths)
    bias = None
    if biased:
        n = int(q_lengths[0])
        bias = normal(shape[0], n, n).requires_grad_()
    q_starts = offsets(q_lengths).to(device)
    k_starts = offsets(k_lengths).to(device)
    return q, k, v, q_starts, k_starts, bias


def attention_of_groups(dtype, device="cpu", moat: int = 0):
    """One fixed case with what a random one may lack: queries in more than one block, keys too, no
    queries, no keys, neither, and d = 48, which is no power of two."""
    q_lengths = torch.tensor([7, 195, 0, 0, 1, 0, 0, 3])
    k_lengths = torch.tensor([0, 150, 30, 0, 9, 0, 0, 140])
    g = torch.Generator().manual_seed(0)
    return attention_case(g, q_lengths, k_lengths, False, (2, 48), dtype, device, moat)


def attention_and_reference(case):
    """-> {"out", "dq", "dk", "dv", "dbias": (result, dense float64 reference)}, and the incoming
    gradient's norm"""
    *inputs, q_starts, k_starts, bias = case
    if bias is not None:
        inputs.append(bias)
    g = torch.Generator().manual_seed(0)
    incoming = torch.randn(case[0].shape, generator=g, dtype=torch.float64).to(case[0])

    out = attention(*case)
    results = [out, *torch.autograd.grad(out, inputs, incoming)]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    starts = (q_starts.cpu(), k_starts.cpu())
    out = attention_dense(*exact[:3], *starts, *exact[3:])
    references = [out, *torch.autograd.grad(out, exact, incoming.double().cpu())]

    pairs = {}
    for name, x, reference in zip(("out", "dq", "dk", "dv", "dbias"), results, references):
        pairs[name] = (x.detach().double().cpu(), reference)
    return pairs, incoming.double().norm().item()


def relative(pairs, incoming: float, each: bool = False) -> dict:
    """-> for every pair: max |x - reference| / max(max |reference|, 1e-3 |incoming gradient|).
    each: every element by its own |reference|; then a small sum of large terms counts as wrong,
    which 16 bits cannot avoid."""
    floor = max(1e-3 * incoming, 1e-300)
    errors = {}
    for name, (x, reference) in pairs.items():
        errors[name] = 0.0
        if reference.numel():
            size = reference.abs() if each else reference.abs().amax()
            errors[name] = ((x - reference).abs() / size.clamp(min=floor)).max().item()
    return errors


def attention_errors(case) -> dict:
    return relative(*attention_and_reference(case))


# --------------------------------------------------------------------------------------------------
# Contrast
# --------------------------------------------------------------------------------------------------

def random_contrast(seed: int, sizes, temperature: float, dtype, device="cpu", E: int = 32):
    """Unit vectors, partners alike, about a third of the items sharing their id with another.
    sizes: (B, N, first_row). -> the arguments of contrastive()"""
    B, N, first_row = sizes
    own = slice(first_row, first_row + B)
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(B, E, generator=g, dtype=torch.float64)
    b = torch.randn(N, E, generator=g, dtype=torch.float64)
    b = F.normalize(b, dim=1)
    a = F.normalize(F.normalize(a, dim=1) + b[own], dim=1)
    ids = torch.randint(0, 3 * N, (N,), generator=g).to(device)
    a = a.to(device, dtype).requires_grad_()
    b = b.to(device, dtype).requires_grad_()
    t_dtype = torch.promote_types(dtype, torch.float32)
    t = torch.tensor(temperature, dtype=t_dtype, device=device, requires_grad=True)
    return a, b, t, ids[own], ids, first_row


def contrast_loss(row_lse, column_lse, positives):
    columns = column_lse.masked_fill(column_lse == -torch.inf, 0)        # of one process of several
    return (row_lse.sum() + columns.sum() - 2 * positives.sum()) / (2 * len(columns))


def contrast_errors(case, run=contrastive) -> dict:
    """-> |x - reference| / max(|reference|, floor), element by element; floor 1 for the loss,
    1 / (N t) for a vector's gradient, 1 / t for the temperature's."""
    N = len(case[1])
    t = case[2].item()
    loss = contrast_loss(*run(*case))
    exact = [x.detach().double().requires_grad_() for x in case[:3]]
    reference = contrast_loss(*contrastive_naive(*exact, *case[3:]))
    results = [loss, *torch.autograd.grad(loss, case[:3])]
    references = [reference, *torch.autograd.grad(reference, exact)]
    floors = {"loss": 1, "da": 1 / N / t, "db": 1 / N / t, "dt": 1 / t}
    errors = {}
    for (name, floor), x, y in zip(floors.items(), results, references):
        errors[name] = ((x.double() - y).abs() / y.abs().clamp(min=floor)).max().item()
    return errors
