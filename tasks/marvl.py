"""MaRVL: is a sentence about two pictures true?

Liu et al. 2021 (arXiv 2109.13238): pictures and sentences of five cultures, written by native
speakers. It has no training set; models are fine-tuned on NLVR2 (Suhr et al. 2019), whose sentences
are English, and chosen by NLVR2's dev set. NLVR2's test set is the English row. Files as in IGLUE
(Bugliarello et al. 2022, arXiv 2201.11732):

    nlvr2/annotations/{train,dev,test}.jsonl                       NLVR2's own lines
    nlvr_en/nlvr_{train,dev,test}.json                             or X-VLM's lists of the same
    marvl/zero_shot/annotations/marvl-id.jsonl ...
    marvl/zero_shot/annotations_machine-translate/marvl-id_gmt.jsonl ...   translated into English
    marvl/few_shot/annotations/marvl-id_train10x2.jsonl ...        --few_shot id,10x2

As XVLMPlusForMARVL of X2-VLM (models/model_classification.py): the sentence goes through the fusion
encoder twice, once for each picture, and an MLP reads both first tokens. CCLM-3M and CCLM-4M, whose
numbers are in `published`, have 12 fusion layers instead, which attend to the two pictures in turn.
Few-shot means are over id, tr and zh: sw and ta have no such files.
"""
import functools

from tasks.common import Classification, Example, read_json, read_lines

LABELS = {"False": 0, "True": 1}        # as official dataset/nlvr_dataset.py
NLVR2 = {"train": "train", "val": "dev", "test": "test"}


class Marvl(Classification):
    name = "marvl"
    languages = ("en", "id", "sw", "ta", "tr", "zh")
    classes = 2
    pictures = 2
    columns = {"n": "n", "chance": "chance", "accuracy": "accuracy"}
    source = ("github.com/e-bug/iglue, datasets/marvl and datasets/nlvr2 (NLVR2's train.json is in "
              "github.com/lil-lab/nlvr, nlvr2/data),")
    image_source = ("MaRVL (marvl-images/id/images/CONCEPT/NAME, marvl_fewshot/id/all/NAME) and "
                    "NLVR2 (anywhere below nlvr2/)")
    published = {"zero-shot": {"CCLM-3M": 65.91, "CCLM-4M": 67.17, "UC2": 57.28},
                 "few-shot 10x2": {"CCLM-3M": 70.53, "CCLM-4M": 72.57, "UC2": 58.32}}

    def examples(self, split, language="en", few_shot=None, translated=False):
        path, rows = self.rows(split, language, few_shot, translated)
        found = []
        for number, row in enumerate(rows, 1):
            try:
                pictures, text = self.nlvr2(row) if language == "en" else self.marvl(row, few_shot)
                found.append(Example(pictures, text, LABELS[str(row["label"])]))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{path}, row {number}: {error!r} is not as in MaRVL and NLVR2 "
                                 f"(docs/data.md, Benchmarks)") from None
        return found

    def rows(self, split, language, few_shot, translated):
        """-> (path, [dict])"""
        if language == "en":
            path = self.root / "nlvr2" / "annotations" / f"{NLVR2[split]}.jsonl"
            lists = self.root / "nlvr_en" / f"nlvr_{NLVR2[split]}.json"
            if lists.exists() and not path.exists():
                return lists, read_json(lists, self.source)
        elif few_shot:
            path = self.root / "marvl" / "few_shot" / "annotations"
            path = path / f"marvl-{language}_train{few_shot}.jsonl"
        elif split == "test":
            folder = "annotations_machine-translate" if translated else "annotations"
            name = f"marvl-{language}_gmt.jsonl" if translated else f"marvl-{language}.jsonl"
            path = self.root / "marvl" / "zero_shot" / folder / name
        else:
            raise ValueError(f"{self.name} has no {split} set in {language}: leave --languages out "
                             f"(English), or --few_shot {language},10x2 takes its 80 sentences")
        return path, read_lines(path, self.source)

    def nlvr2(self, row):
        """A row of NLVR2 -> (its two pictures, its sentence)."""
        if "images" in row:                                      # X-VLM's: paths of its authors
            names = [path.rsplit("/", 1)[-1] for path in row["images"]]
        else:                                                    # "dev-850-0-1": sentence 1 ...
            pair = row["identifier"].rsplit("-", 1)[0]           # ... about the pair "dev-850-0"
            names = [f"{pair}-img0.png", f"{pair}-img1.png"]
        first, second = [self.nlvr2_pictures.get(name, self.picture("nlvr2", name))
                         for name in names]
        return (first, second), row["sentence"]

    @functools.cached_property
    def nlvr2_pictures(self):
        """{name: path}. NLVR2 has 100 folders of training pictures, but no name twice: pictures are
        found wherever they were unpacked below nlvr2/."""
        return {path.name: path for path in self.picture("nlvr2").rglob("*.png")}

    def marvl(self, row, few_shot):
        """A row of MaRVL -> (its two pictures, its sentence)."""
        names = [row["left_img"], row["right_img"]]
        if few_shot:                                             # "CONCEPT/NAME" in these files
            folder = self.picture("marvl_fewshot", row["language"], "all")
            names = [name.rsplit("/", 1)[-1] for name in names]
        else:
            folder = self.picture("marvl-images", row["language"], "images", row["concept"])
        return tuple(folder / name for name in names), row["caption"]
