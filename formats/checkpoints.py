"""Files: checkpoints, PyTorch's pickles, safetensors. Nothing that is read can run code; a checkpoint is written beside
its place and renamed.

    {"model": state dict, "optimizer": ..., "step": int, "rng": [one per process], "tokenizer": sentencepiece's bytes,
     "config": {"model": the fields of model.Config, "train": the settings of train.py}}

    python -m formats.checkpoints FILE ...        the tensors in a file, with their shapes
"""
import argparse
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import sys
import zipfile

import numpy as np
import torch


def write_checkpoint(path, state, keep=0):
    """Written beside its place, flushed to disk, then renamed: a kill at any moment, or a full disk, leaves the old
    file or the new one. keep: how many earlier ones stay as ckpt_STEP.pt."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():                                           # linked: at no moment is there no ckpt.pt
            earlier = path.with_name(f"ckpt_{torch.load(path, weights_only=True, mmap=True)['step']}.pt")
            earlier.unlink(missing_ok=True)
            os.link(path, earlier)
            for stale in sorted(path.parent.glob("ckpt_*.pt"), key=lambda p: int(p.stem[5:]))[:-keep]:
                stale.unlink()
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                                 # torch hides a full disk in "enforce fail"
        if isinstance(error, RuntimeError) and "enforce fail" not in str(error):
            raise                                                            # a worker that died at this moment
        raise ValueError(f"{path} cannot be written, {shutil.disk_usage(path.parent).free / 2 ** 20:,.0f} MB are free "
                         f"there ({error}); what stood there before is whole") from None
    finally:
        beside.unlink(missing_ok=True)                                       # there only when something failed


def read_pickle(path, mmap=False):
    """torch.load that cannot run code; ValueError in one line for what it does not read. argparse.Namespace, which
    trainers leave in their files, is plain data."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not a checkpoint; make one of it first: python weights.py import {path} "
                         f"--out CKPT")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint or file of weights") from None
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, OverflowError,
            AssertionError, MemoryError, pickle.UnpicklingError) as error:   # what broken bytes make of the unpickler
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        raise ValueError(f"{path} is refused, not a checkpoint of plain data: it asks to run {code[1]}" if code else
                         f"{path} is truncated or not a checkpoint or file of weights") from None


def read_checkpoint(path, mmap=False):
    """The dict that train.py saved; ValueError in one line for anything else. mmap: its tensors map the file."""
    state = read_pickle(path, mmap)
    try:
        dict(state["model"]), dict(state["config"]["model"]), dict(state["config"]["train"])
        if not isinstance(state["tokenizer"], (bytes, type(None))):
            raise TypeError("tokenizer")
        return state
    except (KeyError, TypeError, IndexError, ValueError):
        raise ValueError(f"{path} is not a checkpoint of train.py; or first: python weights.py import") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor}, each a map of its piece of the file: 8 bytes of length, a JSON header, the tensors' bytes."""
    try:
        with open(path, "rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), os.path.getsize(path)
            header, tensors = json.loads(file.read(length) if length < size else b""), {}
        for name, entry in header.items():
            if name != "__metadata__":
                (start, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
                if end - start != math.prod(shape) * dtype.itemsize or start < 0:        # an end too far: mmap refuses
                    raise ValueError(f"{name} does not fit into the file")
                tensors[name] = torch.zeros(shape, dtype=dtype) if end == start else torch.from_numpy(
                    np.memmap(path, "u1", "c", 8 + length + start, end - start)).view(dtype).view(shape)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None


def write_safetensors(path, tensors):
    """The inverse; wide types first, so that every tensor lies aligned."""
    codes, header, end = {dtype: code for code, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        t, start = tensors[name], end
        end += t.numel() * t.dtype.itemsize
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())


if __name__ == "__main__":
    for path in map(pathlib.Path, sys.argv[1:]):
        whole = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, mmap=True)
        for name, tensor in whole.get("model", whole).items():
            print(f"{name:70}{list(tensor.shape)}")
