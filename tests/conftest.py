"""Shared by all tests: the repository root on the path, one thread (two tests may run at once), the gpu marker, and
children that start ahead of their tests: the suite keeps one core busy, so the longest tests get the other."""
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
collect_ignore = ["exercises"]                       # they fail until they are solved: docs/course.md
STARTED = contextlib.ExitStack()                     # ends what has started, also when the tests are interrupted


def pytest_configure(config):
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "gpu: reruns kernel tests on CUDA (pytest -m gpu); skipped without a GPU")
    config.addinivalue_line("markers", "ahead(*words, **environment): a python command that starts before the first "
                                       "test; the fixture `ahead` waits for it -> (status, what it printed)")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("ahead") is not None)


def pytest_collection_finish(session):
    for item in session.items if not session.config.option.collectonly else ():
        for mark in item.iter_markers("ahead"):
            if not any(skip.args[0] for skip in item.iter_markers("skipif")):
                item.child = Ahead(mark.args, mark.kwargs)


def pytest_unconfigure():
    STARTED.close()


class Ahead:
    def __init__(self, words, environment):
        self.out = STARTED.enter_context(tempfile.TemporaryFile("w+"))
        cache = STARTED.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        env = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": cache} | environment
        self.run = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | env, stdout=self.out,
                                    stderr=subprocess.STDOUT)
        STARTED.callback(self.run.kill)

    def __call__(self):
        status = self.run.wait()
        self.out.seek(0)
        return status, self.out.read()


@pytest.fixture
def ahead(request):
    return request.node.child


@pytest.fixture(scope="session")
def tokenizer():
    import data
    return data.demo_tokenizer(4000)
