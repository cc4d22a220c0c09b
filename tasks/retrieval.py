"""Retrieval: which picture does a caption mean, which caption describes a picture?

    xflickrco   IGLUE: 2,000 pictures of Flickr30k and COCO, 8 languages; trained on Flickr30k
    wit         IGLUE: pictures of Wikipedia, 11 languages, each with pictures of its own
    multi30k    Flickr30k with five captions in en and de, one in fr and cs
    coco        the paper's 1,000 test pictures in en, zh and ja; coco5k: Karpathy's 5,000 in en
    xm3600      Crossmodal-3600: 3,600 pictures, 36 languages; only a test set
    xtd         XTD-10: 1,000 pictures of COCO, one caption in 11 languages; only a test set

A class says where the files are and what their rows mean. evaluate.retrieval ranks, re-ranks and
counts. Trained as the official models/model_retrieval.py: contrast and match, no masked text;
captions of one picture are soft labels of each other and never its hard negatives.

R@1 by the match head of the K best by cosine, as published, stands under matched_; our sum with the
cosine under reranked_; mean recall is the mean of R@1, R@5 and R@10 of both directions.
"""
import functools
import math
from typing import NamedTuple

from tqdm import tqdm

from formats.images import rgb, undecoded
from formats.records import ImageLines, identity, json_object, reading, reason
from losses import Options, cross_view
from tasks.common import Example, Task, encode, read_json, read_lines, read_text

MATCH_CHANCE = 0.6365                   # the entropy of 1 true : 2 false pairs


class Retrieval(Task):
    """A subclass has read(), and says what the paper reports."""
    unused = ("mlm_head", "text_fusion")
    k = 128                             # candidates that are re-ranked, as published
    # The checkpoint is chosen by the mean recall of the match head, as published, but of the 16
    # best candidates: so a validation costs a twentieth of an epoch. Of 128 it costs a third.
    validation = ("matched_mean_recall",)
    validation_k = 16
    columns = {"n": "n", "chance_r1": "chance", "t2i_r1": "t2i", "i2t_r1": "i2t",
               "reranked_t2i_r1": "re-ranked t2i", "reranked_i2t_r1": "re-ranked i2t",
               "matched_t2i_r1": "by match t2i", "matched_i2t_r1": "by match i2t"}
    published_as = "R@1 by match, text to image and image to text, mean of the languages but en"

    def read(self, split, language, few_shot, translated):
        """Yields (key, picture, captions) of every row: a key of the picture, which is its path or
        a function that reads its bytes, and a text or a list of texts."""
        raise NotImplementedError

    def images(self, split, language, few_shot=None, translated=False):
        """-> {key: (picture, [captions])}: rows of one picture merged, empty captions left out."""
        found = {}
        for key, picture, captions in self.read(split, language, few_shot, translated):
            texts = captions if isinstance(captions, list) else [captions]
            if not all(isinstance(text, str) for text in (key, *texts)):
                raise ValueError(f"{self.name}: the name {key!r} or a caption of it is no text")
            texts = [text for text in texts if text.strip()]
            if texts:
                found.setdefault(key, (picture, []))[1].extend(texts)
        if not found:
            raise ValueError(f"{self.name}: the {split} set in {language} has no caption")
        return found

    def examples(self, split, language="en", few_shot=None, translated=False):
        """Every caption of every picture. The label says which picture it is, in all languages."""
        images = self.images(split, language, few_shot, translated)
        return [Example((picture,), text, identity(key.encode()))
                for key, (picture, texts) in images.items() for text in texts]

    def rows(self, split, *languages, translated=False):
        """-> rows of evaluate.retrieval: {"image": a function that reads the picture, "captions":
        {language: [text]}}. What has no caption in a language is no candidate there."""
        rows = {}
        for language in languages:
            images = self.images(split, language, translated=translated)
            self.checked([Example((picture,), "", 0) for picture, _ in images.values()])
            for key, (picture, texts) in images.items():
                new = {"image": functools.partial(self.open, picture), "captions": {}}
                rows.setdefault(key, new)["captions"][language] = texts
        return list(rows.values())

    def open(self, picture):
        """-> RGB image; BadRecord."""
        with reading(self, picture):
            with undecoded(picture() if callable(picture) else picture) as image:
                return rgb(image)

    def where(self, picture):
        return str(picture)

    def english(self, split, language):
        """ValueError for a training or validation set that there is not."""
        if language != "en":
            raise ValueError(f"{self.name}: the {split} set is in English only, not in {language}")

    def coco(self, name):
        """The path of COCO_val2014_000000000042.jpg."""
        return self.picture(*name.split("_")[1:2], name)

    def head(self, config):
        """None: the projections and the match head of pre-training are all it needs."""

    def chance(self, batch, tokenizer):
        return {"contrast": math.log(batch), "match": MATCH_CHANCE}

    def losses(self, model, batch, seed, tokenizer):
        texts, images = encode(model, batch)
        images = images._replace(ids=batch["ids"])
        found = cross_view(model, images, texts, None, seed, options=Options(same="positive"))
        return {name: found[name] for name in ("contrast", "match")}


def fields(path, rows, *names):
    """Yields the fields of each row of a file, the first of which is a text; ValueError names the
    row where that is not so."""
    for number, row in enumerate(rows, 1):
        try:
            found = [row[name] for name in names]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, row {number}: {reason(error)}") from None
        if not isinstance(found[0], str):
            raise ValueError(f"{path}, row {number}: {names[0]} is no text")
        yield found


# --------------------------------------------------------------------------------------------------
# IGLUE
# --------------------------------------------------------------------------------------------------

class XFlickrCO(Retrieval):
    """xFlickrCO/annotations/de/{test,train_100}.jsonl, annotations_machine-translate/de/
    test_gmt.jsonl, flickr30k/annotations/{train,valid}_ann.jsonl:
    {"sentences": [text], "img_path": "1007129816.jpg" or "COCO_val2014_000000000042.jpg"}"""
    name = "xflickrco"
    languages = ("en", "de", "es", "id", "ja", "ru", "tr", "zh")
    source = "github.com/e-bug/iglue, datasets/xFlickrCO and datasets/flickr30k,"
    image_source = "Flickr30k (flickr30k-images/ID.jpg) and COCO (val2014/COCO_val2014_ID.jpg)"
    published = {
        "zero-shot": {"CCLM-3M": (67.35, 65.37), "CCLM-4M": (76.56, 73.46), "UC2": (20.31, 17.89)},
        "few-shot 100": {"CCLM-3M": (66.04, 68.15), "CCLM-4M": (74.74, 75.85),
                         "UC2": (19.79, 17.59)},
        "translate-test": {"UNITER": (41.04, 37.49), "VisualBERT": (41.64, 36.44)}}

    def read(self, split, language, few_shot, translated):
        own = self.root / "xFlickrCO"
        if few_shot:
            path = own / "annotations" / language / f"train_{few_shot}.jsonl"
        elif split != "test":
            self.english(split, language)
            name = {"train": "train_ann.jsonl", "val": "valid_ann.jsonl"}[split]
            path = self.root / "flickr30k" / "annotations" / name
        elif translated and language != "en":
            path = own / "annotations_machine-translate" / language / "test_gmt.jsonl"
        else:
            path = own / "annotations" / language / "test.jsonl"
        rows = read_lines(path, self.source)
        for name, texts in fields(path, rows, "img_path", "sentences"):
            flickr = self.picture("flickr30k-images", name)
            yield name, self.coco(name) if name.startswith("COCO_") else flickr, texts


class Base64(NamedTuple):
    """A picture in base64 in a line of a file, read when it is called -> bytes."""
    reader: ImageLines
    number: int

    def __call__(self):
        row = json_object(self.reader.line(self.number))
        return self.reader.image(row["image_content"])

    def __str__(self):
        return self.reader.where(self.number)


class Wit(Retrieval):
    """wit/annotations-bs64/{train_en,val_en,test_ar}.jsonl, wit/annotations_machine-translate-bs64/
    test_ar_gmt.jsonl: IGLUE's wit/annotations after the official utils/wit_preproc.py attached the
    pictures, {"image_url", "caption_reference_description", "image_content": base64}."""
    name = "wit"
    languages = ("en", "ar", "bg", "da", "el", "et", "id", "ja", "ko", "tr", "vi")
    source = ("github.com/zengyan-97/CCLM, utils/wit_preproc.py, makes it of IGLUE's "
              "wit/annotations and Kaggle's wikipedia-image-caption")
    image_source = source
    recipe = Retrieval.recipe | {"epochs": 5.0}
    published = {
        "zero-shot": {"CCLM-3M": (27.46, 28.66), "CCLM-4M": (27.48, 28.75), "UC2": (7.83, 9.09)},
        "translate-test": {"UNITER": (15.43, 16.01), "ViLBERT": (15.40, 16.93)}}

    def read(self, split, language, few_shot, translated):
        folder = "annotations-bs64"
        name = f"{split}_{language}.jsonl"
        if few_shot:
            raise ValueError(f"{self.name} has no few-shot set")
        if split != "test":
            self.english(split, language)
        elif translated and language != "en":
            folder = "annotations_machine-translate-bs64"
            name = f"{split}_{language}_gmt.jsonl"
        path = self.root / "wit" / folder / name
        if not path.exists():
            raise ValueError(f"{path} is missing: {self.source} (docs/data.md, Benchmarks)")
        # The training file has 500,000 pictures: a line is read at a time, and its picture dropped.
        reader = ImageLines(str(path), cache=self.cache)
        for number in tqdm(range(len(reader)), name, leave=False, disable=None):
            picture = Base64(reader, number)
            try:
                row = json_object(reader.line(number))
                if "image_content" not in row:
                    raise ValueError(f"no image_content: {self.source}")
                key = row["image_url"]
                caption = row["caption_reference_description"] or ""
            except (ValueError, KeyError) as error:
                raise ValueError(f"{picture}: {reason(error)}") from None
            yield key, picture, caption


# --------------------------------------------------------------------------------------------------
# Multi30K and COCO, with the lists of the official code
# --------------------------------------------------------------------------------------------------

class CaptionLists(Retrieval):
    """JSON lists of {"image": path, "caption": text or [text]}."""
    recipe = Retrieval.recipe | {"caption_tokens": 40}
    columns = {"n": "n", "chance_r1": "chance", "mean_recall": "mean recall",
               "reranked_mean_recall": "re-ranked", "matched_mean_recall": "by match",
               "matched_t2i_r1": "t2i R@1", "matched_i2t_r1": "i2t R@1"}
    published_as = "mean recall by match, of each language"
    folder = ""                         # of ROOT
    files = {}                          # {split, or split and language: name}

    def read(self, split, language, few_shot, translated):
        if few_shot or translated and language != "en":
            raise ValueError(f"{self.name} has no few-shot and no translated sets")
        if language not in self.languages:
            raise ValueError(f"{self.name} is in {' '.join(self.languages)}, not in {language}")
        name = self.files.get((split, language), self.files[split])
        path = self.root / self.folder / name.format(language)
        rows = read_json(path, self.source)
        for name, captions in fields(path, rows, "image", "caption"):
            # As IGLUE's files name COCO's pictures: val2014/..., not coco/val2014/...
            name = name.removeprefix("coco/")
            yield name, self.picture(name), captions


class Multi30K(CaptionLists):
    """multi30k/{train,val,test_2016_flickr}.{en,de,fr,cs}.json"""
    name = "multi30k"
    languages = ("en", "de", "fr", "cs")
    source = "github.com/zengyan-97/CCLM, finetune/multi30k of its data,"
    image_source = "Flickr30k (flickr30k-images/ID.jpg)"
    folder = "multi30k"
    files = {"train": "train.{}.json", "val": "val.{}.json", "test": "test_2016_flickr.{}.json"}
    published = {
        "English only": {"CCLM-3M": (94.8, 90.3, 90.9, 89.4), "CCLM-4M": (95.7, 91.7, 92.9, 91.7),
                         "UC2": (87.2, 74.9, 74.0, 67.9)},
        "each language": {"CCLM-3M": (94.8, 91.9, 90.6, 88.9), "CCLM-4M": (95.7, 93.0, 92.3, 91.5),
                          "UC2": (87.2, 83.8, 77.6, 74.2)},
        "all languages": {"CCLM-3M": (95.3, 92.4, 92.1, 91.2), "CCLM-4M": (96.0, 93.3, 93.7, 92.8),
                          "UC2": (88.2, 84.5, 83.9, 81.2), "MURAL-large": (93.8, 90.4, 89.9, 87.1)}}


class Coco(CaptionLists):
    """mscoco/{en,ja}.{train,valid,1k_test}.json, mscoco/zh.{train,val,test}.json"""
    name = "coco"
    languages = ("en", "zh", "ja")
    source = "github.com/zengyan-97/CCLM, finetune/mscoco of its data,"
    image_source = "COCO (train2014/COCO_train2014_ID.jpg, val2014/COCO_val2014_ID.jpg)"
    k = 256
    folder = "mscoco"
    files = {"train": "{}.train.json", "val": "{}.valid.json", "test": "{}.1k_test.json",
             ("val", "zh"): "zh.val.json", ("test", "zh"): "zh.test.json"}
    published = {
        "English only": {"CCLM-3M": (93.2, 91.0, 88.8), "CCLM-4M": (94.3, 91.7, 91.5),
                         "UC2": (88.1, 82.0, 71.7)},
        "each language": {"CCLM-3M": (93.2, 90.2, 93.3), "CCLM-4M": (94.5, 92.6, 94.2),
                          "UC2": (88.1, 84.9, 87.3)},
        "all languages": {"CCLM-3M": (93.1, 92.2, 93.2), "CCLM-4M": (94.1, 93.0, 94.3),
                          "UC2": (88.1, 89.8, 87.5)}}


class Coco5k(Coco):
    """The same with mscoco/coco_test.json, the list of X-VLM and ALBEF, as test set."""
    name = "coco5k"
    languages = ("en",)
    source = "github.com/zengyan-97/X-VLM, finetune/coco_test.json of its data,"
    files = Coco.files | {"test": "coco_test.json"}
    published = {}


# --------------------------------------------------------------------------------------------------
# Test sets that came later
# --------------------------------------------------------------------------------------------------

class WithoutTraining(Retrieval):
    """A test set of models that were trained elsewhere."""
    published = {}

    def read(self, split, language, few_shot, translated):
        if split != "test" or few_shot or translated:
            raise ValueError(f"{self.name} is a test set: it has no training, validation, few-shot "
                             f"or translated set")
        if language not in self.languages:
            raise ValueError(f"{self.name} is in {' '.join(self.languages)}, not in {language}")
        return self.read_test(language)

    def read_test(self, language):
        """As read()."""
        raise NotImplementedError


class Xm3600(WithoutTraining):
    """xm3600/captions.jsonl: {"image/key": key, "de": {"caption": [text]}, ...}; about two captions
    of every picture in each language."""
    name = "xm3600"
    languages = tuple("en ar bn cs da de el es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt "
                      "quz ro ru sv sw te th tr uk vi zh".split())
    source = "google.github.io/crossmodal-3600, captions.zip,"
    image_source = "google.github.io/crossmodal-3600, images.tgz (xm3600/KEY.jpg),"

    def read_test(self, language):
        path = self.root / "xm3600" / "captions.jsonl"
        rows = fields(path, read_lines(path, self.source), "image/key", language)
        for number, (key, own) in enumerate(rows, 1):
            if not isinstance(own, dict) or "caption" not in own:
                raise ValueError(f"{path}, row {number}: no field 'caption' in {language!r}")
            yield key, self.picture("xm3600", f"{key}.jpg"), own["caption"]


class Xtd(WithoutTraining):
    """xtd/*/test_1kcaptions_de.txt and xtd/XTD10/test_image_names.txt: line i of both is one pair.
    The pictures are of COCO, 800 of them of its training set: no test of a model that saw it."""
    name = "xtd"
    languages = ("en", "de", "es", "fr", "it", "ja", "ko", "pl", "ru", "tr", "zh")
    source = "github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10 (its files in xtd/)"
    image_source = Coco.image_source

    def read_test(self, language):
        folder = self.root / "xtd"
        file = f"test_1kcaptions_{'jp' if language == 'ja' else language}.txt"
        # Folders XTD10, MIC (en, de, fr) and STAIR (jp) name who wrote the captions.
        path = next(folder.glob(f"*/{file}"), folder / "XTD10" / file)
        texts = read_text(path, self.source).strip().split("\n")
        names = read_text(folder / "XTD10" / "test_image_names.txt", self.source).split()
        if len(texts) != len(names):
            raise ValueError(f"{path} has {len(texts)} lines, test_image_names.txt {len(names)}")
        for name, text in zip(names, texts):
            yield name, self.coco(name), text.strip()
