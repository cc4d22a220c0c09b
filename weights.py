"""Checkpoints in and out. One file of dicts and tensors, read with weights_only=True: a checkpoint cannot run code.

    {"model": state dict, "optimizer": ..., "step": int, "rng": [one per process],
     "tokenizer": bytes of the sentencepiece model,
     "config": {"model": the fields of model.Config, "train": the settings of train.py}}

    python weights.py out/ckpt.pt           what a checkpoint holds
"""
import os
import pickle
import shutil
import sys

import torch

from model import CCLM, Config


def write_checkpoint(path, state, keep=0):
    """Written beside its place, flushed to disk, then renamed: a kill at any moment, or a full disk, leaves the old
    file or the new one. keep: how many earlier ones stay as ckpt_STEP.pt."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                                 # torch hides a full disk in "enforce fail"
        beside.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and "enforce fail" not in str(error):
            raise                                                            # a worker that died at this moment
        raise ValueError(f"{path} cannot be written, {shutil.disk_usage(path.parent).free / 2 ** 20:,.0f} MB are free "
                         f"there ({error}); what stood there before is whole") from None
    if keep and path.exists():                                               # linked: at no moment is there no ckpt.pt
        earlier = path.with_name(f"ckpt_{torch.load(path, weights_only=True, mmap=True)['step']}.pt")
        earlier.unlink(missing_ok=True)
        os.link(path, earlier)
        for stale in sorted(path.parent.glob("ckpt_*.pt"), key=lambda p: int(p.stem[5:]))[:-keep]:
            stale.unlink()
    os.replace(beside, path)


def read_checkpoint(path):
    """The dict that train.py saved; ValueError in one line for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["model"], state["config"]["model"], state["config"]["train"], state["tokenizer"]
        return state
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; `python train.py` makes one") from None
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, IndexError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint of train.py ({type(error).__name__})") from None


def load_weights(model, weights, source):
    """model.load_state_dict, but a misfit is one line: ValueError that names the first tensor that is missing or has
    another shape."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        ours, theirs = (tuple(d[name].shape) if name in d else "absent" for d in (own, weights))
        if ours != theirs:
            raise ValueError(f"{source} does not fit this model: {name} is {theirs} there and {ours} here; repeat its "
                             f"--preset and model settings")
    model.load_state_dict(weights)


def load_model(path):
    """A checkpoint's model, with its own Config -> (CCLM, the whole dict). ValueError in one line when it cannot be."""
    state = read_checkpoint(path)
    try:
        model = CCLM(Config(**state["config"]["model"]))
    except TypeError as error:
        raise ValueError(f"{path} was saved by another version of this program ({error})") from None
    load_weights(model, state["model"], path)
    return model, state


if __name__ == "__main__":
    try:
        model, state = load_model(sys.argv[1] if len(sys.argv) == 2 else "out/ckpt.pt")
    except ValueError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    print(f"step {state['step']}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"vocabulary {model.config.vocabulary:,}")
    for name, value in state["config"]["model"].items():
        print(f"  {name:16}{value}")
