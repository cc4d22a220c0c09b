"""What the kernels must equal: dense float64 references, random cases, and the error between them. For tests and bench.

Letters as in the two kernel files: B, N, T, H, d, E.
"""
import torch
import torch.nn.functional as F

from kernels.attention import attention
from kernels.contrastive import contrastive, contrastive_naive

DTYPES = dict(fp64=torch.float64, fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
ALLOWED = dict(fp64=1e-13, fp32=1e-5, fp16=1e-3, bf16=1e-2)


def attention_dense(q, k, v, q_starts, k_starts, memory=None, bias=None):
    """One sequence at a time, one formula: the reference."""
    out = []
    for i in range(len(q_starts) - 1):
        m = i if memory is None else int(memory[i])
        queries = q[q_starts[i]:q_starts[i + 1]]                                       # (n, H, d)
        keys, values = (x[k_starts[m]:k_starts[m + 1]] if m >= 0 else x[:0] for x in (k, v))
        s = torch.einsum("thd,shd->hts", queries, keys) / q.shape[2] ** 0.5
        out.append(torch.einsum("hts,shd->thd", (s if bias is None else s + bias).softmax(-1), values))
    return torch.cat(out)


def random_attention(seed: int, dtype, device="cpu", longest: int = 200, moat: int = 0):
    """A random ragged case in which some query sees a key: empty sequences, memory used often, once, never or missing
    (-1); every fourth with a bias."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))
    lengths = lambda n: torch.tensor([0 if pick(0, 7) == 0 else pick(1, longest) for _ in range(n)])
    H, d, K = 1 + (pick(0, 3) == 0), 16 * pick(1, 8), pick(1, 3)
    while True:
        k_lengths, memory = lengths(K), None
        if seed % 4 == 0:                                                              # fixed length, for the bias
            k_lengths[:] = pick(1, longest)
            q_lengths = k_lengths
        elif seed % 4 == 1:
            q_lengths = lengths(K)                                                     # own keys, other lengths
        else:
            q_lengths = lengths(pick(1, 4))
            memory = torch.tensor([pick(-1, K - 1) for _ in q_lengths])
        keys = k_lengths if memory is None else k_lengths[memory] * (memory >= 0)
        if (q_lengths * keys).any():
            return attention_case(g, q_lengths, k_lengths, memory, seed % 4 == 0, H, d, dtype, device, moat)


def attention_case(g, q_lengths, k_lengths, memory, biased: bool, H: int, d: int, dtype, device="cpu", moat: int = 0):
    """Random numbers from generator g for given lengths. moat: so many rows of nan lie around every matrix, where no
    kernel may look. -> the arguments of attention(); q, k, v and bias ask for a gradient"""
    def matrix(rows):
        x = torch.full((rows + 2 * moat, H, d), torch.nan, dtype=dtype, device=device)
        x[moat:moat + rows] = torch.randn(rows, H, d, generator=g, dtype=torch.float64).to(x)
        return x[moat:moat + rows].requires_grad_()
    q, k, v = (matrix(int(lengths.sum())) for lengths in (q_lengths, k_lengths, k_lengths))
    q_starts, k_starts = (F.pad(x.cumsum(0), (1, 0)).to(device, torch.int32) for x in (q_lengths, k_lengths))
    n, bias = int(q_lengths[0]), None
    if biased:
        bias = torch.randn(H, n, n, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
    return q, k, v, q_starts, k_starts, None if memory is None else memory.to(device), bias


def attention_with_shared_keys(dtype, device="cpu", moat: int = 0):
    """One fixed case with what a random one may lack: several sequences, one of them empty, read the same keys, in more
    than one block; keys that nobody reads lie between; the last sequence reads nothing; d = 48 is no power of two."""
    lengths = [torch.tensor(x) for x in ([5, 0, 40, 150, 7], [150, 30, 9])]
    return attention_case(torch.Generator().manual_seed(0), *lengths, torch.tensor([0, 2, 0, 2, -1]), False, 2, 48,
                          dtype, device, moat)


def attention_and_reference(case):
    """-> {"out", "dq", "dk", "dv", "dbias": (result, dense float64 reference)}, and the incoming gradient's norm"""
    inputs = [x for x in (*case[:3], case[6]) if x is not None]
    out = attention(*case)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
    results = [out, *torch.autograd.grad(out, inputs, incoming)]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    starts, memory = [x.cpu() for x in case[3:5]], case[5] if case[5] is None else case[5].cpu()
    out = attention_dense(*exact[:3], *starts, memory, *exact[3:])
    references = [out, *torch.autograd.grad(out, exact, incoming.double().cpu())]
    pairs = zip((x.detach().double().cpu() for x in results), references)
    return dict(zip(("out", "dq", "dk", "dv", "dbias"), pairs)), incoming.double().norm().item()


def relative(pairs, incoming: float, each: bool = False) -> dict:
    """-> for every pair: max |x - reference| / max(max |reference|, 1e-3 |incoming gradient|). each: every element by
    its own |reference|; then a small sum of large terms counts as wrong, which 16 bits cannot avoid."""
    size = lambda y: (y.abs() if each else y.abs().amax()).clamp(min=max(1e-3 * incoming, 1e-300))
    return {name: ((x - y).abs() / size(y)).max().item() if y.numel() else 0.0 for name, (x, y) in pairs.items()}


def attention_errors(case) -> dict:
    return relative(*attention_and_reference(case))


def random_contrast(seed: int, B: int, N: int, first_row: int, temperature: float, dtype, device="cpu", E: int = 32):
    """Unit vectors, partners alike, about a third of the items sharing one of their two ids with another item."""
    g = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(n, E, generator=g, dtype=torch.float64), dim=1) for n in (B, N))
    a = F.normalize(a + b[first_row:first_row + B], dim=1)
    ids = torch.stack([torch.randint(0, 3 * N, (N,), generator=g) for _ in range(2)], 1).to(device)
    a, b = (x.to(device, dtype).requires_grad_() for x in (a, b))
    t = torch.tensor(temperature, dtype=torch.promote_types(dtype, torch.float32), device=device, requires_grad=True)
    return a, b, t, ids[first_row:first_row + B], ids, first_row


def contrast_loss(row_lse, column_lse, positives, N: int):
    columns = column_lse.masked_fill(column_lse == -torch.inf, 0)                      # of one process of several
    return (row_lse.sum() + columns.sum() - 2 * positives.sum()) / (2 * N)


def contrast_errors(case, run=contrastive) -> dict:
    """-> |x - reference| / max(|reference|, floor), element by element; floor 1 for the loss, 1 / (N t) for a vector's
    gradient, 1 / t for the temperature's."""
    N, t = len(case[1]), case[2].item()
    loss = contrast_loss(*run(*case, None)[:3], N)
    exact = [x.detach().double().requires_grad_() for x in case[:3]]
    reference = contrast_loss(*contrastive_naive(*exact, *case[3:])[:3], N)
    pairs = [(loss, reference), *zip(torch.autograd.grad(loss, case[:3]), torch.autograd.grad(reference, exact))]
    return {name: ((x.double() - y).abs() / y.abs().clamp(min=floor)).max().item()
            for name, (x, y), floor in zip(("loss", "da", "db", "dt"), pairs, (1, 1 / N / t, 1 / N / t, 1 / t))}
