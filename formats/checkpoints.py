"""Files of weights: checkpoints of train.py, PyTorch's pickles, safetensors. Reading runs no code.

A checkpoint is one dict of plain data, written by torch.save:

    {"model": state dict, "optimizer": ..., "step": int, "skipped": steps without an update,
     "tokenizer": the bytes of a sentencepiece model, or None,
     "kept": steps of the earlier checkpoints beside it, which --keep left as ckpt_STEP.pt,
     "config": {"model": the fields of model.Config, "train": the settings of train.py,
                "new": what an import had to initialise, "records": of each stream,
                "languages": {"seen": with images, "text_only": only in parallel text}}}

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

def write_checkpoint(path, state):
    """Writes a checkpoint. A kill at any moment or a full disk leaves the old file or the new."""
    # Written under another name and flushed to disk. Renaming then cannot fail halfway.
    tmp_path = path.with_name(path.name + ".tmp")
    try:
        with open(tmp_path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):    # torch closes half an archive
            raise error.__context__ from None
        # A full disk is a RuntimeError of torch that says "enforce fail". Other RuntimeErrors are
        # not about this file: for example, a data worker died at this moment.
        if isinstance(error, RuntimeError) and "enforce fail" not in str(error):
            raise
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        raise ValueError(f"{path} cannot be written, {free:,.0f} MB are free there ({error}); what "
                         f"stood there before is whole") from None
    finally:
        tmp_path.unlink(missing_ok=True)                        # exists only if something failed


def keep_earlier(path, earlier):
    """Gives the checkpoint at path a second name, so that it outlives the next one; path is never
    absent. OSError where that fails or the name is taken: nothing is overwritten."""
    if earlier.exists():
        if earlier.samefile(path):                              # a run was killed after this
            return
        raise FileExistsError(f"{earlier} exists and is not of this run")
    try:
        os.link(path, earlier)
    except OSError:                                             # a file system without hard links
        tmp_path = path.with_name(earlier.name + ".tmp")
        try:
            shutil.copyfile(path, tmp_path)
            os.replace(tmp_path, earlier)
        finally:
            tmp_path.unlink(missing_ok=True)


class Ignored:
    """Stands for a NumPy number or array in a pickle: a best score or a random state, no weights.
    NumPy's own constructors would trust any bytes."""

    def __init__(self, *arguments):
        pass

    __setstate__ = __init__


NUMPY = ("dtype", "ndarray", "core.multiarray.scalar", "core.multiarray._reconstruct",   # NumPy 1
         "_core.multiarray.scalar", "_core.multiarray._reconstruct")                     # NumPy 2
HARMLESS = [argparse.Namespace, *((Ignored, f"numpy.{name}") for name in NUMPY)]


def read_pickle(path, mmap=False):
    """torch.load that cannot run code; ValueError in one line for a file that it cannot read.
    mmap: the tensors map the file, so the processes of one machine share one copy."""
    try:
        mmap = mmap and zipfile.is_zipfile(path)        # torch's old format cannot be mapped
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint or file of weights") from None
    except Exception as error:
        # Broad, because broken bytes make the unpickler raise nearly every type of exception. Only
        # its refusal of a file that names a function to call is another message.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(f"{path} is refused, not a checkpoint of plain data: it asks to run "
                             f"{code[1]}") from None
        raise ValueError(f"{path} is truncated or not a checkpoint or file of weights") from None


def read_checkpoint(path, mmap=False):
    """The dict that train.py or weights.py saved; ValueError in one line for anything else."""
    published = os.path.isdir(path) or str(path).endswith(".safetensors")
    state = None if published else read_pickle(path, mmap)
    try:
        config = state["config"]
        good = (isinstance(state["step"], int)
                and isinstance(state["tokenizer"], (bytes, type(None)))
                and isinstance(config["model"], dict) and isinstance(config["train"], dict)
                and all(isinstance(tensor, torch.Tensor) for tensor in state["model"].values()))
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError):
        good = False
    if not good:
        raise ValueError(f"{path} is not a checkpoint of this program; for published weights make "
                         f"one first: python weights.py import {path} --out CKPT")
    return state


# --------------------------------------------------------------------------------------------------
# safetensors: 8 bytes for the length of a header, the header in JSON, the bytes of the tensors
# --------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor}; each maps its piece of the file. ValueError for a damaged file."""
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
    """One tensor. begin: the byte of the file where the tensors begin; entry: what the header says
    of it, for example {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}."""
    start, end = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    shape = entry["shape"]
    if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shape} numbers do not fill bytes {start} to {end}")
    if start == end:                                            # numpy cannot map zero bytes
        return torch.zeros(shape, dtype=dtype)
    raw = np.memmap(path, "u1", "c", begin + start, end - start)            # "c": copy on write
    return torch.from_numpy(raw).view(dtype).view(shape)


def write_safetensors(path, tensors):
    """Writes {name: tensor}."""
    # The header's length is a multiple of 8; types of 8 bytes come first, then those of 4, 2 and 1.
    # So each tensor begins at a multiple of the bytes of its type: it can be mapped.
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
        mapped = path.suffix == ".safetensors"
        whole = read_safetensors(path) if mapped else read_pickle(path, mmap=True)
        for name, tensor in whole.get("model", whole).items():
            print(f"{name:70}{list(tensor.shape)}")
