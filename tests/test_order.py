"""Every example exactly once per epoch, in one sequence, at any number of processes and workers and after any resume;
bad records are replaced by the next good ones and counted."""
import collections
import contextlib
import itertools

import numpy as np
import pytest
import samples
import torch

import data
from formats import sources
from formats.records import BadRecord


class Numbers:
    """A source whose record i is the number i; some are bad."""
    blank = "", "", -1

    def __init__(self, n, bad=(), shares=None):
        self.n, self.bad = n, set(bad)
        if shares:
            self.shares, self.locate = shares, lambda position: sources.Stream.locate(self, position)

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        index, rng = key
        if index in self.bad:
            raise BadRecord(f"record {index}: made bad")
        return str(index), str(int(rng.integers(1 << 30))), index


def stream(source, tokenizer, batch, steps, world=1, workers=0):
    """Ids of the examples of the second stream in the order of their positions, and what was told of records."""
    found = {}
    for rank in range(world):
        batches = data.Batches(tokenizer, None, source, batch, batch, seed=3, rank=rank, world=world)
        loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers)
        for step, (_, pair, stats) in zip(steps, loader):
            found[step, rank] = pair["ids"].tolist(), stats["bad_records"], pair["b"].token_ids.tolist()
    return [sum((found[step, rank][k] for step in steps for rank in range(world)), []) for k in range(3)]


@pytest.mark.parametrize("n, batch", [(1, 8), (7, 16), (64, 24), (101, 48), (1000, 240)])
def test_every_world_size_gives_the_same_sequence_with_every_example_once_per_epoch(tokenizer, n, batch):
    steps = range(0, -(-3 * n // batch))
    one = stream(Numbers(n), tokenizer, batch, steps)
    for epoch in range(3):
        assert sorted(one[0][epoch * n:(epoch + 1) * n]) == list(range(n))
    for world in range(2, 9):
        if batch % world == 0:
            assert stream(Numbers(n), tokenizer, batch, steps, world) == one
    assert n < 7 or one[0][:n] != one[0][n:2 * n]                            # another order in another epoch


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_number_of_workers_gives_the_same_sequence_from_every_resume_point(tokenizer, workers):
    source = Numbers(37, bad=[5, 6, 30])
    whole = stream(source, tokenizer, 10, range(0, 9))
    for start in (0, 1, 4, 8):                                               # in the middle of an epoch
        rest = stream(source, tokenizer, 10, range(start, 9), workers=workers)
        assert rest[0] == whole[0][start * 10:] and whole[2][-len(rest[2]):] == rest[2]


def test_streams_of_other_lengths_run_at_their_own_pace(tokenizer):
    batches = data.Batches(tokenizer, None, Numbers(6), 4, 9, seed=0)
    ids = [i for step in range(4) for i in batches[step][1]["ids"].tolist()]
    assert all(sorted(ids[k * 6:k * 6 + 6]) == list(range(6)) for k in range(6))


@pytest.mark.parametrize("weights", [["0.7", "0.3"], ["1", "1", "2"], ["0.05", "0.9", "0.05"]])
def test_weights_give_each_source_its_share_and_its_own_epochs(tmp_path, weights):
    sizes = [11, 5, 8][:len(weights)]
    for k, n in enumerate(sizes):
        (tmp_path / f"{k}.tsv").write_text("".join(f"{k}\t{i}\n" for i in range(n)))
    source = sources.Pairs([f"{tmp_path}/{k}.tsv={w}" for k, w in enumerate(weights)])
    total, starts, sequence = sum(map(float, weights)), [0, *itertools.accumulate(sizes)], collections.defaultdict(list)
    for position in range(2000):
        place, first, n = source.locate(position)
        index = first + data.example_at(place, n, 1, 0)[1]
        k = max(k for k in range(len(sizes)) if starts[k] <= index)
        sequence[k].append(index - starts[k])
        for j, weight in enumerate(weights):                                 # at every point, not only at last
            assert abs(len(sequence[j]) - (position + 1) * float(weight) / total) < len(weights)
    for k, n in enumerate(sizes):
        for epoch in range(len(sequence[k]) // n):
            assert sorted(sequence[k][epoch * n:(epoch + 1) * n]) == list(range(n))


def test_a_bad_record_is_replaced_by_the_next_good_one_and_counted_exactly(tokenizer):
    n, bad = 50, {3, 4, 5, 20, 49}
    good, told, _ = stream(Numbers(n, bad), tokenizer, 10, range(5))
    order = stream(Numbers(n), tokenizer, 10, range(5))[0]
    expected, skipped = [], []
    for index in order:
        while index in bad:
            skipped.append(f"record {index}: made bad")
            index = (index + 1) % n
        expected.append(index)
    assert good == expected and [text for text in told if text] == skipped and told.count("") == 50


def test_more_than_ten_bad_of_the_last_thousand_stop_and_ten_do_not():
    for gap, stops in ((101, False), (100, False), (99, True)):              # at most 10, 10 and 11 of any 1,000
        bad_records, flags = sources.BadRecords(), []
        for first in range(0, 4000, 20):
            reasons = ["bad" if i % gap == gap - 1 else "" for i in range(first, first + 20)]
            flags.append(bad_records.count(reasons))
        assert any(stop for _, stop in flags) == stops
        assert sum(bad for bad, _ in flags) == 4000 // gap


def test_the_first_ten_bad_records_are_named_once(capsys):
    bad_records = sources.BadRecords()
    count = 0
    for name in [0, 1, 0, 1, *range(12)]:
        count += bad_records.count([f"record-{name};"])[0]
    said = capsys.readouterr().out
    assert [said.count(f"record-{name};") for name in range(12)] == [1] * 10 + [0] * 2 and count == 16


def test_a_source_of_bad_records_alone_stops_at_once_with_a_batch_of_the_same_size(tokenizer):
    item = data.Batches(tokenizer, None, Numbers(20, range(20)), 4, 4, seed=0)[0]
    assert item[1]["ids"].tolist() == [-1] * 4
    assert sources.BadRecords().count(item[2]["bad_records"])[1]


@pytest.mark.parametrize("languages", [["de"], ["en", "ja"], ["xx"]])
def test_a_language_filter_keeps_exactly_the_records_that_speak_it(tmp_path, languages):
    rows = [{"image": samples.base64.b64encode(samples.jpeg(i)).decode(),
             "captions": samples.said(i, ["en", "de", "ja"][i % 3:][:2])} for i in range(9)]
    path = samples.lines(tmp_path / "a.jsonl", rows)
    expected = [i for i, row in enumerate(rows) if set(row["captions"]) & set(languages)]
    if not expected:
        with pytest.raises(ValueError, match="no record in xx"):
            sources.Images([path], 32, languages)
        return
    source = sources.Images([path], 32, languages)
    assert [int(i) for i in source.kept[0].read(0, len(source))] == expected
    drawn = {source[i, data.generator(i, k)][1] for i in range(len(source)) for k in range(12)}
    assert drawn == {text for row in rows for k, text in row["captions"].items() if k in languages}


def test_languages_are_drawn_uniformly_and_then_their_captions(tmp_path):
    """F3.3: one caption in German weighs as much as the three in English together."""
    row = {"image": samples.base64.b64encode(samples.jpeg(0)).decode(), "captions": {"en": ["a", "b", "c"], "de": "d"}}
    source = sources.Images([samples.lines(tmp_path / "a.jsonl", [row])], 32)
    drawn = collections.Counter(source[0, data.generator(0, i)][1] for i in range(600))
    assert abs(drawn["d"] / 600 - 1 / 2) < 0.07 and all(abs(drawn[k] / 600 - 1 / 6) < 0.06 for k in "abc")


def test_equal_images_have_one_id_and_others_have_another(tmp_path):
    rows = [{"image": samples.base64.b64encode(samples.jpeg(i // 2)).decode(), "caption": f"{i}"} for i in range(6)]
    source = sources.Images([samples.lines(tmp_path / "a.jsonl", rows)], 32)
    ids = [source[i, np.random.default_rng(0)][2] for i in range(6)]
    assert ids[0] == ids[1] and ids[2] == ids[3] and len(set(ids)) == 3


def test_images_finished_together_are_those_finished_alone_also_around_bad_records(tmp_path):
    rows = [{"image": samples.base64.b64encode(samples.jpeg(i)).decode()[: -40 if i % 7 == 3 else None],
             "caption": f"{i}"} for i in range(37)]
    source = sources.Images([samples.lines(tmp_path / "a.jsonl", rows)], 48)
    told, alone = [], []
    batches = data.Batches(None, source, None, 37, 0, seed=5)
    together = list(batches.examples(1, 0, told))
    for p in range(37, 74):
        epoch, index = data.example_at(p, 37, 5, 0)
        for i in range(index, index + 2):
            with contextlib.suppress(BadRecord):
                rng = data.generator(5, 0, epoch, index)
                alone += [(*record, rng) for record in source.finish([source[i % 37, rng]])]
                break
    assert len(together) == len(alone) == 37 and len([why for why in told if why]) == sum(i % 7 == 3 for i in range(37))
    for (image, *rest, rng), (image_alone, *rest_alone, rng_alone) in zip(together, alone):
        assert image.shape == (3, 48, 48) and np.array_equal(image, image_alone) and rest == rest_alone
        assert rng.random() == rng_alone.random()                            # masking goes on from here
