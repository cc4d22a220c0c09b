"""Kernels: attention over packed sequences and one-pass contrast.

Each pair of files holds a torch version that runs everywhere (it is the definition) and a Triton
version of the same function; the public function picks one. triton is 1 GB and absent on macOS, so
only the *_triton.py files import it, and they are imported when the first kernel is needed.
"""
import functools
import importlib.util
import os

import torch


def interpreting() -> bool:
    """True in a process started with TRITON_INTERPRET=1: Triton then runs on CPU tensors, slowly,
    to be tested."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def amd() -> bool:
    return torch.version.hip is not None


@functools.cache
def capable() -> bool:
    """Products of bfloat16 need Ampere or later."""
    return amd() or torch.cuda.get_device_capability() >= (8, 0)


def use_triton(x) -> bool:
    """GPU tensors take the kernel, except float64. CPU tensors take it in an interpreting process.
    """
    if interpreting():
        return True
    return x.is_cuda and x.dtype != torch.float64 and triton_installed() and capable()
