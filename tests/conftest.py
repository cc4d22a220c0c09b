"""Shared by all tests: the repository root on the path, one thread (two tests may run at once), the gpu marker."""
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "gpu: reruns kernel tests on CUDA (pytest -m gpu); skipped without a GPU")


@pytest.fixture(scope="session")
def tokenizer():
    import data
    return data.demo_tokenizer(4000)
