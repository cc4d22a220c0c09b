"""The shape of the code: what makes it easy to read, as far as it can be counted. No file has a budget of lines, so a
fork may add one.

    python tests/test_shape.py [FOLDER]        the yardsticks of every file (of another checkout)

tokens     tokens of Python's tokenizer on a line of code; comments and docstrings are no code
comments   lines of comments and docstrings, of these and the lines of code; the lines that rule off sections are neither
wide       lines of code that are longer than 100 columns, %
tuples     assignments of several values to several names at once (a, b = x, y) in 100 lines of code
longest    lines of the longest function; parameters: the most that one function has
"""
import ast
import collections
import io
import pathlib
import subprocess
import sys
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
CORE = ("losses.py", "model.py", "data.py", "train.py", "evaluate.py")
FOLDERS = (".", "formats", "kernels", "tasks", "demo")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
           tokenize.ENDMARKER}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def product(root=ROOT):
    """Every Python file that is not a test."""
    return [path for folder in FOLDERS for path in sorted((root / folder).glob("*.py"))]


def docstring_lines(tree):
    """Numbers of the lines that docstrings stand on."""
    lines = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) or not body:
            continue
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def parameters(function):
    a = function.args
    return len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)


def measure(path):
    """The yardsticks of one file as a dict."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    documented = docstring_lines(tree)
    tokens = collections.Counter()                                           # line -> tokens of code that start there
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            comments += not token.line.startswith("# ---")
        if token.type not in NO_CODE and line not in documented:
            tokens[line] += 1
    lines = text.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    pairs = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)
             and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)]
    comments += len(documented)
    return {
        "lines": len(lines),
        "code": len(tokens),
        "tokens": sum(tokens.values()),
        "comments": comments,
        "wide": sum(len(lines[i - 1]) > 100 for i in tokens),
        "widest": max(map(len, lines), default=0),
        "tuples": len(pairs),
        "longest": max((f.end_lineno - f.lineno + 1 for f in functions), default=0),
        "parameters": max(map(parameters, functions), default=0),
    }


def shares(m):
    """Counts -> (tokens a line of code, % of comments, % of wide lines, tuple assignments in 100 lines)."""
    code = max(1, m["code"])
    return m["tokens"] / code, 100 * m["comments"] / (code + m["comments"]), 100 * m["wide"] / code, 100 * m["tuples"] / code


def total(files):
    """Yardsticks of several files together."""
    found = [measure(path) for path in files]
    return {key: (max if key in ("longest", "parameters", "widest") else sum)(m[key] for m in found) for key in found[0]}


def print_table(root):
    print(f"{'':32}{'lines':>7}{'code':>7}{'tokens':>8}{'comments':>10}{'wide':>7}{'tuples':>8}{'longest':>9}"
          f"{'parameters':>12}")
    files = product(root)
    groups = {str(path.relative_to(root)): [path] for path in files}
    groups |= {"five core files": [root / name for name in CORE],
               "without kernels": [path for path in files if path.parent.name != "kernels"],
               "kernels": [path for path in files if path.parent.name == "kernels"],
               "all": files}
    for name, members in groups.items():
        m = total(members)
        tokens, comments, wide, tuples = shares(m)
        print(f"{name:32}{m['lines']:7,}{m['code']:7,}{tokens:8.1f}{comments:8.0f} %{wide:5.0f} %{tuples:8.1f}"
              f"{m['longest']:9}{m['parameters']:12}")
    whole = sum(measure(path)["tokens"] for path in files)
    tests = [*root.glob("tests/*.py"), *root.glob("tests/*/*.py")]
    print(f"{whole:,} tokens of code; tests: {sum(measure(path)['lines'] for path in tests):,} lines")


def imports(tree):
    """The modules that a file imports, also inside functions: [(name, is it at the top?)]."""
    top = {id(inner) for node in tree.body for inner in ([node] if not isinstance(node, ast.Try) else node.body)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


# One training step on files of one's own: which files of ours does it run through? Run in the checkout itself.
STEP = """if 1:
    import os, pathlib, sys, tempfile
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import samples, data, train
    seen = set()
    def inside(frame):
        while frame:
            if frame.f_code.co_name == "train_step" or frame.f_code.co_qualname == "Batches.__getitem__":
                return True
            frame = frame.f_back
    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(os.getcwd()) and inside(frame):
            seen.add((os.path.relpath(frame.f_code.co_filename), frame.f_code.co_qualname))
    with tempfile.TemporaryDirectory() as folder:
        samples.write_tar(folder + "/a.tar", 20)
        pathlib.Path(folder, "spm.model").write_bytes(data.demo_tokenizer(4000).model)
        pathlib.Path(folder, "a.tsv").write_text("a dog\\tein Hund\\n" * 20)
        sys.setprofile(note)
        train.main(["--images", folder + "/a.tar", "--texts", folder + "/a.tsv", "--tokenizer", folder + "/spm.model",
                    "--out", folder + "/out", "--steps", "1", "--batch", "8", "--text_batch", "8", "--workers", "0"])
        sys.setprofile(None)
    files = sorted({file for file, _ in seen})
    print(f"one training step: {len(files)} files, {len(seen)} functions: {' '.join(files)}")"""


def print_step(root):
    done = subprocess.run([sys.executable, "-c", STEP], cwd=root, capture_output=True, text=True)
    print(done.stdout.splitlines()[-1] if done.stdout else done.stderr)


LEVELS = [{"kernels", "formats", "demo"}, {"model"}, {"losses", "data"}, {"tasks", "benchmark"}, {"weights"},
          {"evaluate", "explain"}, {"train", "serve"}, {"search", "report"}]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}


def test_imports_point_one_way():
    """kernels, formats, demo <- model <- losses, data <- tasks <- weights <- evaluate <- train <- search, report. The
    three folders below know nothing of each other; only Triton is imported inside a function."""
    for path in product():
        own = path.parent.name if path.parent != ROOT else path.stem
        for name, top in imports(ast.parse(path.read_text(encoding="utf-8"))):
            other = name.split(".")[0]
            lazy = other == "triton" or "_triton" in name or "flop_counter" in name       # it imports Triton
            assert top or lazy or path.name == "bench.py", f"{path.name} imports {name} inside a function"
            if other in LEVEL and other != own:
                assert LEVEL[other] < LEVEL[own], f"{path.name} imports {name}"


def test_the_code_is_not_packed():
    """nanoGPT has 10.9 and 7.4 tokens on a line, nanochat 8.7, DiT 11.1."""
    files = product()
    kernels = [path for path in files if path.parent.name == "kernels"]
    others = [path for path in files if path not in kernels]
    assert shares(total(others))[0] <= 11
    assert shares(total(kernels))[0] <= 14
    for path in others:
        assert shares(measure(path))[0] <= 12.5, path.name


def test_the_code_can_be_read_on_a_projector():
    for path in product():
        m = measure(path)
        assert m["widest"] <= 100, path.name
        assert m["longest"] <= 60, path.name
        assert m["parameters"] <= 7 or path.parent.name == "kernels", path.name


def test_the_five_core_files_explain_themselves():
    for name in CORE:
        assert shares(measure(ROOT / name))[1] >= 20, name


def test_importing_does_not_load_triton():
    code = "import sys, train; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1]) if sys.argv[1:] else ROOT
    print_table(folder)
    print_step(folder)
