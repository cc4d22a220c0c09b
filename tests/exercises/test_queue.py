"""Exercise 2: more negatives than a batch has: a queue (MoCo, arXiv 1911.05722).

    python -m pytest tests/exercises/test_queue.py           fails until you have solved it

What to build
    The contrastive loss has N - 1 negatives for each item: this is why it wants a large batch. But
    the vectors of the last steps are still there, and they cost nothing. A queue keeps the newest
    `size` pairs of them. They are negatives for the items of this step; they get no gradient.
    (CCLM's ancestor ALBEF has such a queue. CCLM took a large batch instead.)

        row i     exp(<a_i, b_i> / t) / (sum over b_j of the step and of the queue of exp(<a_i, b_j> / t))
        column i  exp(<a_i, b_i> / t) / (sum over a_j of the step and of the queue of exp(<a_j, b_i> / t))
        loss      mean over i of -1/2 [log row i + log column i]

    Equal ids are left out, as in contrastive_loss: also where one of them is in the queue.

    1. losses.py: class Queue(size). queue.push(a, b) takes two Views of one step. Its attributes
       a (Q, E), b (Q, E) and ids (Q,) are tensors, oldest first; Q is at most `size`. Before the
       first push all three are None.
    2. losses.py: queue_loss(a, b, temperature, queue) -> scalar. It does not push.

Where to read
    losses.py: contrastive_loss. kernels/contrastive.py: what `contrastive` returns, and which
    number of columns it allows.

How the test judges
    By a double loop. An empty queue must give contrastive_loss. The queue must forget the oldest
    pairs, hold none of the autograd graph, and keep what it was given if the views change later.

Hint
    `contrastive` takes more columns than rows. Columns are rows if a and b change places.

Then
    What does a checkpoint have to hold now, if a resumed run shall be bitwise the same? Vectors of
    the queue come from older weights: why does that hurt more at a high learning rate, and how
    does MoCo's slow second encoder help? On several processes, what should each one push?
"""
import pytest
import torch

import losses
from losses import contrastive_loss
from test_losses import views

T = torch.tensor(0.2, dtype=torch.float64)


def judge(a, b, old):
    """The definition, pair by pair. old: [(a vector, b vector, id)] of the queue."""
    own = list(zip(a.vectors, b.vectors, a.ids))
    total = 0
    for i, (x, y, name) in enumerate(own):
        row = 0
        column = 0
        for j, (u, v, other) in enumerate(own + old):
            if j == i or name != other:
                row = row + torch.exp(x @ v / T)
                column = column + torch.exp(u @ y / T)
        true = torch.exp(x @ y / T)
        total = total - torch.log(true / row) / 2 - torch.log(true / column) / 2
    return total / len(own)


def batches():
    """Three steps of different sizes; some things come again."""
    ids = ([0, 1, 2, 1], [5, 0, 6], [7, 1, 8, 9, 6])
    return [views(len(x), seed=seed, ids=torch.tensor(x)) for seed, x in enumerate(ids)]


def test_an_empty_queue_changes_nothing():
    a, b = batches()[0]
    queue = losses.Queue(8)
    assert queue.a is None and queue.b is None and queue.ids is None
    torch.testing.assert_close(losses.queue_loss(a, b, T, queue), contrastive_loss(a, b, T),
                               rtol=1e-12, atol=0)


def test_the_queue_forgets_the_oldest():
    queue = losses.Queue(5)
    pushed = batches()
    for step, (a, b) in enumerate(pushed[:2]):
        queue.push(a, b)
        for mine, name in ((queue.a, "a"), (queue.b, "b")):
            side = "ab".index(name)
            whole = torch.cat([views[side].vectors for views in pushed[:step + 1]])
            assert mine.equal(whole[-5:])
        assert queue.ids.equal(torch.cat([views[0].ids for views in pushed[:step + 1]])[-5:])


@pytest.mark.parametrize("size", [3, 5, 100])
def test_the_loss_and_its_gradients_are_those_of_a_double_loop(size):
    *first, (a, b) = batches()
    queue = losses.Queue(size)
    old = []
    for x, y in first:
        queue.push(x, y)
        old += zip(x.vectors.clone(), y.vectors.clone(), x.ids.clone())
    a.vectors.requires_grad_()
    b.vectors.requires_grad_()
    got = losses.queue_loss(a, b, T, queue)
    expected = judge(a, b, old[-size:])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    leaves = (a.vectors, b.vectors)
    torch.testing.assert_close(torch.autograd.grad(got, leaves),
                               torch.autograd.grad(expected, leaves), rtol=1e-9, atol=1e-12)


def test_the_queue_keeps_numbers_and_no_graph():
    a, b = batches()[0]
    queue = losses.Queue(100)
    queue.push(a._replace(vectors=a.vectors.requires_grad_() * 1), b)
    before = queue.b.clone()
    b.vectors.zero_()
    assert not queue.a.requires_grad and queue.b.equal(before)
