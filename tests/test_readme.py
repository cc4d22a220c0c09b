"""The README is true: its commands, flags and files exist. So are those of the course."""
import functools
import json
import pathlib
import re
import subprocess
import sys

import data
import samples

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COURSE = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")


@functools.cache
def help_of(*command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, command
    return done.stdout.replace("\n", " \n")


def test_every_path_and_flag_of_the_commands_exists():
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README + COURSE, re.S))
    commands = [line.split("#")[0] for line in blocks.splitlines() if re.search(r"\b\w+\.py\b", line)]
    assert len(commands) >= 5
    for command in commands:
        script, words = re.search(r"([\w/]+\.py)(.*)", command).groups()
        assert (ROOT / script).exists(), command
        first = [word for word in words.split()[:1] if word in ("tokenizer", "retrieval", "xvnli")]
        for flag in re.findall(r"(?<=\s)(--[a-z_-]+)", words):
            assert f"{flag} " in help_of(script, *first) or f"{flag}," in help_of(script, *first), (command, flag)


def test_the_programs_of_the_course_name_what_exists():
    """They need a trained model; so only what they import is run, and the rest is compiled."""
    programs = re.findall(r"<<'END'\n(.*?)\nEND\n", COURSE, re.S)
    assert len(programs) == 5
    for program in programs:
        compile(program, "docs/course.md", "exec")
        exec("\n".join(re.findall(r"^(?:from|import) .*$", program, re.M)))


def test_the_commands_of_other_layouts_make_json_lines_that_can_be_read(tmp_path):
    """docs/data.md has a command for each layout that is refused. Pictures 0.jpg and 1.jpg, in every layout."""
    pictures = [{"filename": "0.jpg", "split": "train", "sentences": [{"raw": "a"}, {"raw": "b"}], "filepath": "."},
                {"filename": "1.jpg", "split": "restval", "sentences": [{"raw": "c"}]}]
    files = {"array.json": json.dumps([{"image": "0.jpg", "captions": ["a", "b"]}, {"image": "1.jpg", "captions": "c"}]),
             "captions_train2014.json": json.dumps({
                 "images": [{"id": 7, "file_name": "0.jpg"}, {"id": 5, "file_name": "1.jpg"}], "annotations": [
                     {"image_id": i, "caption": c} for i, c in ((7, "a"), (5, "c"), (7, "b"))]}),
             "dataset_coco.json": json.dumps({"images": pictures}),
             "results_20130124.token": "0.jpg#0\ta\n0.jpg#1\tb\n1.jpg#0\tc\n",
             "captions.csv": "caption,image\na,0.jpg\nc,1.jpg\n", "image_splits/train.txt": "0.jpg\n1.jpg\n"}
    files |= {f"raw/train.{language}": "a\nc\n" for language in ("en", "de", "fr", "cs")}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for i in (0, 1):
        (tmp_path / f"{i}.jpg").write_bytes(samples.jpeg(i))
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("## Other layouts")[1]
    commands = re.search(r"```bash\n(.*?)```", section, re.S)[1].split("\n\n")
    made = []
    for command in commands:
        if "pyarrow" not in command:
            done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made.append(re.search(r"> (\S+\.jsonl)", command)[1])
            dataset = data.files(data.ImageFiles, [f"{tmp_path / made[-1]}@en"], 32)
            first, second = (sum(dataset.row(i)["captions"].values(), []) for i in (0, 1))
            assert set(first) in ({"a"}, {"a", "b"}) and set(second) == {"c"}, command
    assert made == [f"{name}.jsonl" for name in ("array", "coco", "karpathy", "flickr", "csv", "multi30k")]


def test_requirements_are_the_agreed_ones():
    names = {re.split(r"[<>=;\s]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line}
    assert names == {"torch", "numpy", "pillow", "sentencepiece", "tqdm", "triton"}
