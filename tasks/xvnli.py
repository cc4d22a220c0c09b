"""XVNLI: does a picture entail a sentence, contradict it, or neither?

IGLUE (Bugliarello et al. 2022, arXiv 2201.11732): SNLI-VE's sentences about pictures of Flickr30k,
and XNLI's translations of them. Fine-tuned on English, tested in four other languages.

    XVNLI/annotations/en/{train,dev,test}.jsonl, XVNLI/annotations/ar/{test,train_48}.jsonl ...
    XVNLI/annotations_machine-translate/ar/test.jsonl ...          translated into English

As the official XVNLI.py: the sentence ("sentence2") and the picture, not the premise ("sentence1",
a caption of the picture); accuracy over the lines with a label, of which the others ("-") are 14 of
1,164. IGLUE's own scripts count those as wrong: accuracy_all_lines.
"""
from tasks.common import Classification, Example, read_lines

# As official models and datasets number them (dataset/xvnli_dataset.py).
LABELS = {"contradiction": 0, "entailment": 1, "neutral": 2, "-": -1}


class Xvnli(Classification):
    name = "xvnli"
    languages = ("en", "ar", "es", "fr", "ru")
    classes = 3
    source = "github.com/e-bug/iglue, datasets/XVNLI, and its train and dev files from the release"
    image_source = "Flickr30k (flickr30k-images/ID.jpg)"
    published = {"zero-shot": {"CCLM-3M": 74.64, "CCLM-4M": 73.32, "UC2": 62.05},
                 "few-shot 48": {"CCLM-3M": 75.15, "CCLM-4M": 74.19, "UC2": 63.68}}
    with_premise = False

    def examples(self, split, language="en", few_shot=None, translated=False):
        folder = "annotations"
        if translated and language != "en":
            folder = "annotations_machine-translate"
        stem = {"train": "train", "val": "dev", "test": "test"}[split]
        name = f"{stem}_{few_shot}" if few_shot else stem
        path = self.root / "XVNLI" / folder / language / f"{name}.jsonl"
        found = []
        for number, row in enumerate(read_lines(path, self.source), 1):
            try:
                picture = self.picture("flickr30k-images", f"{row['Flikr30kID']}.jpg")
                text = row["sentence2"]
                label = LABELS[row["gold_label"]]
            except KeyError as error:
                raise ValueError(f"{path}, row {number}: {error} is not XVNLI's") from None
            if self.with_premise:
                text = f"{row['sentence1']} {text}"
            if label >= 0 or split != "train":
                found.append(Example((picture,), text, label))
        return found


class XvnliPremise(Xvnli):
    """The same with the premise before the sentence: what a caption adds to the picture."""
    name = "xvnli_premise"
    published = {}
    with_premise = True
