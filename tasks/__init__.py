"""The benchmarks: one class each, by the name that train.py --task and evaluate.py take."""
from tasks.marvl import Marvl
from tasks.xgqa import Xgqa, XgqaClassifier
from tasks.xvnli import Xvnli, XvnliPremise

TASKS = {task.name: task for task in (Xvnli, XvnliPremise, Xgqa, XgqaClassifier, Marvl)}
