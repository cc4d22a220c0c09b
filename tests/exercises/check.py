"""Checks the five exercises: each test fails in a copy of this code, and passes there once the
solution is applied. A solution is a patch of at most 40 changed lines:

    git apply tests/exercises/solutions/sigmoid.patch        (or patch -p1 < the same file)

    python tests/exercises/check.py             all five
    python tests/exercises/check.py queue       one of them
"""
import contextlib
import os
import pathlib
import re
import shutil
import sys
import tempfile

import pytest
import torch
import torch._dynamo                            # slow to import: once, before the children of
import torch.distributed                        # `failing`, which need it
import torch.utils.flop_counter

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = sorted(path.stem for path in (HERE / "solutions").glob("*.patch"))
MOST = 40


def hunks(patch):
    """The text of a patch -> [(file, old lines, new lines)]."""
    for part in re.split(r"^diff --git .*\n", patch, flags=re.M)[1:]:
        file = re.search(r"^\+\+\+ b/(.*)$", part, re.M)[1]
        for hunk in re.split(r"^@@.*\n", part, flags=re.M)[1:]:
            lines = hunk.splitlines(keepends=True)
            yield file, *("".join(line[1:] for line in lines if line[0] in f" {sign}")
                          for sign in "-+")


def apply(name, root):
    """Changes the files under root. ValueError where the lines of a hunk are not there, or twice."""
    for file, old, new in hunks((HERE / "solutions" / f"{name}.patch").read_text("utf-8")):
        text = (root / file).read_text("utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{name}.patch does not fit: these lines stand {text.count(old)} times "
                             f"in {file}:\n{old}")
        (root / file).write_text(text.replace(old, new), "utf-8")


def changed_lines(name):
    text = (HERE / "solutions" / f"{name}.patch").read_text("utf-8")
    return len(re.findall(r"^(?:-(?!-- )|\+(?!\+\+ ))", text, re.M))


def failing(names, root):
    """Those of the exercises whose tests fail in this copy, and what pytest printed. In a child,
    which imports the copy's files."""
    printed = root / "printed.txt"
    child = os.fork()
    if child == 0:
        os.chdir(root)
        sys.path[0] = str(root)
        file = os.open(printed, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        tests = [f"tests/exercises/test_{name}.py" for name in names]
        os._exit(pytest.main(["-rfE", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={root}",
                              *tests]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = printed.read_text("utf-8")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise ValueError(f"pytest ended with {status}:\n{text}")
    found = re.findall(r"^(?:FAILED|ERROR) tests/exercises/test_(\w+)\.py", text, re.M)
    return set(found), text


def wrong(name, unsolved, root):
    """What is wrong with an exercise, or None. unsolved: those whose tests fail without solution;
    root: a copy of the code."""
    if changed_lines(name) > MOST:
        return f"the solution changes {changed_lines(name)} lines, more than {MOST}"
    if name not in unsolved:
        return "the test passes without the solution: is the exercise solved here?"
    try:
        apply(name, root)
    except ValueError as error:
        return str(error)
    still, printed = failing([name], root)
    return f"the test fails with the solution:\n{printed}" if still else None


@contextlib.contextmanager
def copied():
    """A temporary copy of the code, without what else lies here: runs, pictures, environments."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for file in ROOT.glob("*.py"):
            shutil.copy2(file, root)
        for part in ("demo", "formats", "kernels", "tasks", "tests"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("fixtures"))
        yield root


def main():
    torch.set_num_threads(1)
    names = sys.argv[1:] or NAMES
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        print(f"error: no exercise {' '.join(unknown)}: choose {', '.join(NAMES)}", file=sys.stderr)
        return 2
    with copied() as root:
        unsolved, _ = failing(names, root)
    results = {}
    for name in names:
        with copied() as root:
            results[name] = wrong(name, unsolved, root)
        says = results[name] or "fails without the solution, passes with it"
        print(f"{name:16}{changed_lines(name):3} changed lines; {says}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
