"""The optimizers: AdamW as published, and Muon, with which the demo learns from fewer steps.

AdamW moves every number of a matrix by itself. Muon (Keller Jordan, 2024) takes the matrix as one
thing: of its gradient's running mean M = U S V^T it takes the step U V^T. All directions move
equally far, also the weak ones, which a few strong ones hide from AdamW. This is for the weights of
linear layers and convolutions. Tables of vectors, norms and biases stay with AdamW.

    python train.py --optimizer adamw       --preset base, large and all fine-tuning have it anyway
"""
import torch
import torch.distributed as dist
from torch import nn

MOMENTUM = 0.95                         # of Muon's running mean: its author's value
# x -> a x + b x^3 + c x^5 brings every x in (0, 1] near 1 in five applications (its author's too).
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
# A step of AdamW has entries of about 0.2 to 0.4 of the rate. With this factor Muon's have the same
# size, and both take one rate (Moonshot, arXiv 2502.16982, section 2.2).
ENTRY = 0.2


def parameter_groups(model, rate, weight_decay=0.01):
    """An optimizer's groups: no decay for vectors and scalars (biases, norms, layer scale,
    temperature). rate: a function of a parameter's name -> its peak learning rate; 0 freezes the
    parameter. "matrices": weights of linear layers and convolutions, which Muon moves."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    matrices = {id(layer.weight) for layer in layers}
    groups = {}
    for name, p in model.named_parameters():
        decay = weight_decay if p.ndim >= 2 else 0.0
        if rate(name) == 0:
            p.requires_grad_(False)             # no gradient, so nothing of it is clipped either
            continue
        groups.setdefault((rate(name), decay, id(p) in matrices), []).append(p)
    return [{"params": params, "lr": peak, "peak_lr": peak, "weight_decay": decay,
             "matrices": is_matrix} for (peak, decay, is_matrix), params in groups.items()]


def orthogonal(matrix, steps=5):
    """(n, m) with singular values S -> (n, m) of the same singular vectors, S near 1.

    Odd powers of a matrix, as M M^T M, change its singular values alone. So a polynomial that
    brings numbers of (0, 1] near 1, applied to the matrix, does this to all of them: no SVD. In
    float32: torch.optim.Muon does the same in bf16, 20 times as slow on a CPU without bf16."""
    a, b, c = POLYNOMIAL
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix                                         # (n, m), n <= m
    x = x / x.norm().clamp(min=1e-7)                                         # S <= 1
    for _ in range(steps):
        square = x @ x.T                                                     # S^2, (n, n)
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)    # bS^2 + cS^4
        x = torch.addmm(x, polynomial, x, beta=a)                            # aS + bS^3 + cS^5
    return x.T if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups of "matrices". (A convolution's weight (out, in, k, k) counts as a
    matrix (out, in k k).)"""

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        pairs = [(p, group) for group in groups if group["matrices"]
                 for p in group["params"] if p.grad is not None]
        if pairs:
            self.move(pairs)
        # AdamW's own step moves the rest.
        self.param_groups = [group for group in groups if not group["matrices"]]
        super().step()
        self.param_groups = groups

    def move(self, pairs):
        """A step of all matrices. pairs: [(a matrix, its group)]. Processes, which have the same
        gradients, orthogonalise a share of them each, and send each other what they found."""
        ahead = [self.ahead(p) for p, _ in pairs]
        flat = ahead[0].new_zeros(sum(matrix.numel() for matrix in ahead))
        steps = flat.split([matrix.numel() for matrix in ahead])
        several = dist.is_initialized()
        first, every = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        for k in range(first, len(ahead), every):
            steps[k].copy_(orthogonal(ahead[k]).flatten())
        if several:
            dist.all_reduce(flat)               # a sum in which all others have zeros
        for (p, group), step, matrix in zip(pairs, steps, ahead):
            # An orthogonal (n, m) has entries of about 1 / sqrt(max(n, m)).
            size = ENTRY * max(matrix.shape) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(step.view_as(p), alpha=group["lr"] * size)

    def ahead(self, p):
        """A matrix's running mean of gradients, and one gradient ahead of it (Nesterov), (n, m)."""
        state = self.state[p]
        if not state:                           # AdamW, which loads all states, asks for a "step"
            state |= {"step": torch.tensor(0.0), "mean": torch.zeros_like(p)}
        state["step"] += 1
        state["mean"].lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(state["mean"], MOMENTUM).flatten(1)


OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}
