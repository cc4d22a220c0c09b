"""--explain: what it prints of an example is what the losses and the tokenizer say."""
import re

import pytest
import torch

import train
from explain import WIDTH
from test_resume import TINY


@pytest.fixture
def told(tmp_path, capsys):
    """-> ({stream: [(station, text)]}, the page, what lies in the folder afterwards)."""
    page = tmp_path / "a.html"
    assert train.main(["--explain", "--html", str(page), "--out", str(tmp_path / "out"), *TINY]) == 0
    lines = capsys.readouterr().out.split("\nimage\n")[1].splitlines()
    assert max(map(len, lines)) <= WIDTH
    found, stream = {"image": []}, "image"
    for line in lines:
        if line in ("text", "both streams"):
            stream = line
            found[stream] = []
        elif line.startswith(" "):
            station, text = found[stream].pop()
            found[stream].append((station, f"{text} {line.strip()}"))
        elif line and not line.startswith("wrote"):
            found[stream].append((line[:11].strip(), line[13:]))
    return found, page.read_text(encoding="utf-8"), list((tmp_path / "out").rglob("*"))


def test_both_streams_pass_the_same_stations_with_the_numbers_of_the_losses(told):
    found, page, left = told
    names = {stream: [name for name, _ in lines if name not in ("a", "mask")] for stream, lines in found.items()}
    assert names["image"] == names["text"] and names["both streams"] == ["gradient"]
    assert not left                                                          # it reads and writes nothing

    # The same example once more, by hand.
    args = train.settings([*TINY, "--explain"])
    run = train.prepare(args, torch.device("cpu"))
    image, text, _ = run.batches[0]
    objective = run.objective.eval()
    _, numbers = objective(image, text, seed=0)
    told_losses = dict(re.match(r"(\w+) ([\d.]+) \(knows", text).groups() for lines in found.values()
                       for name, text in lines if name == "loss")
    assert len(told_losses) == 6
    for name in ("image_contrast", "image_mask", "text_contrast", "text_mask"):          # match draws by the seed
        assert float(told_losses[name]) == pytest.approx(numbers[name].item(), abs=2e-3)
    spoken = " ".join(objective.tokenizer.pieces(image["b"].token_ids[:image["b"].starts[1]]))
    assert dict(found["image"])["b"] == " ".join(spoken.split())


def test_the_page_holds_both_streams_and_its_pictures_and_asks_nobody(told):
    _, page, _ = told
    assert page.count("<h2>") == 3 and page.count("<table>") == 2 and "http" not in page and "<script" not in page
    assert len(re.findall(r'<img alt="image \d" src="data:image/png', page)) == 8
