"""Exercise 1: a sigmoid in place of the softmax (SigLIP, arXiv 2303.15343).

    python -m pytest tests/exercises/test_sigmoid.py         fails until you have solved it

What to build
    The contrastive loss asks each image: which of N captions is yours? The sigmoid loss asks each
    of the N x N pairs alone: do you belong together? No pair needs to know about the others.

        s_ij = <a_i, b_j> / temperature + bias
        z_ij = 1 where i = j, and -1 elsewhere
        loss = -1/N sum_ij log sigmoid(z_ij s_ij)

    A pair of different items with equal ids is left out, as in contrastive_loss.

    1. losses.py: sigmoid_loss(a, b, temperature, bias) -> scalar, beside contrastive_loss.
    2. model.py: a field `sigmoid: bool = False` of Config. Where it is True, CCLM has a parameter
       `sigmoid_bias`, one number that starts at -10; elsewhere `sigmoid_bias` is None.
    3. losses.py: cross_view calls sigmoid_loss if the model has a sigmoid_bias.

Where to read
    losses.py: "Several processes" and "1. Contrast". model.py: Config and CCLM.__init__.

How the test judges
    By a double loop over pairs, value and gradients; then as two processes would call it: each
    returns W x (its own sum) / N, and the mean over processes is the loss. At last cross_view.

Hint
    gather_vectors gives every process all b. Row i of its B rows has its true partner in column
    rank * B + i. F.logsigmoid does not overflow.

Then
    python train.py --sigmoid --steps 500 --out out/sigmoid
    Why does the bias start at -10 and not at 0? What does a model get that knows nothing but how
    rare true pairs are? (About 1 + ln N: one pair in N is true. Put it into Pretraining.chance.)
"""
import torch

import losses
from model import CCLM, build
from test_losses import views
from test_packing import example, make, packed_losses

IDS = torch.tensor([0, 1, 2, 1, 4, 0])


def judge(a, b, temperature, bias):
    """The definition, pair by pair."""
    N = len(a.ids)
    total = 0
    for i in range(N):
        for j in range(N):
            if i != j and a.ids[i] == a.ids[j]:
                continue
            s = a.vectors[i] @ b.vectors[j] / temperature + bias
            p = 1 / (1 + torch.exp(-s))
            total = total - torch.log(p if i == j else 1 - p)
    return total / N


def problem():
    a, b = views(6, ids=IDS)
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, -1.5)]
    a.vectors.requires_grad_()
    b.vectors.requires_grad_()
    return a, b, *numbers


def test_the_loss_and_its_gradients_are_those_of_a_double_loop():
    a, b, temperature, bias = problem()
    got = losses.sigmoid_loss(a, b, temperature, bias)
    expected = judge(a, b, temperature, bias)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    leaves = (a.vectors, b.vectors, temperature, bias)
    torch.testing.assert_close(torch.autograd.grad(got, leaves),
                               torch.autograd.grad(expected, leaves), rtol=1e-9, atol=1e-12)


def test_the_mean_over_two_processes_is_the_loss(monkeypatch):
    a, b, temperature, bias = problem()
    monkeypatch.setattr(losses, "gather_vectors", lambda vectors, ids: (b.vectors, a.ids))
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(losses, "world", lambda rank=rank: (rank, 2))
        own = slice(3 * rank, 3 * rank + 3)
        mine = [x._replace(vectors=x.vectors[own], ids=x.ids[own]) for x in (a, b)]
        found.append(losses.sigmoid_loss(*mine, temperature, bias))
    torch.testing.assert_close(sum(found) / 2, judge(a, b, temperature, bias), rtol=1e-10, atol=0)


def test_the_model_learns_a_bias_if_it_is_asked_to():
    with torch.device("meta"):
        assert CCLM(build("demo")).sigmoid_bias is None
    model = make(sigmoid=True)
    assert float(model.sigmoid_bias.detach()) == -10
    images, token_ids, starts, masked_ids, positions, ids = example(model)
    a = model.encode_image(images, ids)
    b = model.encode_text(token_ids, starts, ids)
    got = packed_losses(model, a, token_ids, starts, masked_ids, positions, ids, None)
    expected = judge(a, b, model.temperature, model.sigmoid_bias)
    torch.testing.assert_close(got["contrast"], expected, rtol=1e-9, atol=0)
    got["loss"].backward()
    assert model.sigmoid_bias.grad != 0
