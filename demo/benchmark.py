"""A stand-in for the paper's benchmarks: annotations and pictures made from the demo's drawings, in
the formats and under the names of the published files, so that the same readers, flags and scores
work on it (tasks/). Whoever has none of the published pictures sees here whether the method holds.

    python -m demo.benchmark DIR            DIR/datasets: annotations; DIR/images: pictures

Training and validation sets are in English, in the training styles. Every test set is in all 25
languages, its pictures are in the held-out style, and all languages share them. Sentences consist
of the words and list patterns of the Unicode CLDR: there is no sentence template of ours.

A THING is a name ("red apple") or a group ("fruit", which any fruit is). What is asked:

    XVNLI       A sentence lists two things. The picture shows both: entailment. It shows one of
                them: neutral. It shows none: contradiction. (The premise, "sentence1", is a caption
                of the picture.)
    GQA, xGQA   A name: is it there? yes or no. Two names: which is there? Its English name. A
                group: how many of it are there? 1, 2, 3 or 4.
    NLVR2,      One thing. True: both pictures show it. False: one of them does.
    MaRVL
    Flickr30k,  Lists of two to four things in any order. In English five captions a picture, in
    xFlickr&CO  which keywords stand for some names; in the tests one of names.
    WIT         One thing: its name, and a list of its keywords.

No answer can be guessed from the words alone: each sentence stands beside pictures of every label,
equally often. XVNLI's and NLVR2's pictures alone say nothing either; a sentence and ONE picture of
MaRVL are right in 75 %. The things of one question share no subgroup ("animal-mammal"): what is not
there does not resemble what is. The table that is printed counts all this from what was written.
"""
import argparse
import base64
import collections
import functools
import io
import json
import pathlib
from typing import NamedTuple

import numpy as np

from demo import emoji

# Blocks of questions in the sets. A block is balanced in itself.
BLOCKS = {"xvnli": {"train": 1344, "dev": 56, "test": 56, "few_shot": 16},      # of 9 questions
          "xgqa": {"train": 504, "dev": 21, "test": 21, "few_shot": 4},         # of 24
          "marvl": {"train": 1008, "dev": 42, "test": 42, "few_shot": 7},       # of 12
          "xflickrco": {"train": 2000, "dev": 100, "test": 500, "few_shot": 100},   # of 1 picture
          "wit": {"train": 2000, "dev": 250, "test": 250}}
LANGUAGES = [code for group in ("seen", "text_only", "never") for code in emoji.languages(group)]
FEW_SHOT = ["ar", "id"]                 # languages that have a small training set too
SPLITS = {"train": ["en"], "dev": ["en"], "test": LANGUAGES, "few_shot": FEW_SHOT}
GROUPS = 0.15                           # share of groups among the things
KEYWORDS = 0.2                          # share of names that are replaced in Flickr30k's captions
MEMBERS = 5                             # a group has at least so many concepts
MATCH = 0.6                             # F1 of a group's word, at least, in every language


# --------------------------------------------------------------------------------------------------
# Things
# --------------------------------------------------------------------------------------------------

class Thing(NamedTuple):
    words: dict                         # {language: what it is called}
    members: tuple                      # ids of the concepts that are one: several for a group


def trained():
    """The concepts that training shows: {id: concept}."""
    return {i: c for i, c in emoji.concepts().items() if c["split"] == "train"}


@functools.cache
def names():
    return [Thing(concept["name"], (i,)) for i, concept in trained().items()]


@functools.cache
def keyword_index(language):
    """{keyword: set of the concepts that have it}"""
    index = collections.defaultdict(set)
    for i, concept in trained().items():
        for word in concept["kw"].get(language, []):
            index[word].add(i)
    return index


@functools.cache
def groups():
    """Concepts that share an English keyword. Another language's word for them is the keyword whose
    concepts agree best (F1). Kept where that is a good word in every language, and a name in none.
    """
    found = []
    used = {(language, thing.words[language]) for thing in names() for language in LANGUAGES}
    for keyword, members in sorted(keyword_index("en").items()):
        if len(members) < MEMBERS:
            continue
        words = {}
        matches = []
        for language in LANGUAGES:
            index = keyword_index(language)
            near = {word for word in index if index[word] & members}
            scored = [(f1(index[word], members), word) for word in near]
            match, words[language] = max(scored, default=(0.0, ""))
            matches.append(match)
        own = set(words.items())
        if min(matches) >= MATCH and not own & used:
            used |= own
            found.append(Thing(words, tuple(sorted(members))))
    return found


def f1(a, b):
    """How far two sets agree: 1 where they are equal, 0 where they share nothing."""
    return 2 * len(a & b) / (len(a) + len(b))


def kinds(thing):
    """The subgroups of its concepts."""
    return {emoji.concepts()[i]["subgroup"] for i in thing.members}


def pick(rng, count, *pools):
    """Things that share no subgroup: the first of pools[0], the second of pools[1] ..., the others
    of names and groups."""
    chosen = []
    taken = set()
    while len(chosen) < count:
        pool = groups() if rng.random() < GROUPS else names()
        if len(chosen) < len(pools):
            pool = pools[len(chosen)]
        thing = pool[rng.integers(len(pool))]
        if taken.isdisjoint(kinds(thing)):
            taken |= kinds(thing)
            chosen.append(thing)
    return chosen


def concepts_of(things, rng):
    """A concept of each thing, in any order: what a picture shows."""
    ids = [thing.members[rng.integers(len(thing.members))] for thing in things]
    return [ids[i] for i in rng.permutation(len(ids))]


def shows(ids, thing):
    return not set(ids).isdisjoint(thing.members)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

class Question(NamedTuple):
    texts: dict                         # {language: its sentence, or a list of captions}
    pictures: tuple                     # of each picture the ids of its concepts
    name: str                           # of the question, from which those of its files are made
    label: object = None


class Folder:
    """What is written into a folder, and what must be said of it."""

    def __init__(self, path, scale=1.0):
        """scale: factor of all numbers of blocks."""
        self.annotations = pathlib.Path(path, "datasets")
        self.images = pathlib.Path(path, "images")
        self.scale = scale
        self.shown = {}                 # {path of a picture below images: its drawings}
        self.questions = {}             # {benchmark: {split: [Question]}}

    def picture(self, ids, split, rng, *places):
        """Draws concepts: in the held-out style for a test, else in any other style, and varied for
        training. Writes the picture to all these places below images."""
        styles = emoji.training_drawings()
        drawings = [styles[i][rng.integers(len(styles[i]))] for i in ids]
        if split == "test":
            drawings = [f"{emoji.meta()['test_vendor']}/{i}" for i in ids]
        image = emoji.draw(drawings, rng if split in ("train", "few_shot") else None)
        for place in places:
            path = self.images / place
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
            self.shown[place] = drawings

    def text(self, place, rows):
        """Writes a .jsonl or .json file below datasets."""
        path = self.annotations / place
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        text = "".join(lines) if path.suffix == ".jsonl" else json.dumps(rows, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")

    def benchmark(self, name, make, files):
        """make(folder, split, number of the block, rng) -> its questions. files(questions, split,
        language) -> {place of a file: rows}."""
        self.questions[name] = {}
        for split, count in BLOCKS[name].items():
            questions = []
            for block in range(max(1, round(self.scale * count))):
                seed = list(BLOCKS).index(name), list(SPLITS).index(split), block
                questions += make(self, split, block, np.random.default_rng(seed))
            for language in SPLITS[split]:
                for place, rows in files(questions, split, language).items():
                    self.text(place, rows)
            self.questions[name][split] = questions


def sentences(things):
    """{language: the list of these things}"""
    return {language: emoji.join([thing.words[language] for thing in things], language)
            for language in LANGUAGES}


# --------------------------------------------------------------------------------------------------
# XVNLI
# --------------------------------------------------------------------------------------------------

def xvnli_block(out, split, block, rng):
    """Three statements about three pictures. Each statement is entailed by one of them, neutral
    for one and contradicted by one, and each picture has a statement of each label:

        picture k    both things of statement k, one of statement k + 1, none of statement k + 2
    """
    things = pick(rng, 6)
    statements = [things[k:k + 2] for k in (0, 2, 4)]
    questions = []
    for k in range(3):
        other = statements[(k + 1) % 3]
        ids = concepts_of([*statements[k], other[rng.integers(2)]], rng)
        name = f"{list(SPLITS).index(split) + 1}{block:05}{k}"
        out.picture(ids, split, rng, f"flickr30k-images/{name}.jpg")
        questions += [Question(sentences(statement), (ids,), name, entailment(statement, ids))
                      for statement in statements]
    return questions


def entailment(statement, ids):
    """The label of a statement about a picture."""
    count = sum(shows(ids, thing) for thing in statement)
    if count == len(statement):
        return "entailment"
    return "neutral" if count else "contradiction"


def xvnli_files(questions, split, language):
    rows = [{"gold_label": q.label, "sentence1": emoji.caption(q.pictures[0], language),
             "sentence2": q.texts[language], "captionID": f"{q.name}.jpg#0",
             "pairID": f"{q.name}.jpg#0r{number % 3}{q.label[0]}", "Flikr30kID": q.name}
            for number, q in enumerate(questions)]
    stem = "train_48" if split == "few_shot" else split
    return {f"XVNLI/annotations/{language}/{stem}.jsonl": rows}


# --------------------------------------------------------------------------------------------------
# xGQA
# --------------------------------------------------------------------------------------------------

@functools.cache
def asked_names():
    """The names that "which is there?" asks for: so few that each is an answer several times."""
    return names()[::4]


def xgqa_block(out, split, block, rng):
    """Eight times "is it there?", eight times "which is there?", eight times "how many?"."""
    prefix = f"{list(SPLITS).index(split) + 1}{block:05}"
    asked = []                          # (things, answer, concepts of the picture, its name)

    # One picture shows a and not b, another b and not a. Asked of both: is a there, which of them?
    for k in range(4):
        a, b, *others = pick(rng, 6, asked_names(), asked_names())
        order = [a, b] if rng.random() < 0.5 else [b, a]
        for j, there in enumerate((a, b)):
            ids = concepts_of([there, *others[2 * j:2 * j + 2]], rng)
            name = f"{prefix}{2 * k + j:02}"
            out.picture(ids, split, rng, f"gqa/{name}.jpg")
            asked.append(([a], "yes" if there is a else "no", ids, name))
            asked.append((order, there.words["en"], ids, name))

    # n concepts of one group and 4 - n of another, how many are there of each?
    a, b = pick(rng, 2, groups(), groups())
    for n in range(5):
        ids = [*rng.choice(a.members, n, replace=False),
               *rng.choice(b.members, 4 - n, replace=False)]
        ids = rng.permutation(ids).tolist()
        name = f"{prefix}{8 + n:02}"
        out.picture(ids, split, rng, f"gqa/{name}.jpg")
        for thing, count in ((a, n), (b, 4 - n)):
            if count:
                asked.append(([thing], str(count), ids, name))
    return [Question(sentences(things), (ids,), name, answer)
            for things, answer, ids, name in asked]


def xgqa_answers():
    found = ["no", "yes", "1", "2", "3", "4", *(thing.words["en"] for thing in asked_names())]
    return {answer: number for number, answer in enumerate(dict.fromkeys(found))}


def xgqa_files(questions, split, language):
    if split in ("train", "dev"):
        stem = {"train": "train", "dev": "valid"}[split]
        rows = [{"img_id": q.name, "label": {q.label: 1.0}, "question_id": f"{number:08}",
                 "sent": q.texts[language]} for number, q in enumerate(questions)]
        return {f"gqa/annotations/{stem}.json": rows,
                "gqa/annotations/trainval_ans2label.json": xgqa_answers()}
    stem = {"test": "test", "few_shot": "train_48"}[split]
    rows = {f"{number:08}": {"imageId": q.name, "question": q.texts[language], "answer": q.label}
            for number, q in enumerate(questions)}
    return {f"xGQA/annotations/few_shot/{language}/{stem}.json": rows}


# --------------------------------------------------------------------------------------------------
# NLVR2 and MaRVL
# --------------------------------------------------------------------------------------------------

def marvl_block(out, split, block, rng):
    """Three things, three pictures: picture k shows all but thing k. So two pictures share one
    thing x, and each has one that the other lacks. They are shown in both orders, beside the words
    for x (true) and for the next thing (false).

    Half the questions of each pair are true, and half of those of each thing. Who sees one picture
    that lacks the thing knows that it is false; one that shows it says "true" in two of three."""
    things = pick(rng, 3)
    pictures = [concepts_of(things[:k] + things[k + 1:], rng) for k in range(3)]
    places = {k: marvl_places(split, block, k) for k in range(3)}
    questions = []
    for x in range(3):
        following = (x + 1) % 3
        last = (x + 2) % 3
        for order, (left, right) in enumerate([(following, last), (last, following)]):
            pair = f"{split}-{block}-{2 * x + order}"
            if split != "few_shot":
                places[left].append(f"nlvr2/{pair}-img0.png")
                places[right].append(f"nlvr2/{pair}-img1.png")
            shown = pictures[left], pictures[right]
            for number, thing in enumerate((things[x], things[following])):
                label = all(shows(ids, thing) for ids in shown)
                name = f"{pair}-{number} {left} {right}"
                questions.append(Question(sentences([thing]), shown, name, label))
    for k, ids in enumerate(pictures):
        out.picture(ids, split, rng, *places[k])
    return questions


def marvl_places(split, block, number):
    """The files of a picture below images but for NLVR2's: a folder of each language has it."""
    others = [language for language in SPLITS[split] if language != "en"]
    if split == "few_shot":
        return [f"marvl_fewshot/{language}/all/{block}-{number}.jpg" for language in others]
    return [f"marvl-images/{language}/images/{block}-scene/{block}-{number}.jpg"
            for language in others]


def marvl_files(questions, split, language):
    rows = []
    for count, q in enumerate(questions):
        identifier, *numbers = q.name.split()
        if language == "en":
            rows.append({"sentence": q.texts["en"], "label": str(q.label),
                         "identifier": identifier})
            continue
        block = identifier.split("-")[1]
        concept = f"{block}-scene"
        folder = "" if split == "test" else f"{concept}/"       # few-shot rows name it twice
        left, right = (f"{folder}{block}-{number}.jpg" for number in numbers)
        rows.append({"concept": concept, "language": language, "caption": q.texts[language],
                     "left_img": left, "right_img": right, "id": f"{language}-{count}",
                     "label": q.label})
    if language == "en":
        return {f"nlvr2/annotations/{split}.jsonl": rows}
    if split == "test":
        return {f"marvl/zero_shot/annotations/marvl-{language}.jsonl": rows}
    return {f"marvl/few_shot/annotations/marvl-{language}_train10x2.jsonl": rows}


# --------------------------------------------------------------------------------------------------
# Flickr30k and xFlickr&CO, WIT
# --------------------------------------------------------------------------------------------------

def flickr_block(out, split, block, rng):
    """A picture of two to four things, which captions list in any order."""
    things = pick(rng, int(rng.integers(2, 5)), *[names()] * 4)
    ids = concepts_of(things, rng)
    name = f"{list(SPLITS).index(split) + 5}{block:06}"
    coco = split == "test" and block % 2
    name = f"COCO_val2014_{name:0>12}" if coco else name
    out.picture(ids, split, rng, f"{'val2014' if coco else 'flickr30k-images'}/{name}.jpg")
    if split in ("train", "dev"):
        captions = {"en": [any_caption(ids, rng) for _ in range(5)]}
    else:
        order = rng.permutation(ids)
        captions = {language: [emoji.caption(order, language)] for language in LANGUAGES}
    return [Question(captions, (ids,), name)]


def any_caption(ids, rng):
    """English names in any order; keywords stand for some."""
    words = []
    for i in rng.permutation(ids):
        concept = emoji.concepts()[i]
        keywords = concept["kw"].get("en")
        replaced = keywords and rng.random() < KEYWORDS
        words.append(str(rng.choice(keywords)) if replaced else concept["name"]["en"])
    return emoji.join(words, "en")


def flickr_files(questions, split, language):
    rows = [{"sentences": q.texts[language], "id": q.name.split("_")[-1],
             "img_path": f"{q.name}.jpg"} for q in questions]
    if split == "test":
        files = {f"xFlickrCO/annotations/{language}/test.jsonl": rows}
        if language == "en":            # the half that Flickr30k has
            own = [row for row in rows if not row["img_path"].startswith("COCO")]
            files["flickr30k/annotations/test_ann.jsonl"] = own
        return files
    if split == "few_shot":
        return {f"xFlickrCO/annotations/{language}/train_100.jsonl": rows}
    stem = {"train": "train", "dev": "valid"}[split]
    return {f"flickr30k/annotations/{stem}_ann.jsonl": rows}


def wit_block(out, split, block, rng):
    """One thing, with two captions in a language where it has keywords."""
    order = np.random.default_rng(block // len(names())).permutation(len(names()))
    i, = names()[order[block % len(names())]].members       # each once before any comes again
    name = f"{split}_{block}"
    out.picture([i], split, rng, f"wit/{name}.jpg")
    captions = {}
    for language in SPLITS[split]:
        both = [emoji.caption([i], language), emoji.keywords(i, language, rng)]
        captions[language] = list(dict.fromkeys(both))
    return [Question(captions, ([i],), name)]


def wit_files(out, questions, split, language):
    rows = []
    for q in questions:
        picture = base64.b64encode((out.images / "wit" / f"{q.name}.jpg").read_bytes()).decode()
        rows += [{"language": language, "page_url": f"https://{language}.example.org/{q.name}",
                  "image_url": f"https://example.org/{q.name}.jpg", "image_content": picture,
                  "caption_reference_description": caption, "wit_ix": f"wit_{q.name}"}
                 for caption in q.texts[language]]
    stem = "val" if split == "dev" else split
    return {f"wit/annotations-bs64/{stem}_{language}.jsonl": rows}


# --------------------------------------------------------------------------------------------------
# The whole
# --------------------------------------------------------------------------------------------------

def write(path, scale=1.0):
    """Writes the benchmark -> the Folder."""
    out = Folder(path, scale)
    out.benchmark("xvnli", xvnli_block, xvnli_files)
    out.benchmark("xgqa", xgqa_block, xgqa_files)
    out.benchmark("marvl", marvl_block, marvl_files)
    out.benchmark("xflickrco", flickr_block, flickr_files)
    out.benchmark("wit", wit_block, functools.partial(wit_files, out))
    guess = {name: without_pictures(splits["test"]) for name, splits in out.questions.items()}
    for name, content in (("drawings.json", out.shown), ("guess.json", guess)):
        (out.images / name).write_text(json.dumps(content, indent=0), encoding="utf-8")
    return out


def best_guess(seen, labels):
    """% that are right of the best answers to what is seen alone: the most frequent label of each.
    It is chosen on the very set that it is measured on, so no such guesser can do better."""
    counts = collections.defaultdict(collections.Counter)
    for what, label in zip(seen, labels):
        counts[what][label] += 1
    return 100 * sum(max(found.values()) for found in counts.values()) / len(labels)


def without_pictures(questions):
    """% that the best guessers have who see "nothing" or the "text": accuracy, or R@1."""
    if questions[0].label is None:
        return dict.fromkeys(("nothing", "text"), 100 / len(questions))
    found = guesses(questions)
    return {key: found[key] for key in ("nothing", "text")}


def guesses(questions):
    """{what a guesser sees: % right}"""
    labels = [q.label for q in questions]
    texts = [q.texts["en"] for q in questions]
    pictures = [tuple(frozenset(ids) for ids in q.pictures) for q in questions]
    found = {"nothing": best_guess([None] * len(labels), labels),
             "text": best_guess(texts, labels),
             "pictures": best_guess(pictures, labels)}
    if len(pictures[0]) == 2:           # of one picture it matters only whether it shows the thing
        things = {thing.words["en"]: thing for thing in names() + groups()}
        for side, name in enumerate(("left", "right")):
            seen = [(text, shows(pair[side], things[text])) for text, pair in zip(texts, pictures)]
            found[f"text and {name}"] = best_guess(seen, labels)
    return found


def rows_of(question):
    """Its rows in English: of a picture one for each caption."""
    text = question.texts["en"]
    return len(text) if isinstance(text, list) else 1


def print_summary(out):
    print(f"test sets in {len(LANGUAGES)} languages\n{'rows':8}{'train':>8}{'dev':>8}{'test':>8}   "
          f"% right of the best guesser who sees only")
    for name, splits in out.questions.items():
        counts = [sum(rows_of(q) for q in splits[split]) for split in ("train", "dev", "test")]
        line = f"{name:8}" + "".join(f"{count:8,}" for count in counts)
        shown = f"nothing {without_pictures(splits['test'])['nothing']:.2f} (R@1)"
        if splits["test"][0].label is not None:
            shown = ", ".join(f"{k} {v:.1f}" for k, v in guesses(splits["test"]).items())
        print(f"{line}   {shown}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="where datasets/ and images/ are written")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of questions")
    args = parser.parse_args()
    try:
        print_summary(write(args.folder, args.scale))
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
