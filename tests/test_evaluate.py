"""evaluate.py: packed re-ranking equals a loop over pairs, recall equals hand-made cases, a mistake is one line."""
import dataclasses
import functools
import json
import pathlib
import weakref

import pytest
import samples
import torch

import data
import evaluate
from formats import images
from demo import emoji
from model import CCLM, PRESETS

LANGUAGES = ["en", "de", "hi"]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """What is compared with a reference is computed in float32 on every machine."""
    monkeypatch.setattr("model.training_dtype", lambda device: (torch.float32, "tests compare"))


def make(tokenizer, **changes):     # a tiny model whose match head has an opinion
    torch.manual_seed(0)
    changes |= {"width": 32, "embedding": 16, "image_size": 32, "vision_layers": 1, "text_layers": 1, "init_std": 0.2}
    model = CCLM(dataclasses.replace(PRESETS["demo"], vocabulary=tokenizer.size, **changes)).eval()
    torch.nn.init.normal_(model.itm_head[-1].weight)
    return model


@pytest.fixture(scope="module")
def rows():     # six images; the first has a second English caption, the last none in German
    six = emoji.split("val")[:6]
    rows = [{"image": x["image"], "captions": {k: list(x["captions"][k]) for k in LANGUAGES}} for x in six]
    rows[0]["captions"]["en"].append("something else")
    del rows[5]["captions"]["de"]
    return rows


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    model, path = make(tokenizer), tmp_path_factory.mktemp("evaluate") / "ckpt.pt"
    torch.save({"model": model.state_dict(), "step": 1, "tokenizer": tokenizer.model,
                "config": {"model": dataclasses.asdict(model.config), "train": {}}}, path)
    return path


@torch.inference_mode()
def one_pair(model, tokenizer, image, text):     # (cosine, match logit, sum) of a batch of one
    words, starts = data.pack([tokenizer.encode(text, 64)])
    b = model.encode_text(words, starts, None)
    pixels = torch.from_numpy(images.eval_transform(image, model.config.image_size).copy())[None]
    a = model.encode_image(images.normalise(pixels), None)
    fused = model.fuse(b, a, torch.tensor([0]), torch.tensor([0]))
    cosine, (no, yes) = float(a.vectors @ b.vectors.T), model.itm_head(fused[0]).tolist()
    return cosine, yes, cosine / model.temperature.item() + (yes - no) / 4


def all_pairs(model, tokenizer, rows, language):     # {(caption, image): one_pair's scores}, each caption's image
    kept = [r for r in rows if r["captions"].get(language)]
    captions = [(text, i) for i, r in enumerate(kept) for text in r["captions"][language]]
    return {(c, i): one_pair(model, tokenizer, r["image"], text) for c, (text, _) in enumerate(captions)
            for i, r in enumerate(kept)}, [i for _, i in captions]


def plain_recall(score, owner, K, k=1, by=1):
    """The official protocol (Retrieval.py:117), a query at a time: sort by cosine, then the first K by match logit (by=2: sum)."""
    def hit(pairs):
        pairs = sorted(pairs, key=lambda p: -score[p][0])
        if K:
            pairs = sorted(pairs[:K], key=lambda p: -score[p][by])
        return any(owner[c] == i for c, i in pairs[:k])
    images = range(max(owner) + 1)
    forth = [hit([(c, i) for i in images]) for c in range(len(owner))]
    back = [hit([(c, i) for c in range(len(owner))]) for i in images]
    return 100 * sum(forth) / len(forth), 100 * sum(back) / len(back)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch, states", [(2, 1 << 29), (256, 1 << 29), (2, 0), (256, 0)])
def test_match_logits_of_a_pack_equal_those_of_single_pairs(tokenizer, rows, layers, batch, states, monkeypatch):
    """Also where no token states are kept but made again for each batch of pairs."""
    monkeypatch.setattr(evaluate, "BATCH", batch)
    monkeypatch.setattr(evaluate, "STATES", states)
    monkeypatch.setattr(evaluate, "ROWS", 10 * batch)
    model = make(tokenizer, fusion_layers=layers)
    texts = [text for row in rows for captions in row["captions"].values() for text in captions]
    with torch.inference_mode():
        _, images = evaluate.encode_images(model, rows, [])
        different, place = evaluate.encode_texts(model, tokenizer, texts)
        assert (images.view is None) == (different.view is None) == (states == 0)
        pairs = torch.cartesian_prod(torch.arange(len(texts)), torch.arange(len(rows)))[::3]
        got = evaluate.match_logits(model, different, images, place[pairs[:, 0]], pairs[:, 1])
    want = torch.tensor([one_pair(model, tokenizer, rows[i]["image"], texts[t])[1] for t, i in pairs.tolist()])
    assert want.std() > 0.01                                                 # the pairs do differ
    torch.testing.assert_close(got[:, 1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 256])
def test_recall_and_reranking_equal_the_official_protocol_a_query_at_a_time(tokenizer, rows, batch, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", batch)
    model = make(tokenizer)
    pairs = {language: all_pairs(model, tokenizer, rows, language) for language in LANGUAGES}
    for K in (2, 3, 100):                                                    # 100: more than there are candidates
        got = evaluate.retrieval(model, tokenizer, rows, rerank=K)
        assert list(got) == LANGUAGES and (got["en"]["n"], got["en"]["images"], got["de"]["images"]) == (7, 6, 5)
        for language, x in got.items():
            for k in (1, 5):
                assert (x[f"t2i_r{k}"], x[f"i2t_r{k}"]) == pytest.approx(plain_recall(*pairs[language], 0, k))
            assert (x["matched_t2i_r1"], x["matched_i2t_r1"]) == pytest.approx(plain_recall(*pairs[language], K))
            both = x["reranked_t2i_r1"], x["reranked_i2t_r1"]
            assert both == pytest.approx(plain_recall(*pairs[language], K, by=2))
    assert "reranked_t2i_r1" not in evaluate.retrieval(model, tokenizer, rows, rerank=0)["en"]


def test_ranks_of_a_hand_made_case_with_several_captions_per_image():
    scores = torch.tensor([[.9, .1, .0], [.2, .8, .3],                       # image 0's captions: right, third
                           [.1, .5, .7], [.3, .2, .4]])                      # image 1's: second; image 2's: right
    right = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    assert evaluate.ranks(scores, right).tolist() == [0, 2, 1, 0]
    assert evaluate.ranks(scores.T, right.T).tolist() == [0, 1, 1]           # an image counts with its best caption


def test_ties_and_nan_never_help():
    right = torch.eye(3).bool()
    assert evaluate.ranks(torch.zeros(3, 3), right).tolist() == [2, 2, 2]
    assert evaluate.ranks(torch.full((3, 3), torch.nan), right).tolist() == [2, 2, 2]
    outside = torch.tensor([[-torch.inf, 1, 2], [0, 1, 2], [0, 1, torch.nan]])     # right: no candidate
    assert evaluate.ranks(outside, right).tolist() == [2, 1, 2]


def test_an_undecided_match_head_gets_nothing_alone_and_changes_nothing_in_the_sum(tokenizer, rows):
    model = make(tokenizer)
    torch.nn.init.zeros_(model.itm_head[-1].weight)
    x = evaluate.retrieval(model, tokenizer, rows, ["en"])["en"]
    assert x["matched_t2i_r1"] == x["matched_i2t_r1"] == 0
    assert (x["reranked_t2i_r1"], x["reranked_i2t_r1"]) == (x["t2i_r1"], x["i2t_r1"])


def test_equal_captions_count_beside_the_plain_number_never_instead(tokenizer, rows):
    twins = [dict(row, captions={"en": ["a thing"]}) for row in rows[:2]]    # whatever is shown, it is called the same
    x = evaluate.retrieval(make(tokenizer), tokenizer, twins)["en"]
    assert x["t2i_r1"] == 50 and x["t2i_r1_equal"] == 100                    # one of two queries finds its own
    assert x["i2t_r1"] == 0 and x["i2t_r1_equal"] == 100                     # the two captions tie: nobody's gain
    assert x["reranked_t2i_r1_equal"] == x["reranked_i2t_r1_equal"] == 100


def test_new_names_leave_out_what_another_training_language_says_in_any_case(tokenizer, rows):
    captions = [{"en": ["robot"], "nl": ["Robot"], "de": ["Roboter"]}, {"en": ["cat"], "nl": ["kat"], "de": ["Katze"]}]
    both = [dict(row, captions=c) for row, c in zip(rows, captions)]
    got = evaluate.retrieval(make(tokenizer), tokenizer, both, rerank=0, trained=["en", "de"])
    assert {k: x["new_n"] for k, x in got.items()} == {"en": 2, "nl": 1, "de": 2}


def test_false_captions_lose_a_tie_and_the_model_keeps_its_mode(tokenizer, rows):
    false = [dict(row, false_captions={"en": row["captions"]["en"][0]}) for row in rows]
    model = make(tokenizer).train()
    x = evaluate.retrieval(model, tokenizer, false, ["en"])["en"]
    assert model.training and all(x[f"false_caption_accuracy{k}"] == 0 for k in ("", "_match", "_cosine"))


def test_validation_scores_are_means_of_the_cosine_recall_by_group_or_over_all_languages(tokenizer, rows):
    model, torch_state = make(tokenizer).train(), torch.get_rng_state()
    languages = {group: emoji.languages(group) for group in ("seen", "text_only")}
    demo = evaluate.validation_scores(model, tokenizer, emoji.split("val_concept")[:8], languages)
    own = evaluate.validation_scores(model, tokenizer, rows)                 # rows without concept ids
    assert list(demo) == list(evaluate.GROUPS) and list(own) == ["all"]
    wanted = evaluate.retrieval(model, tokenizer, emoji.split("val_concept")[:8], rerank=0)
    for key in ("t2i_r1", "i2t_r1"):
        never = [wanted[k][key] for k in emoji.languages("never")]
        assert demo["never"][key] == pytest.approx(sum(never) / 4)
        each = [x[key] for x in evaluate.retrieval(model, tokenizer, rows, rerank=0).values()]
        assert own["all"][key] == pytest.approx(sum(each) / 3)
    assert model.training and torch.equal(torch_state, torch.get_rng_state())       # training goes on as before


def test_states_that_are_kept_or_made_again_are_the_same(tokenizer, rows, monkeypatch):
    with torch.inference_mode():
        kept = evaluate.encode_images(make(tokenizer), rows, [])[1]
        monkeypatch.setattr(evaluate, "STATES", kept.view.states.nbytes - 1)
        again = evaluate.encode_images(make(tokenizer), rows, [])[1]
        assert again.view is None and torch.equal(again.vectors, kept.vectors)
        for a, b in zip(kept.select(torch.tensor([1, 4])), again.select(torch.tensor([1, 4]))):
            torch.testing.assert_close(a, b)
    size = int(kept.view.starts[1])
    assert torch.equal(kept.select(torch.tensor([4])).states, kept.view.states[4 * size:5 * size])


def own(folder, count=6, bad=()):
    """A file of images with captions in en and de, the last without de; the images `bad` are no pictures."""
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(b"broken" if i in bad else samples.jpeg(i))
    rows = [{"image": f"{i}.jpg", "captions": samples.said(i, ["en", "de"] if i < count - 1 else ["en"])} for i in range(count)]
    return samples.lines(folder / "a.jsonl", rows)


def test_bad_records_are_named_and_the_others_score_as_without_them(tokenizer, checkpoint, tmp_path, capsys):
    path = own(tmp_path, 6, bad=[1, 3])
    good = pathlib.Path(path).read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(good[i] for i in (0, 2, 4, 5)))
    pathlib.Path(path).write_text("".join(good + ['{"image": "0.jpg", "captions": {"en": ""}}\n']))
    for name in ("a", "b"):
        assert evaluate.main(f"retrieval --ckpt {checkpoint} --data {tmp_path}/{name}.jsonl --json {tmp_path}/{name}.json".split()) == 0
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (3 if name == "a" else 0) and all(line.startswith(f"left out: {path} line") for line in said)
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b"))
    assert a.pop(path) == b.pop(f"{tmp_path}/b.jsonl") and a["groups"][path]["all"]["n"] == 3.5
    assert evaluate.main(f"pairs --ckpt {checkpoint} --data {path}".split()) == 0
    out, err = capsys.readouterr()
    assert "image and de: " in out and "of 3 pairs" in out and "of 4 pairs" in out and err.count("left out: ") == 3
    small = evaluate.small_rows(evaluate.evaluation_set([path]), 32)         # of a validation: named once
    assert capsys.readouterr().err.count("left out: ") == 3 and [row["image"].size for row in small] == [(32, 32)] * 4
    assert list(evaluate.validation_scores(make(tokenizer), tokenizer, small)) == ["all"] and capsys.readouterr().err == ""
    many = [f"record {i}" for i in range(12)]
    evaluate.report_bad(many, 50)
    assert capsys.readouterr().err.splitlines()[9:] == ["left out: record 9", "left out: 12 of 50"]


def test_what_train_reads_is_evaluated_alike(checkpoint, tmp_path, capsys):
    """A tar, a folder, official rows in base64 and IGLUE's with --image_root: the same pictures and captions."""
    pictures = samples.official(tmp_path, 6) / "cc3m_path/images"
    for i in range(6):
        (pictures / f"{i}.json").write_text(json.dumps({"caption": samples.said(i)}))
    iglue = [{"img_path": f"{i}.jpg", "sentences": [{k: [text] for k, text in samples.said(i).items()}]} for i in range(6)]
    samples.lines(tmp_path / "iglue.jsonl", iglue)
    said = []
    for source in (samples.write_tar(tmp_path / "a.tar", 6), pictures, tmp_path / "cc3m",
                   f"{tmp_path}/iglue.jsonl --image_root {pictures}"):
        assert evaluate.main(f"retrieval --ckpt {checkpoint} --rerank 2 --cache {tmp_path}/cache --data {source}".split()) == 0
        said.append(capsys.readouterr().out.splitlines()[2:])
    assert said[0] == said[1] == said[2] == said[3] and len(said[0]) == 16


def test_one_image_at_a_time_is_in_memory(tokenizer, rows):
    alive, most = [], []

    def opened(image):
        image = image.copy()
        alive.append(weakref.ref(image))
        most.append(sum(x() is not None for x in alive))
        return image
    lazy = [row | {"image": functools.partial(opened, row["image"])} for row in rows]
    model = make(tokenizer)
    assert evaluate.retrieval(model, tokenizer, lazy) == evaluate.retrieval(model, tokenizer, rows)
    assert len(most) == 6 and max(most) <= 2                                 # one, and the next while it is opened
    small = evaluate.small_rows(lazy, 32)
    assert evaluate.retrieval(model, tokenizer, small) == evaluate.retrieval(model, tokenizer, rows) and len(most) == 12


def test_languages_are_grouped_by_their_role_in_training_and_each_has_its_chance(checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint, weights_only=True)
    state["config"]["languages"] = {"seen": ["de", "fr"], "text_only": ["cs"]}
    torch.save(state, tmp_path / "ckpt.pt")
    path = own(tmp_path)
    found = []
    for options in ([], ["--common"], ["--languages", "en", "--common"]):
        assert evaluate.main(["retrieval", "--ckpt", f"{tmp_path}/ckpt.pt", "--data", path, "--rerank", "0", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        found.append({line[:22].strip(): line[22:].split()[:2] for line in lines[3:lines.index(next(
            line for line in lines if line.startswith("image to text")))]})
    assert found[0] == {"en": ["6", "16.67"], "de": ["5", "20.00"], "seen with images (1)": ["5", "20.00"],
                        "never in training (1)": ["6", "16.67"]}
    assert found[1]["en"] == found[1]["de"] == ["5", "20.00"] and found[2]["en"] == ["6", "16.67"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_multiplies_in_the_type_of_training(dtype, monkeypatch):
    monkeypatch.setattr("model.training_dtype", lambda device: (dtype, "the test says so"))
    with torch.autocast("cpu", torch.bfloat16), evaluate.inference_context(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_report_has_every_language_and_group_and_prints(tokenizer, capsys):
    report = evaluate.demo_report(make(tokenizer), tokenizer, rerank=2, sets=("test_concept",))
    assert len(report["test_concept"]) == len(emoji.meta()["list_patterns"])             # all languages
    assert list(report["groups"]["test_concept"]) == list(evaluate.GROUPS)
    seen = [report["test_concept"][k]["t2i_r10"] for k in emoji.languages("seen")]
    assert report["groups"]["test_concept"]["seen"]["t2i_r10"] == pytest.approx(sum(seen) / 6)
    evaluate.print_table(json.loads(json.dumps(report)))
    out = capsys.readouterr().out
    assert "never in training (4)" in out and "chance" in out and max(map(len, out.splitlines())) <= 120
    for head in ("equal", "re-ranked", "by match", "new names"):             # also where they print the plain R@1 again
        assert head in out
