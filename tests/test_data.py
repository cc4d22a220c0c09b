"""Tokenizer, masking, order, streams and the built-in data."""
import collections
import io
import itertools

import numpy as np
import pytest
import samples
import sentencepiece
import torch

import data
from demo import emoji


def test_ids_are_laid_out_as_in_xlm_r(tokenizer):
    ids = tokenizer.encode("red apple")
    assert (ids[0] == data.BOS == 0 and ids[-1] == data.EOS == 2 and
            tokenizer.mask == tokenizer.size - 1 == len(tokenizer.processor) + 1)
    assert [i - 1 for i in ids[1:-1]] == tokenizer.processor.encode("red apple")
    assert tokenizer.processor.decode([i - 1 for i in ids[1:-1]]) == "red apple"
    assert tokenizer.pieces([0, 2, tokenizer.mask]) == ["<s>", "</s>", "<mask>"]


WORDS = {"en": "a red dog and a blue cat see the old house", "ka": "წითელი ძაღლი კატა ბურთი სახლი ხე კაცი ქალი"}


def sentences(language, count, words=8):
    """Random sentences of a few words."""
    rng = np.random.default_rng(count)
    return [" ".join(rng.choice(WORDS[language].split(), words)) for _ in range(count)]


@pytest.mark.parametrize("layout", [{}, {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}])
def test_sentencepiece_models_of_xlm_r_and_of_t5_become_the_same_ids(layout):
    """T5's first three pieces are <pad> </s> <unk>: as with XLM-R's <unk> <s> </s>, piece p is id p + 1 from 3 on."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences("en", 50)), model_writer=out, vocab_size=40,
                                             hard_vocab_limit=False, minloglevel=2, **layout)
    made = data.Tokenizer(out.getvalue())
    ids = made.encode("a red ж dog")
    assert ids[0] == data.BOS and ids[-1] == data.EOS and ids[1:-1].count(data.UNKNOWN) == 1 and min(ids[1:-1]) == 3
    assert "".join(made.pieces(ids)) == "<s>▁a▁red▁<unk>▁dog</s>"


def segmentations(tokenizer, text):
    """All ways to cut "▁text" into pieces, by trying every prefix -> {ids: log probability}."""
    number = {tokenizer.processor.id_to_piece(i): i for i in range(len(tokenizer.processor))}
    if not text:
        return {(): 0.0}
    return {(number[text[:n]], *rest): tokenizer.processor.get_score(number[text[:n]]) + log
            for n in range(1, len(text) + 1) if text[:n] in number
            for rest, log in segmentations(tokenizer, text[n:]).items()}


@pytest.mark.parametrize("word", ["слон", "elephant"])
def test_segmentations_are_drawn_as_often_as_their_probability_to_the_power_of_a_fifth_says(tokenizer, word):
    found = sorted(segmentations(tokenizer, f"▁{word}").items(), key=lambda pair: -pair[1])[:16]
    assert len(found) >= 6
    weights = np.exp(0.2 * np.array([log for _, log in found]))
    rng, n = np.random.default_rng(0), 20000
    drawn = collections.Counter(tuple(tokenizer.sample(word, rng)) for _ in range(n))
    for (pieces, _), share in zip(found, weights / weights.sum()):
        assert abs(drawn.pop((data.BOS, *(p + 1 for p in pieces), data.EOS)) / n - share) < 0.015
    assert not drawn


def test_a_share_of_the_sentences_of_both_views_is_segmented_anew(tokenizer):
    def texts(share):
        stream = data.Stream(data.DemoParallel(), 200, subword_sampling=share)
        batch = data.Batches(tokenizer, None, stream, seed=0)[0][1]
        return [[s.token_ids[i:j].tolist() for i, j in itertools.pairwise(s.starts)] for s in (batch["a"], batch["b"])]

    plain, half, whole = texts(0), texts(0.5), texts(1)
    for view in (0, 1):
        same = [sum(x == y for x, y in zip(plain[view], other[view])) for other in (half, whole)]
        assert 100 < same[0] < 160 and same[1] < 100            # some names have but one segmentation
        # The text stays what it was.
        for ids, again in zip(plain[view], whole[view]):
            assert tokenizer.processor.decode([i - 1 for i in again[1:-1]]) == tokenizer.processor.decode([i - 1 for i in ids[1:-1]])


def test_a_tokenizer_without_probabilities_cannot_be_sampled():
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences("en", 50)), model_writer=out, vocab_size=60,
                                             model_type="bpe", hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(ValueError, match="--subword_sampling 0"):
        data.Tokenizer(out.getvalue()).sample("a red dog", np.random.default_rng(0))


def test_a_language_of_long_sentences_has_its_pieces():
    """sentencepiece itself leaves out a sentence of more than 4,192 bytes."""
    long = sentences("ka", 20, words=700)
    assert min(len(text.encode()) for text in long) > 4192
    made = data.train_tokenizer(sentences("en", 50) + long, 400)
    assert "".join(made.pieces(made.encode(WORDS["ka"]))) == f"<s>▁{WORDS['ka']}</s>".replace(" ", "▁")


def test_a_language_without_pieces_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    english = [{"text": {"en": a, "cy": b}} for a, b in zip(sentences("en", 3000), sentences("en", 3001))]
    for rare in (1, 300):
        samples.lines("a.jsonl", english + [{"text": {"en": "a red dog", "ka": WORDS["ka"]}}] * rare)
        assert data.main(["tokenizer", "--texts", "a.jsonl", "--vocab", "400"]) == 0
        assert ("ka: 72% of its tokens are single bytes; give more texts in ka" in capsys.readouterr().out) == (rare == 1)


def test_a_long_sentence_is_cut_and_still_ends(tokenizer):
    ids = tokenizer.encode("word " * 200, 16)
    assert len(ids) == 16 and ids[-1] == data.EOS


def test_no_test_language_and_no_test_concept_is_in_the_tokenizers_text():
    assert not set(emoji.languages("never")) & set(emoji.languages("seen") + emoji.languages("text_only"))
    assert not {c["id"] for c in emoji.concepts().values() if c["split"] != "train"} & set(emoji.training_drawings())


def test_masking_hides_only_words_and_as_many_as_stated(tokenizer):
    """As the official code: min(most, round(0.4 n)) positions; 80 % <mask>, 10 % another word, 10 % unchanged; never a special."""
    ids, kinds, n = [0, *range(10, 38), 2], collections.Counter(), 0
    for seed in range(400):
        masked, hidden = data.mask_tokens(ids, np.random.default_rng(seed), tokenizer, 0.4, 20)
        assert len(hidden) == 12 and hidden == sorted(set(hidden)) and masked[0] == 0 and masked[-1] == 2
        for i, (old, new) in enumerate(zip(ids, masked)):
            assert old == new or (i in hidden and new > data.UNKNOWN)
        kinds.update("mask" if masked[i] == tokenizer.mask else "same" if masked[i] == ids[i] else "other"
                     for i in hidden)
        n += len(hidden)
    assert (abs(kinds["mask"] / n - 0.8) < 0.02 and abs(kinds["same"] / n - 0.1) < 0.02 and
            abs(kinds["other"] / n - 0.1) < 0.02)


def test_a_sentence_of_specials_hides_nothing(tokenizer):
    assert data.mask_tokens([0, 2], np.random.default_rng(0), tokenizer) == ([0, 2], [])


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000, 1025])
def test_every_index_once_per_epoch(n):
    orders = [[data.example_at(e * n + i, n, 5, 0)[1] for i in range(n)] for e in range(2)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 7 or orders[0] != orders[1]


def parts(tokenizer, world, step, sampling):
    """One step's image-text and parallel batches, the processes' parts put together, as comparable lists."""
    out = []
    for rank in range(world):
        streams = [data.Stream(dataset, n, subword_sampling=sampling) for dataset, n in ((data.DemoImages(), 8), (data.DemoParallel(), 12))]
        b = data.Batches(tokenizer, *streams, 1, rank, world)[step]
        for stream in b[:2]:
            for s in (stream["b"], stream.get("a", stream["b"])):
                out.append([s.token_ids[i:j].tolist() for i, j in zip(s.starts[:-1], s.starts[1:])])
            out.append([list(x.flatten().tolist()) for x in stream.get("images", stream["ids"][:, None])])
            masked = stream["masked"].token_ids
            out.append([masked[i:j].tolist() for i, j in zip(stream["b"].starts[:-1], stream["b"].starts[1:])])
    return [sum((out[rank * 8 + k] for rank in range(world)), []) for k in range(8)]


@pytest.mark.parametrize("sampling", [0, 0.5])
def test_the_data_are_the_same_at_any_number_of_processes(tokenizer, sampling):
    one = parts(tokenizer, 1, 3, sampling)
    assert parts(tokenizer, 2, 3, sampling) == one and parts(tokenizer, 4, 3, sampling) == one


def test_the_data_are_the_same_with_workers(tokenizer):
    batches = data.Batches(tokenizer, data.Stream(data.DemoImages(), 4), data.Stream(data.DemoParallel(), 4), seed=1)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(2, 6), num_workers=2)
    for step, (image, pair, _) in zip(range(2, 6), loader):
        assert (torch.equal(image["images"], batches[step][0]["images"]) and
                torch.equal(pair["a"].token_ids, batches[step][1]["a"].token_ids))


def test_singles_of_a_batch_are_different_concepts_within_an_epoch():
    images = data.DemoImages()
    alone = [i for i in (data.example_at(p, len(images), 0, 0)[1] for p in range(len(images))) if i < len(images.concepts)]
    assert sorted(alone) == list(range(439))


def test_scenes_are_captioned_by_the_languages_own_list_pattern():
    apple, dog, car = "1f34e", "1f415", "1f697"
    ids = [i for i in (apple, dog, car) if i in emoji.concepts()] or list(emoji.concepts())[:3]
    names = {k: [emoji.concepts()[i]["name"][k] for i in list(emoji.concepts())[:3]] for k in ("en", "ja", "it", "ar")}
    assert ids and emoji.join(names["en"], "en") == "{}, {}, and {}".format(*names["en"])
    assert (emoji.join(names["ja"], "ja") == "、".join(names["ja"]) and
            emoji.join(names["it"], "it") == "{}, {} e {}".format(*names["it"]))
    assert (emoji.join(names["ar"][:2], "ar") == "{} و{}".format(*names["ar"]) and
            emoji.join(names["en"][:1], "en") == names["en"][0])


def test_test_sets_are_what_the_readme_says():
    sizes = {name: len(emoji.split(name)) for name in ("val", "test_style", "test_concept")}
    assert sizes == {"val": 156, "test_style": 439, "test_concept": 50}
    assert all(name.split("/")[0] != emoji.meta()["test_vendor"] for name in emoji.splits()["train"])
    scenes = emoji.split("test_scenes")
    assert len(scenes) == 1000 and all(s["captions"]["en"][0] != s["false_captions"]["en"] for s in scenes)


def test_a_pair_is_one_language_with_images_and_one_without_in_either_role():
    source = data.DemoParallel(languages=["en"], others=["ja"])
    found = {source[0, data.generator(seed)][:2] for seed in range(20)}
    said = tuple(emoji.caption([source.concepts[0]], language) for language in ("en", "ja"))
    assert found == {said, said[::-1]}


def test_a_replacement_is_never_a_special_token():
    """With a vocabulary of two ordinary tokens, 4 and 5, a masked one becomes 4, 5 or <mask>, which is 6."""
    class Tiny:
        mask = 6
    found = set()
    for seed in range(400):
        found.update(data.mask_tokens([0, 4, 5, 4, 5, 2], np.random.default_rng(seed), Tiny(), 1.0, 9)[0][1:-1])
    assert found == {4, 5, 6}
