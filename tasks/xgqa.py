"""xGQA: a question about a picture, in eight languages, answered in English.

Pfeiffer et al. 2022 (arXiv 2109.06082): the balanced test-dev questions of GQA (Hudson and Manning
2019), translated by people. Fine-tuned and chosen on GQA's English questions. Files as in IGLUE:

    gqa/annotations/{train,valid}.json, trainval_ans2label.json              the 1,842 answers
    xGQA/annotations/few_shot/de/{test,train_48}.json ...

As official models/model_vqa.py: the fusion encoder reads the question and the picture; a causal
decoder, which begins as a copy of the fusion encoder, reads all its states and writes the answer.
At test time nothing is written, all answers of the list are ranked:

    1. P(first piece) of every answer; the k best go on
    2. log P(answer) = the sum over its pieces and </s>
    3. accuracy: the largest log P(first piece) + log P(answer), so the first piece counts TWICE, as
       published; accuracy_plain: the largest log P(answer)

An answer that is not in the list is always wrong. xgqa_classifier is IGLUE's own model instead: an
MLP over all answers on the first token.

Letters: B questions, A answers, k of them ranked, L pieces of the longest, N nodes, D width, H
heads, V vocabulary.
"""
import functools
import math
import sys
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kernels.packed import offsets
from losses import PIECE, VocabularyLoss, global_means
from model import (FusionLayer, MaskedLMHead, View, at_least_float32, in_autocast_type,
                   inference_context)
from tasks.common import Classification, Example, Task, encode, evaluated, read_json

ROOT_TOKEN = 0                          # <s>; </s> is 2 (data.py)
END = 2


# --------------------------------------------------------------------------------------------------
# Prefixes
# --------------------------------------------------------------------------------------------------

class Trie(NamedTuple):
    """All prefixes of A answers. Node 0 is "<s>", its children are first pieces, and so on; answers
    that begin alike share nodes. A parent stands before its children."""
    token: torch.Tensor                 # (N,) the last piece of each prefix
    depth: torch.Tensor                 # (N,) its position: 0 for <s>
    path: torch.Tensor                  # (N, L+1) the nodes from <s> to this one; then -1
    last: torch.Tensor                  # (A,) the node of each whole answer


def build_trie(answers):
    """Lists of pieces, without <s> and </s> -> Trie."""
    number = {(): 0}                    # prefix -> node
    paths = [[0]]
    for pieces in answers:
        for end in range(1, len(pieces) + 1):
            prefix = tuple(pieces[:end])
            if prefix not in number:
                number[prefix] = len(paths)
                paths.append([*paths[number[prefix[:-1]]], len(paths)])
    longest = max(map(len, paths))
    path = torch.tensor([nodes + [-1] * (longest - len(nodes)) for nodes in paths])
    token = torch.tensor([prefix[-1] if prefix else ROOT_TOKEN for prefix in number])
    last = torch.tensor([number[tuple(pieces)] for pieces in answers])
    return Trie(token, (path >= 0).sum(1) - 1, path, last)


class Nodes(NamedTuple):
    """Nodes of several questions, packed: those of question i are starts[i]..starts[i+1]."""
    number: torch.Tensor                # (N,) of the trie
    starts: torch.Tensor                # (B+1,) int32
    path: torch.Tensor                  # (N, L+1) rows of the packed nodes from <s> on; -1: none
    row: torch.Tensor                   # (B, nodes of the trie) where each is packed, if it is


def wanted_nodes(trie, answers):
    """answers (B, k): of each question the numbers of some answers -> the Nodes these need."""
    # 1. Which nodes of the trie are on the way to an answer of a question?
    paths = trie.path[trie.last[answers]].flatten(1)                     # (B, k (L+1)), -1: none
    wanted = torch.zeros(len(answers), len(trie.token) + 1, dtype=torch.bool,
                         device=answers.device)
    wanted.scatter_(1, paths % wanted.shape[1], True)                    # -1: the extra column
    wanted = wanted[:, :-1]                                              # (B, nodes of the trie)

    # 2. Pack them, question by question. Parents stay before their children.
    question, number = wanted.nonzero().T                                # (N,), (N,)
    row = wanted.flatten().cumsum(0).view_as(wanted) - 1                 # (B, nodes of the trie)

    # 3. Their paths, in packed rows.
    path = trie.path[number]                                             # (N, L+1)
    packed = row[question[:, None], path.clamp(min=0)]
    return Nodes(number, offsets(wanted.sum(1)), packed.masked_fill(path < 0, -1), row)


# --------------------------------------------------------------------------------------------------
# Decoder
# --------------------------------------------------------------------------------------------------

class Decoder(nn.Module):
    """A causal language model of prefixes which reads the states of a question."""

    def __init__(self, c):
        super().__init__()
        sizes = (c.width, c.fusion_heads, c.fusion_mlp, c.fusion_eps, c.dropout)
        self.token_embedding = nn.Embedding(c.vocabulary, c.width)
        self.positions = nn.Embedding(c.positions, c.width)
        self.norm = nn.LayerNorm(c.width, c.text_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(FusionLayer(*sizes) for _ in range(c.fusion_layers))
        self.lm_head = MaskedLMHead(c, self.token_embedding)
        self.offset = c.offset
        std = c.embedding_std
        for table in (self.token_embedding.weight, self.positions.weight, self.lm_head.weight):
            nn.init.normal_(table, std=std)

    def forward(self, token, depth, nodes, question):
        """token, depth (N,) of the nodes -> (N, D): what the LM head reads to say the next piece.
        question: View of B fused questions."""
        x = self.token_embedding(token) + self.positions(depth + self.offset)
        x = self.dropout(self.norm(x))                                   # (N, D)
        states = in_autocast_type(question.states)
        for layer in self.layers:
            own = causal_attention(layer.attention, x, nodes.path)
            x = layer.norm1(x + layer.dropout(own))                      # (N, D)
            # To the cross-attention the nodes of a question are one sequence of queries.
            seen = layer.cross(x, states, nodes.starts, question.starts)
            x = layer.cross_norm(x + layer.dropout(seen))
            x = layer.norm2(x + layer.dropout(layer.mlp(x)))
        return self.lm_head(x)                                           # (N, D)


def causal_attention(module, x, path):
    """A node attends to the nodes on its path, itself too. x (N, D), path (N, L+1) -> (N, D)"""
    q, k, v = module.project(x, module.q, module.k, module.v)            # (N, H, D/H) each
    on_path = (path >= 0)[:, None, None]                                 # (N, 1, 1, L+1)
    rows = path.clamp(min=0)
    k = k[rows].transpose(1, 2)                                          # (N, H, L+1, D/H)
    v = v[rows].transpose(1, 2)
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, on_path)   # (N, H, 1, D/H)
    return module.out(out.flatten(1))                                    # (N, D)


def all_log_probabilities(head, x):
    """x (n, D) of a few prefixes -> (n, V)"""
    logits = F.linear(in_autocast_type(x), in_autocast_type(head.weight))
    return (at_least_float32(logits) + at_least_float32(head.bias)).log_softmax(1)


def log_probabilities(head, x, rows, tokens):
    """log P(tokens[i]) after the prefix whose state is x[rows[i]]. x (N, D), rows and tokens (R,)
    -> (R,). Log-probabilities of PIECE prefixes exist at a time."""
    found = x.new_empty(len(rows), dtype=torch.promote_types(x.dtype, torch.float32))
    for first in range(0, len(x), PIECE):
        here = ((rows >= first) & (rows < first + PIECE)).nonzero()[:, 0]
        log_p = all_log_probabilities(head, x[first:first + PIECE])      # (PIECE, V)
        found[here] = log_p[rows[here] - first, tokens[here]]
    return found


# --------------------------------------------------------------------------------------------------
# The benchmark
# --------------------------------------------------------------------------------------------------

class Questions(Task):
    """The files of GQA and xGQA."""
    languages = ("en", "bn", "de", "id", "ko", "pt", "ru", "zh")
    source = "github.com/e-bug/iglue, datasets/gqa and datasets/xGQA,"
    image_source = "GQA (gqa/ID.jpg)"
    recipe = Task.recipe | dict(epochs=5.0, caption_tokens=40)
    published = {"zero-shot": {"CCLM-3M": 42.36, "CCLM-4M": 46.24, "UC2": 29.35},
                 "few-shot 48": {"CCLM-3M": 50.94, "CCLM-4M": 55.11, "UC2": 42.95}}

    @functools.cached_property
    def answers(self):
        """{answer: its number}, in the order of the file."""
        path = self.root / "gqa" / "annotations" / "trainval_ans2label.json"
        return {answer: i for i, answer in enumerate(read_json(path, self.source))}

    def examples(self, split, language="en", few_shot=None, translated=False):
        if translated and language != "en":
            path = self.root / "xGQA" / "annotations_machine-translate" / language / "test.json"
        elif few_shot or split == "test":
            name = f"train_{few_shot}" if few_shot else "test"
            path = self.root / "xGQA" / "annotations" / "few_shot" / language / f"{name}.json"
        elif language == "en":
            name = {"train": "train", "val": "valid"}[split]
            path = self.root / "gqa" / "annotations" / f"{name}.json"
        else:
            raise ValueError(f"{self.name} has no {split} set in {language}: --few_shot "
                             f"{language},48 has 48 pictures")
        rows = read_json(path, self.source)
        found = []
        for row in rows.values() if isinstance(rows, dict) else rows:
            try:
                found.append(self.example(row))
            except (KeyError, TypeError, AttributeError, StopIteration) as error:
                raise ValueError(f"{path}: a question is not GQA's ({error!r})") from None
        if split == "train":
            known = [example for example in found if example.label >= 0]
            if len(known) < len(found):
                print(f"{path}: {len(found) - len(known):,} questions are left out, whose answer "
                      f"is none of the {len(self.answers):,}", file=sys.stderr)
            return known
        return found

    def example(self, row):
        """A row of xGQA {"imageId", "question", "answer"} or of GQA {"img_id", "sent", "label":
        {answer: 1.0}} -> Example."""
        question = row["question"] if "question" in row else row["sent"]
        answer = row["answer"] if "answer" in row else next(iter(row["label"]))
        picture = row["imageId"] if "imageId" in row else row["img_id"]
        sides = "left" in question + answer or "right" in question + answer
        return Example((self.picture("gqa", f"{picture}.jpg"),), question,
                       self.answers.get(answer, -1), mirror=not sides)


class Xgqa(Questions):
    name = "xgqa"
    unused = ("vision_proj", "text_proj", "itm_head", "mlm_head", "temperature", "text_fusion")
    columns = {"n": "n", "accuracy": "accuracy", "accuracy_plain": "plain"}
    k = 128                             # answers whose whole probability is computed

    def head(self, config):
        return Decoder(config)

    def begin(self, model):
        """The decoder begins as the fusion encoder, with the words of the text encoder and the head
        of the masked LM."""
        decoder = model.task_head
        decoder.layers.load_state_dict(model.fusion.layers.state_dict())
        decoder.norm.load_state_dict(model.text.norm.state_dict())
        decoder.lm_head.load_state_dict(model.mlm_head.state_dict())
        with torch.no_grad():
            decoder.token_embedding.weight.copy_(model.text.token_embedding.weight)
            decoder.positions.weight.copy_(model.text.positions.weight + model.text.token_type)

    @functools.cache
    def trie(self, tokenizer, device):
        """Trie of all answers, as this tokenizer cuts them."""
        pieces = [tokenizer.encode(answer)[1:-1] for answer in self.answers]
        if not all(pieces):
            raise ValueError(f"{self.name}: the list of answers is empty, or an answer in it is")
        return Trie(*(x.to(device) for x in build_trie(pieces)))

    def chance(self, batch, tokenizer):
        """Every piece, and </s>, as probable as any other."""
        pieces = fmean(len(tokenizer.encode(answer)) - 1 for answer in self.answers)
        return {"answer": pieces * math.log(tokenizer.size)}

    def question(self, model, batch):
        """All states of the questions after the fusion encoder -> View."""
        texts, images = encode(model, batch)
        everyone = torch.arange(len(batch["ids"]), device=texts.states.device)
        states = model.fuse(texts, images, everyone, everyone)           # (T, D)
        return View(states, texts.starts, None, None)

    def losses(self, model, batch, seed, tokenizer):
        trie = self.trie(tokenizer, batch["ids"].device)
        # Of each question the nodes of its answer: a chain, in which each node says the next one.
        nodes = wanted_nodes(trie, batch["ids"][:, None])
        token = trie.token[nodes.number]                                 # (N,)
        x = model.task_head(token, trie.depth[nodes.number], nodes, self.question(model, batch))
        labels = token.roll(-1)                                          # (N,)
        labels[nodes.starts[1:].long() - 1] = END                        # after its last piece
        head = model.task_head.lm_head
        total = VocabularyLoss.apply(*map(in_autocast_type, (x, head.weight, head.bias)), labels)
        mean, = global_means((total, total.detach().new_full((), len(batch["ids"]))))
        return {"answer": mean}

    def rank(self, model, batch, trie):
        """-> of the k best answers of each question by their first piece: their numbers, log P of
        the first piece, log P of the whole answer. (B, k) each"""
        decoder = model.task_head
        question = self.question(model, batch)
        B = len(batch["ids"])
        # 1. The first pieces, from <s> alone.
        root = wanted_nodes(trie._replace(last=trie.last[:1] * 0), trie.last.new_zeros(B, 1))
        x = decoder(trie.token[root.number], trie.depth[root.number], root, question)       # (B, D)
        first = trie.token[trie.path[trie.last, 1]]                      # (A,)
        log_p = all_log_probabilities(decoder.lm_head, x)[:, first]      # (B, V) -> (B, A)
        log_first, best = log_p.topk(min(self.k, len(first)), dim=1)     # (B, k)

        # 2. All pieces of the k best. Each prefix is computed once, and says all its next pieces.
        nodes = wanted_nodes(trie, best)
        token = trie.token[nodes.number]
        depth = trie.depth[nodes.number]
        x = decoder(token, depth, nodes, question)                       # (N, D)
        inner = (depth > 0).nonzero()[:, 0]                              # all but <s>
        parent = nodes.path[inner, depth[inner] - 1]
        end = nodes.row.gather(1, trie.last[best])                       # (B, k)
        tokens = torch.cat([token[inner], torch.full_like(end.flatten(), END)])
        log_p = log_probabilities(decoder.lm_head, x, torch.cat([parent, end.flatten()]), tokens)
        step = log_p.new_zeros(len(x)).index_copy_(0, inner, log_p[:len(inner)])            # (N,)

        # 3. Along the path of each answer, and </s>.
        path = nodes.path[end]                                           # (B, k, L+1)
        pieces = step[path.clamp(min=0)].masked_fill(path < 0, 0).sum(2)                    # (B, k)
        log_answer = pieces + log_p[len(inner):].view_as(end)            # (B, k)
        return best, log_first, log_answer

    def scores(self, model, tokenizer, split, language, translated=False):
        """-> {"accuracy": as published, "accuracy_plain": by log P alone, "n": questions}, %"""
        examples = self.examples(split, language, translated=translated)
        if not examples:
            raise ValueError(f"{self.name}: the {split} set in {language} has no question")
        right = torch.zeros(2)
        for batch in evaluated(self, model, tokenizer, examples):
            trie = self.trie(tokenizer, batch["ids"].device)
            with inference_context(batch["ids"].device):
                best, log_first, log_answer = self.rank(model, batch, trie)
            for i, order in enumerate((log_first + log_answer, log_answer)):
                found = best.gather(1, order.argmax(1, keepdim=True))        # (B, 1)
                right[i] += (found[:, 0] == batch["ids"]).sum().item()
        accuracy, plain = (100 * right / len(examples)).tolist()
        return {"n": len(examples), "accuracy": accuracy, "accuracy_plain": plain}


class XgqaClassifier(Questions, Classification):
    """The answer is a class of its own, as in IGLUE's baselines."""
    name = "xgqa_classifier"
    published = {}
    columns = {"n": "n", "chance": "chance", "accuracy_all_lines": "accuracy"}
    validation = ("accuracy_all_lines",)

    @property
    def classes(self):
        return len(self.answers)
