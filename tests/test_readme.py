"""The README is true: its line counts, its budgets, its commands and files exist; the code keeps the house rules that
can be counted."""
import ast
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [p for p in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("demo/*.py")]]


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_file_is_within_the_budget_that_the_readme_prints():
    """Table rows: | `file.py` | what | lines | budget |"""
    rows = re.findall(r"^\| `([\w/]+\.py)` \|.*\| (\d+) \| (\d+) \|$", README, re.M)
    named = {name: (int(count), int(budget)) for name, count, budget in rows}
    assert {str(p.relative_to(ROOT)) for p in FILES if lines(p) > 20} == set(named)
    for name, (count, budget) in named.items():
        assert lines(ROOT / name) == count <= budget, f"{name}: {lines(ROOT / name)} lines, budget {budget}"


def test_the_top_level_is_small():
    assert sum(lines(p) for p in ROOT.glob("*.py")) <= 3850
    assert all(lines(p) <= 200 for p in ROOT.glob("tests/*.py"))
    for path in [*FILES, *ROOT.glob("tests/*.py")]:
        assert all(len(line) <= 120 for line in path.read_text(encoding="utf-8").splitlines()), path


def test_no_function_is_longer_than_a_screen():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_every_path_and_flag_of_the_readmes_commands_exists():
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S))
    commands = [line.split("#")[0] for line in blocks.splitlines() if re.search(r"\b\w+\.py\b", line)]
    assert len(commands) >= 5
    for command in commands:
        script = re.search(r"[\w/]+\.py", command)[0]
        assert (ROOT / script).exists(), command
        source = "".join((ROOT / name).read_text(encoding="utf-8") for name in (script, "model.py", "doctor.py"))
        for flag in re.findall(r"(?<=\s)--(?:no-)?([a-z_]+)", command.split(script, 1)[1]):
            known = f'"--{flag}"' in source or re.search(rf"^    {flag}: ", source, re.M) or flag.endswith("_weight")
            assert known, (command, flag)


def test_imports_point_one_way():
    """kernels <- model <- losses; files, records, transforms <- data <- sources <- doctor; layouts <- weights; evaluate
    above them; train on top. Nothing runs at import."""
    order = ["kernels", "demo", "model", "losses", "files", "records", "transforms", "data", "sources", "doctor",
             "layouts", "weights", "evaluate", "train"]
    for path in FILES:
        own = path.parent.name if path.parent != ROOT else path.stem
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            for name in names:
                top = (name or "").split(".")[0]
                if top in order:
                    assert order.index(top) <= order.index(own), f"{path.name} imports {name}"


def test_importing_does_not_load_triton():
    code = "import sys, train; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_requirements_are_the_agreed_ones():
    names = {re.split(r"[<>=;\s]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line}
    assert names == {"torch", "numpy", "pillow", "sentencepiece", "tqdm", "triton"}
