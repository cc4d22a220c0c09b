"""The README is true: its commands, flags and files exist."""
import functools
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@functools.cache
def help_of(*command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, command
    return done.stdout.replace("\n", " \n")


def test_every_path_and_flag_of_the_readmes_commands_exists():
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S))
    commands = [line.split("#")[0] for line in blocks.splitlines() if re.search(r"\b\w+\.py\b", line)]
    assert len(commands) >= 5
    for command in commands:
        script, words = re.search(r"([\w/]+\.py)(.*)", command).groups()
        assert (ROOT / script).exists(), command
        first = [word for word in words.split()[:1] if word in ("tokenizer", "retrieval")]
        for flag in re.findall(r"(?<=\s)(--[a-z_-]+)", words):
            assert f"{flag} " in help_of(script, *first) or f"{flag}," in help_of(script, *first), (command, flag)


def test_requirements_are_the_agreed_ones():
    names = {re.split(r"[<>=;\s]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line}
    assert names == {"torch", "numpy", "pillow", "sentencepiece", "tqdm", "triton"}
