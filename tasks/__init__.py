"""The benchmarks: one class each, by the name that train.py --task and evaluate.py take."""
from tasks.marvl import Marvl
from tasks.retrieval import Coco, Coco5k, Multi30K, Wit, XFlickrCO, Xm3600, Xtd
from tasks.xgqa import Xgqa, XgqaClassifier
from tasks.xvnli import Xvnli, XvnliPremise

CLASSES = (Xvnli, XvnliPremise, Xgqa, XgqaClassifier, Marvl,
           XFlickrCO, Wit, Multi30K, Coco, Coco5k, Xm3600, Xtd)
TASKS = {task.name: task for task in CLASSES}
