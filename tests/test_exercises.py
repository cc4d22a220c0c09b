"""The exercises of docs/course.md: tests that fail until they are solved, and solutions as patches."""
import pathlib
import shutil
import subprocess

import pytest

EXERCISES = pathlib.Path(__file__).parent / "exercises"
SOLUTIONS = sorted((EXERCISES / "solutions").glob("*.patch"))


def test_every_exercise_has_a_solution_and_the_suite_leaves_it_out(request):
    tests = sorted(EXERCISES.glob("test_*.py"))
    assert [path.stem for path in tests] == [f"test_{path.stem}" for path in SOLUTIONS]
    assert len(tests) == 5
    assert request.config.hook.pytest_ignore_collect(collection_path=EXERCISES, config=request.config)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_git_applies_the_solution(path):
    done = subprocess.run(["git", "apply", "--check", str(path)], cwd=EXERCISES.parents[1], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.ahead("tests/exercises/check.py")
def test_each_exercise_fails_without_its_solution_and_passes_with_it(ahead):
    status, printed = ahead()
    assert status == 0, printed
