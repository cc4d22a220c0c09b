"""Checks the five exercises: each test fails in a copy of this code, and passes there once the
solution is applied. A solution is a patch of at most 40 changed lines:

    git apply tests/exercises/solutions/sigmoid.patch        (or patch -p1 < the same file)

    python tests/exercises/check.py             all five
    python tests/exercises/check.py queue       one of them
"""
import os
import pathlib
import re
import shutil
import sys
import tempfile

import pytest
import torch
import torch._dynamo                            # slow to import: once, before the children of
import torch.distributed                        # `passes`, which need it
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


def copy_code(root):
    """Copies the code, and not what else lies here: runs, pictures, a virtual environment."""
    for file in ROOT.glob("*.py"):
        shutil.copy2(file, root)
    for folder in ("demo", "formats", "kernels", "tasks", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("fixtures"))


def changed_lines(name):
    text = (HERE / "solutions" / f"{name}.patch").read_text("utf-8")
    return len(re.findall(r"^(?:-(?!-- )|\+(?!\+\+ ))", text, re.M))


def passes(name, root):
    """Does the test of an exercise pass in this copy? In a child, which imports the copy's files."""
    child = os.fork()
    if child == 0:
        os.chdir(root)
        sys.path[0] = str(root)
        out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os._exit(pytest.main(["-q", "-x", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={root}",
                              f"tests/exercises/test_{name}.py"]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, 1):
        raise ValueError(f"pytest ended with {status}:\n{(root / 'out.txt').read_text()}")
    return status == 0


def check(name, root):
    """A line that says what is wrong, or None."""
    if changed_lines(name) > MOST:
        return f"the solution changes {changed_lines(name)} lines, more than {MOST}"
    if passes(name, root):
        return "the test passes without the solution: is the exercise solved here?"
    try:
        apply(name, root)
    except ValueError as error:
        return str(error)
    if not passes(name, root):
        return "the test fails with the solution:\n" + (root / "out.txt").read_text()
    return None


def main():
    torch.set_num_threads(1)
    failed = False
    unknown = set(sys.argv[1:]) - set(NAMES)
    if unknown:
        print(f"error: no exercise {' '.join(sorted(unknown))}: choose {', '.join(NAMES)}",
              file=sys.stderr)
        return 2
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            copy_code(pathlib.Path(folder))
            wrong = check(name, pathlib.Path(folder))
        print(f"{name:16}{changed_lines(name):3} changed lines; {wrong or 'fails before, passes after'}")
        failed = failed or wrong is not None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
