"""Files of weights: checkpoints of train.py, PyTorch's pickles, safetensors. Reading one never runs code.

A checkpoint is one dict of plain data, written by torch.save:

    {"model": state dict, "optimizer": ..., "step": int, "rng": [one per process],
     "tokenizer": the bytes of a sentencepiece model, or None,
     "config": {"model": the fields of model.Config, "train": the settings of train.py}}

    python -m formats.checkpoints FILE ...        names and shapes of the tensors in a file
"""
import argparse
import json
import math
import os
import pathlib
import re
import shutil
import sys
import zipfile

import numpy as np
import torch

# --------------------------------------------------------------------------------------------------
# Checkpoints and other pickles
# --------------------------------------------------------------------------------------------------

def write_checkpoint(path, state, keep=0):
    """Writes a checkpoint so that a kill at any moment, or a full disk, leaves the old file or the new
    one. keep: how many earlier checkpoints stay beside it as ckpt_STEP.pt."""
    # Written under another name and flushed to disk; renaming is then one step that cannot fail halfway.
    tmp_path = path.with_name(path.name + ".tmp")
    try:
        with open(tmp_path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            keep_earlier(path, keep)
        os.replace(tmp_path, path)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError that says "enforce fail". Other RuntimeErrors are
        # not about this file: for example, a data worker that died at this moment.
        if isinstance(error, RuntimeError) and "enforce fail" not in str(error):
            raise
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        raise ValueError(f"{path} cannot be written, {free:,.0f} MB are free there ({error}); "
                         f"what stood there before is whole") from None
    finally:
        tmp_path.unlink(missing_ok=True)                         # exists only when something failed


def keep_earlier(path, keep):
    """Gives the checkpoint at `path` a second name, ckpt_STEP.pt, and deletes all but the last `keep`."""
    step = torch.load(path, weights_only=True, mmap=True)["step"]
    earlier = path.with_name(f"ckpt_{step}.pt")
    earlier.unlink(missing_ok=True)
    os.link(path, earlier)                                       # a link: ckpt.pt is never absent
    found = sorted(path.parent.glob("ckpt_*.pt"), key=lambda file: int(file.stem[5:]))
    for stale in found[:-keep]:
        stale.unlink()


def read_pickle(path, mmap=False):
    """torch.load that cannot run code. Raises ValueError in one line for a file it cannot read.
    mmap: the tensors map the file, so processes on one machine share one copy of them."""
    mmap = mmap and zipfile.is_zipfile(path)                     # torch's old format cannot be mapped
    try:
        # argparse.Namespace is plain data, and many trainers leave one in their files.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint or file of weights") from None
    except Exception as error:
        # Broad on purpose: broken bytes make the unpickler raise nearly every type of exception. The one
        # to tell apart is its refusal of a file that names a function to call.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(f"{path} is refused, not a checkpoint of plain data: it asks to run "
                             f"{code[1]}") from None
        raise ValueError(f"{path} is truncated or not a checkpoint or file of weights") from None


def read_checkpoint(path, mmap=False):
    """The dict that train.py or weights.py saved. Raises ValueError in one line for anything else."""
    not_ours = ValueError(f"{path} is not a checkpoint of this program; for published weights make one "
                          f"first: python weights.py import {path} --out CKPT")
    if os.path.isdir(path) or str(path).endswith(".safetensors"):
        raise not_ours
    state = read_pickle(path, mmap)
    if not is_checkpoint(state):
        raise not_ours
    return state


def is_checkpoint(state):
    """Does a value that was read have the entries of a checkpoint (top of this file)?"""
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        return False
    dicts = [state.get("model"), state["config"].get("model"), state["config"].get("train")]
    if not all(isinstance(value, dict) for value in dicts):
        return False
    return (all(isinstance(tensor, torch.Tensor) for tensor in state["model"].values())
            and isinstance(state.get("step"), int)
            and isinstance(state.get("tokenizer", 0), (bytes, type(None))))


# --------------------------------------------------------------------------------------------------
# safetensors: 8 bytes that hold the length of a header, the header in JSON, the bytes of the tensors
# --------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor}; each tensor maps its piece of the file. Raises ValueError for a damaged file."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.path.getsize(path):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: map_tensor(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None


def map_tensor(path, begin, entry):
    """One tensor of a safetensors file. begin: where the tensors' bytes begin; entry: its line of the
    header, for example {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}."""
    start, end = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    shape = entry["shape"]
    if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shape} numbers do not fill bytes {start} to {end}")
    if start == end:                                             # numpy cannot map zero bytes
        return torch.zeros(shape, dtype=dtype)
    raw = np.memmap(path, "u1", "c", begin + start, end - start)             # "c": copy on write
    return torch.from_numpy(raw).view(dtype).view(shape)


def write_safetensors(path, tensors):
    """Writes {name: tensor} as safetensors."""
    # The header is padded to a multiple of 8 bytes, and types of 8 bytes come first, then those of 4, 2
    # and 1. So every tensor begins at a multiple of its own number of bytes, and can be mapped.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start = end
        end = start + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())


if __name__ == "__main__":
    for path in map(pathlib.Path, sys.argv[1:]):
        if path.suffix == ".safetensors":
            whole = read_safetensors(path)
        else:
            whole = read_pickle(path, mmap=True)
        for name, tensor in whole.get("model", whole).items():
            print(f"{name:70}{list(tensor.shape)}")
