"""Exercise 4: a 26th language in the demo.

    python -m pytest tests/exercises/test_language.py        fails until you have solved it

What to build
    A language that no image has a caption in, and that the demo translates into: one more code in
    the group "text_only". Take your own, if you can name the 514 things. (The Unicode CLDR names
    them in more than a hundred languages; demo/LICENSES says where.) Or make one up. That is the
    sharper experiment: nobody can say that the model knew its words from elsewhere.

    1. demo/meta.json: its code among "text_langs", and its list pattern ("a, b and c").
    2. A name of every concept in this language, in what emoji.concepts() returns.

Where to read
    demo/emoji.py: the docstring, concepts(), join(). demo/datasets.py: who reads the names.

How the test judges
    Every concept has a name, and different things have different names. The names are not copied:
    most of them stand in no other language. Scenes can be listed. The parallel text has sentences
    in it, images have not; the tokenizer is trained on it, and the test sets ask in it.

Hint
    A made-up language needs no dictionary: a rule that changes the letters of English words is
    enough (codecs has rot13). ISO 639 keeps the codes qaa to qtz free for such things.

Then
    python train.py --steps 500 --out out/mine
    python evaluate.py retrieval --ckpt out/mine/ckpt.pt --languages en pt YOURS
    Does it find images as well as Portuguese does? Now take its sentences out of the parallel text
    (group "never"): what is left, and why?
"""
import collections

import numpy as np

from demo import emoji
from demo.datasets import DemoImages, DemoParallel, training_texts

OLD = "en de fr cs ja zh ar bg bn da el es et id ko pt ru sw ta tr vi hi it nl uk".split()


def new_language():
    added = [code for code in emoji.languages("text_only") if code not in OLD]
    assert added, "demo/meta.json: text_langs has the fifteen codes that it had"
    return added[0]


def names(language):
    return [concept["name"][language] for concept in emoji.concepts().values()]


def test_every_thing_has_a_name_of_its_own():
    mine = names(new_language())
    assert len(mine) == 514 and all(name.strip() == name != "" for name in mine)
    assert len(set(mine)) >= 500


def test_the_names_are_not_those_of_another_language():
    mine = names(new_language())
    known = {name.lower() for language in OLD for name in names(language)}
    shared = sum(name.lower() in known for name in mine)
    assert shared < 0.25 * len(mine), f"{shared} of {len(mine)} names stand in another language"


def test_a_scene_lists_its_things():
    language = new_language()
    ids = list(emoji.concepts())[:3]
    text = emoji.caption(ids, language)
    places = [text.index(emoji.concepts()[i]["name"][language]) for i in ids]
    assert places == sorted(places) and emoji.meta()["list_patterns"][language].keys() >= {"2", "end"}


def test_the_parallel_text_has_it_and_images_have_not():
    language = new_language()
    assert language in DemoParallel().languages() and language not in DemoImages().languages()
    mine = set(names(language))
    dataset = DemoParallel(scenes=0)
    drawn = collections.Counter()
    for index in range(2 * len(dataset)):
        a, b, _ = dataset[index % len(dataset), np.random.default_rng(index)]
        drawn[(a in mine) + (b in mine)] += 1
    share = drawn[1] / drawn.total()
    assert 0.03 < share < 0.2, f"{share:.0%} of the pairs have a sentence in it; one in 16 expected"


def test_the_tokenizer_learns_from_it_and_the_test_sets_ask_in_it():
    language = new_language()
    train = [concept["name"][language] for concept in emoji.concepts().values()
             if concept["split"] == "train"]
    assert set(train) <= set(training_texts())
    assert emoji.split("val_concept")[0]["captions"][language][0] in names(language)
