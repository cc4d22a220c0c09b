"""The README is true: its commands, flags and files exist."""
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_path_and_flag_of_the_readmes_commands_exists():
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S))
    commands = [line.split("#")[0] for line in blocks.splitlines() if re.search(r"\b\w+\.py\b", line)]
    assert len(commands) >= 5
    for command in commands:
        script = re.search(r"[\w/]+\.py", command)[0]
        assert (ROOT / script).exists(), command
        source = "".join((ROOT / name).read_text(encoding="utf-8") for name in (script, "model.py"))
        for flag in re.findall(r"(?<=\s)--(?:no-)?([a-z_]+)", command.split(script, 1)[1]):
            known = f'"--{flag}"' in source or re.search(rf"^    {flag}: ", source, re.M) or flag.endswith("_weight")
            assert known, (command, flag)


def test_requirements_are_the_agreed_ones():
    names = {re.split(r"[<>=;\s]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line}
    assert names == {"torch", "numpy", "pillow", "sentencepiece", "tqdm", "triton"}
