"""Every example exactly once per epoch, in one sequence, at any number of processes and workers and after any resume;
bad records are replaced by the next good ones and counted."""
import collections
import itertools

import numpy as np
import pytest
import samples
import torch

import data
from formats import sources
from formats.records import BadRecord


class Numbers:
    """A dataset whose record i is the number i; some are bad."""

    def __init__(self, n, bad=()):
        self.n, self.bad = n, set(bad)

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
        batches = data.Batches(tokenizer, None, data.Stream(source, batch), seed=3, rank=rank, world=world)
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
    batches = data.Batches(tokenizer, data.Stream(data.DemoImages(), 4), data.Stream(Numbers(6), 9), seed=0)
    ids = [i for step in range(4) for i in batches[step][1]["ids"].tolist()]
    assert all(sorted(ids[k * 6:k * 6 + 6]) == list(range(6)) for k in range(6))


def test_limits_of_a_stream_hold_for_its_sentences_and_masks(tokenizer):
    class Long(Numbers):
        def __getitem__(self, key):
            return "word " * 50, "word " * 50, key[0]

    batches = data.Batches(tokenizer, None, data.Stream(Long(9), 4, 12, 0.9, 3), seed=0)
    _, pair, stats = batches[0]
    for sentences in (pair["a"], pair["b"]):
        assert sentences.starts.diff().tolist() == [12] * 4
    assert len(pair["masked"].positions) == 3 * 4 and stats["cut"] == 8


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 2], [0.05, 0.9, 0.05], [1, 1, 1]])
def test_weights_give_each_source_its_share_and_its_own_epochs(weights):
    sizes = [11, 5, 8][:len(weights)]
    mixture = data.Mixture([Numbers(n) for n in sizes], weights)
    batches = data.Batches(None, None, data.Stream(mixture, 1), seed=1)
    starts = [0, *itertools.accumulate(sizes)]
    sequence = collections.defaultdict(list)
    for position in range(2000):
        index = batches.key(1, position)[2]
        k = max(k for k in range(len(sizes)) if starts[k] <= index)
        assert mixture[index, np.random.default_rng(0)][2] == index - starts[k]
        sequence[k].append(index - starts[k])
        for j, weight in enumerate(weights):                                 # at every point, not only at last
            assert abs(len(sequence[j]) - (position + 1) * weight / sum(weights)) < len(weights)
    for k, n in enumerate(sizes):
        for epoch in range(len(sequence[k]) // n):
            assert sorted(sequence[k][epoch * n:(epoch + 1) * n]) == list(range(n))


def test_weighted_files_become_a_mixture_and_half_of_the_weights_are_refused(tmp_path):
    for k in range(2):
        (tmp_path / f"{k}.tsv").write_text(f"{k}\t{k}\n" * 3)
    mixture = data.files(data.PairFiles, [f"{tmp_path}/0.tsv=3", f"{tmp_path}/1.tsv=1"])
    assert mixture.counts == [750, 250] and len(mixture) == 6 and mixture[4, data.generator(0)][:2] == ("1", "1")
    with pytest.raises(ValueError, match="a weight .* or none"):
        data.files(data.PairFiles, [f"{tmp_path}/0.tsv=3", f"{tmp_path}/1.tsv"])


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
    said = capsys.readouterr().err
    assert [said.count(f"record-{name};") for name in range(12)] == [1] * 10 + [0] * 2 and count == 16


def test_eleven_bad_records_in_a_row_repeat_the_last_good_one_and_stop(tokenizer):
    batches = data.Batches(tokenizer, None, data.Stream(Numbers(20, range(5, 20)), 4), seed=0)
    reasons = []
    assert batches.read_or_replace((1, 0, 3), reasons)[2] == 3
    assert batches.read_or_replace((1, 0, 5), reasons)[2] == 3
    assert len(reasons) == 12 and sources.BadRecords().count(reasons) == (11, True)


def test_bad_records_alone_are_refused_in_one_line(tokenizer):
    batches = data.Batches(tokenizer, None, data.Stream(Numbers(20, range(20)), 4), seed=0)
    with pytest.raises(ValueError, match="the first 11 records were bad, the last: record"):
        batches[0]


@pytest.mark.parametrize("languages", [["de"], ["en", "ja"], ["xx"]])
def test_a_language_filter_keeps_exactly_the_records_that_speak_it(tmp_path, languages):
    rows = [{"image": samples.base64.b64encode(samples.jpeg(i)).decode(),
             "captions": samples.said(i, ["en", "de", "ja"][i % 3:][:2])} for i in range(9)]
    path = samples.lines(tmp_path / "a.jsonl", rows)
    expected = [i for i, row in enumerate(rows) if set(row["captions"]) & set(languages)]
    if not expected:
        with pytest.raises(ValueError, match="no record in xx"):
            data.files(data.ImageFiles, [path], 32, languages)
        return
    source = data.files(data.ImageFiles, [path], 32, languages)
    assert [source.kept[0][i] for i in range(len(source))] == expected
    drawn = {source[i, data.generator(i, k)][1] for i in range(len(source)) for k in range(12)}
    assert drawn == {text for row in rows for k, text in row["captions"].items() if k in languages}


def test_languages_are_drawn_uniformly_and_then_their_captions(tmp_path):
    """One caption in German weighs as much as the three in English together."""
    row = {"image": samples.base64.b64encode(samples.jpeg(0)).decode(), "captions": {"en": ["a", "b", "c"], "de": "d"}}
    source = data.files(data.ImageFiles, [samples.lines(tmp_path / "a.jsonl", [row])], 32)
    drawn = collections.Counter(source[0, data.generator(0, i)][1] for i in range(600))
    assert abs(drawn["d"] / 600 - 1 / 2) < 0.07 and all(abs(drawn[k] / 600 - 1 / 6) < 0.06 for k in "abc")


def test_equal_images_have_one_id_and_others_have_another(tmp_path):
    rows = [{"image": samples.base64.b64encode(samples.jpeg(i // 2)).decode(), "caption": f"{i}"} for i in range(6)]
    source = data.files(data.ImageFiles, [samples.lines(tmp_path / "a.jsonl", rows)], 32)
    ids = [source[i, np.random.default_rng(0)][2] for i in range(6)]
    assert ids[0] == ids[1] and ids[2] == ids[3] and len(set(ids)) == 3


def test_either_language_of_a_pair_may_be_view_a(tmp_path):
    (tmp_path / "a.tsv").write_text("ein Hund\ta dog\n")
    source = data.files(data.PairFiles, [f"{tmp_path}/a.tsv@de,en"])
    drawn = collections.Counter(source[0, data.generator(0, i)][0] for i in range(400))
    assert set(drawn) == {"ein Hund", "a dog"} and abs(drawn["a dog"] / 400 - 1 / 2) < 0.1
