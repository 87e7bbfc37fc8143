"""The ``tritune`` command: what it says, what it returns, and what it does without its extras."""

import argparse
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import tritune
from tritune import cli, doctor, explain_command
from tritune.autotune import store
from tritune.autotune.device import named

pytest.importorskip("typer")
from tritune import commands

pytestmark = pytest.mark.torch

SOURCE = Path(tritune.__file__).resolve().parents[1]


def leaves(app: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, bool]]]:
    """Every command that can be run, with its options and arguments; true for those that are paths."""
    for group in app.registered_groups:
        yield from leaves(group.typer_instance, (*words, group.name))
    for command in app.registered_commands:
        parameters = inspect.signature(command.callback, eval_str=True).parameters.values()
        yield (*words, command.name or command.callback.__name__), dict(map(option, parameters))


def option(parameter: inspect.Parameter) -> tuple[str, bool]:
    kind, info = get_args(parameter.annotation)
    named = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
    flag = "--" + parameter.name.replace("_", "-")
    own = flag if type(info).__name__ == "OptionInfo" else parameter.name
    return (named or [own])[0], Path in (kind, *get_args(kind))


COMMANDS = list(leaves(commands.app))


def run_in_child(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SOURCE), **variables}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


class TestCommand:
    def test_help_lists_every_command(self, capsys):
        assert cli.main([]) == 0
        text = capsys.readouterr().out
        for words, _ in COMMANDS:
            assert f"  {words[0]} " in text
        assert max(map(len, text.splitlines())) <= 80
        assert "..." not in text.partition("Commands:")[2], "a summary is cut"

    @pytest.mark.parametrize("words", [words for words, _ in COMMANDS], ids=" ".join)
    def test_help(self, words, capsys):
        assert cli.main([*words, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"Usage: tritune {' '.join(words)} [OPTIONS]")
        assert max(map(len, text.splitlines())) <= 80

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["nonsense"], "tritune: No such command 'nonsense'."),
            (["benhc"], "tritune: No such command 'benhc'. Did you mean 'bench'?"),
            (["bench"], "tritune bench: Missing command."),
            (["bench", "statik"], "tritune bench: No such command 'statik'. Did you mean 'static'?"),
            (["explain"], "tritune explain: Missing command."),
            (["explain", "conv2"], "tritune explain: No such command 'conv2'. Did you mean 'conv2d'"),
            (["explain", "conv2d"], "tritune explain conv2d: Missing argument 'SHAPE"),
            (["explain", "conv2d", "1x8x8x8", "8x8x3x3", "--pading", "1"],
             "tritune explain conv2d: No such option: --pading (Possible options: --padding)"),
            (["explain", "max_pool2d", "1x8x8x8", "--groups", "1"], "tritune explain max_pool2d: No such option"),
            (["explain", "lstm", "5x4x8"], "tritune explain: Missing option: hidden"),
            (["doctor", "--jsn"], "tritune doctor: No such option: --jsn (Possible options: --json)"),
            (["demo", "--model", "gan"], "'gan' is not one of cnn, rnn, attention"),
            (["bench", "static", "--update"], "--update needs --baseline FILE to write to"),
        ],
    )  # fmt: skip
    def test_bad_usage_is_one_line(self, arguments, message, capsys):
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"tritune {tritune.__version__}\n"

    def test_help_loads_nothing_heavy(self):
        code = """
import sys
from tritune import cli
for name in ("triton", "rich", "matplotlib", "sklearn"):
    sys.modules[name] = None
assert cli.main(["--help"]) == 0
assert not [name for name in sys.modules if name.startswith("tritune.perf.")]
"""
        done = run_in_child(code)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        "missing, arguments",
        [
            ("typer", []), ("typer", ["doctor"]), ("triton", ["bench", "static"]), ("rich", ["demo"]),
            ("sklearn", ["demo"]), ("matplotlib", ["demo"]),
        ],
    )  # fmt: skip
    def test_what_is_missing_is_named(self, missing, arguments):
        for module in ("triton", "rich", "matplotlib", "sklearn"):
            pytest.importorskip(module)
        code = (
            f"import sys\nsys.modules[{missing!r}] = None\nfrom tritune import cli\nsys.exit(cli.main({arguments!r}))"
        )
        done = run_in_child(code)
        assert done.returncode == 2, done.stderr
        assert done.stderr == f"tritune needs {missing} for this: pip install 'tritune[{cli.EXTRAS[missing]}]'\n"
        assert done.stdout == ""

    @pytest.mark.checkout
    def test_what_may_be_missing_comes_with_its_extra(self):
        project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for module, extra in cli.EXTRAS.items():
            package = {"sklearn": "scikit-learn"}.get(module, module)
            assert any(one.startswith(f"{package}>=") for one in project["optional-dependencies"][extra])

    @pytest.mark.slow
    @pytest.mark.full
    def test_completion(self):
        """Of commands, operators, their options, and words that an option takes."""
        for typed, expected in {
            "be": "bench",
            "explain lp_pool2": "lp_pool2d",
            "explain conv2d 1x8x8x8 --pad": "--padding",
            "tune --static --target gf": "gfx942",
        }.items():
            place = str(len(typed.split(" ")))
            environment = {
                "_TRITUNE_COMPLETE": "complete_bash", "COMP_WORDS": f"tritune {typed}", "COMP_CWORD": place
            }  # fmt: skip
            done = run_in_child("from tritune import cli; cli.main()", **environment)
            assert expected in done.stdout.split(), (typed, done)

    def test_a_reader_that_has_seen_enough_is_no_error(self):
        command = f"{sys.executable} -m tritune configs list --json | true"
        env = {**os.environ, "PYTHONPATH": str(SOURCE)}
        done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, check=False)
        assert done.stderr == ""


class TestEveryCommand:
    """A command that is added tomorrow is held to the same."""

    def test_what_reports_has_json(self):
        """Every command reports: one that does not has to be named here."""
        assert [words for words, options in COMMANDS if "--json" not in options] == []

    @pytest.mark.parametrize(
        "words",
        [
            pytest.param(
                words, marks=pytest.mark.slow if words[0] in ("demo", "tune", "bench") else (), id=" ".join(words)
            )
            for words, _ in COMMANDS
        ],
    )
    def test_json_and_nothing_else(self, words, tmp_path, monkeypatch, capfd):
        pytest.importorskip("triton")
        prepared = self.prepare(words, tmp_path, monkeypatch)
        code = cli.main([*words, *prepared, "--json"])
        out, err = capfd.readouterr()
        assert code in (0, 1), err
        json.loads(out)

    @pytest.mark.parametrize("words", [words for words, _ in COMMANDS], ids=" ".join)
    def test_with_json_an_error_is_on_standard_error(self, words, capfd):
        assert cli.main([*words, "--json", "--no-such-option"]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1

    @pytest.mark.parametrize("words", [words for words, options in COMMANDS if "-k" in options], ids=" ".join)
    def test_a_pattern_that_matches_nothing_is_an_error(self, words, tmp_path, capfd):
        pytest.importorskip("triton")
        more = {"tune": ["--dry-run"], "bench run": ["--rehearse", "--out", str(tmp_path)]}.get(" ".join(words), [])
        assert cli.main([*words, *more, "-k", "no-such-layer"]) == 2
        out, err = capfd.readouterr()
        assert "no-such-layer" in err
        assert err.count("\n") == 1 and out == ""

    def prepare(self, words, tmp_path, monkeypatch):
        """The arguments with which a command takes seconds."""
        if words == ("explain", "model"):
            return ["torch.nn:Identity", "1x2"]
        if words == ("explain", "file"):
            with tritune.record_shapes(tmp_path / "shapes.jsonl"):
                tritune.max_pool2d(torch.randn(1, 2, 4, 4), 2)
            return [str(tmp_path / "shapes.jsonl")]
        if words[0] == "explain":
            op = explain_command.OPS[words[1]]
            return [*op.example.split(), *(["--hidden", "64"] if "--hidden" in op.options else [])]
        for side in ("left", "right"):
            entry = store.Entry({"C": 8}, store.Config(BLOCK=1), "model", extra={"env": {"triton": "3.7.1"}})
            store.write(tmp_path / side / "sm_90" / "conv.json", "conv", [entry])
        left, right = str(tmp_path / "left"), str(tmp_path / "right")
        monkeypatch.setattr("tritune.demo._has_triton", lambda: False)  # nothing is interpreted
        for module in ("rich", "matplotlib", "sklearn"):
            if words[0] == "demo":
                pytest.importorskip(module)
        one_layer = ["--target", "sm_90", "-k", "pool_backward/resnet50-maxpool-bf16-nhwc"]
        return {
            "demo": ["--epochs", "1", "--model", "rnn", "--out", str(tmp_path)],
            "doctor": [],
            "tune": ["--static", *one_layer],
            "configs list": [], "configs show": ["conv"], "configs diff": [left, right],
            "configs merge": [left, right, "--out", str(tmp_path / "new")],
            "bench static": one_layer,
            "bench run": ["--rehearse", "--no-tests", "--budget", "60s", "--out", str(tmp_path / "results"),
                          "-k", "pool/resnet50-global"],
        }[" ".join(words)]  # fmt: skip


# Everything that takes a path: (command, option or argument).
PATHS = [(words, name) for words, options in COMMANDS for name, is_path in options.items() if is_path]


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_demo_says_one_line(number, tmp_path):
    for module in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "tritune", "demo", "--epochs", "100000", "--model", "rnn", "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert re.fullmatch(r"\d+/100000  \d+:\d\d left  epochs, rnn: .*\n", process.stderr.readline())
            os.killpg(process.pid, number)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert [line for line in err.splitlines() if "epochs" not in line] == ["tritune: interrupted"]
    assert not list(tmp_path.iterdir())


def test_bench_run_takes_what_its_module_takes():
    """`make gpu` runs where no typer is: its options are argparse's, and the same."""
    gpu = pytest.importorskip("tritune.perf.gpu", reason="needs triton")
    parser = argparse.ArgumentParser(add_help=False)
    gpu.add_arguments(parser)
    theirs = {action.option_strings[0] for action in parser._actions}
    assert theirs == set(dict(COMMANDS)["bench", "run"])
    assert vars(parser.parse_args([])) == {**vars(gpu.Options()), "tests": ["tests"], "patterns": []}


class TestPaths:
    """What is wrong with a path is said in one line that names it, before anything is done."""

    NEEDED = {"configs show": ["conv"], "configs diff": ["{left}", "{left}"], "configs merge": ["{left}", "{left}"],
              "tune": ["--static", "--target", "sm_90"], "bench static": [], "bench run": ["--rehearse"], "demo": [],
              "configs list": [], "explain file": []}  # fmt: skip

    def bad(self, name, wants, tmp_path):
        """Paths of which each is wrong for a folder or a file to write, or to read."""
        file, folder, fifo = tmp_path / "file", tmp_path / "folder", tmp_path / "fifo"
        file.write_text("{")
        folder.mkdir()
        os.mkfifo(fifo)
        found = {"a FIFO": fifo, "below a file": file / "below", "nowhere": Path("/proc/no/such/place")}
        found |= {"a folder": folder} if wants == "file" else {"a file": file}
        if os.geteuid():  # nothing is closed to root
            folder.chmod(0o500)
            found["closed"] = folder / "below"
        return found

    @pytest.mark.parametrize("words, name", PATHS, ids=[f"{' '.join(words)} {name}" for words, name in PATHS])
    def test_bad_paths(self, words, name, tmp_path, capfd):
        pytest.importorskip("triton")
        for module in ("matplotlib", "sklearn") if words == ("demo",) else ():
            pytest.importorskip(module)
        left = tmp_path / "left"
        entry = store.Entry({"C": 8}, store.Config(BLOCK=1), "model", extra={"env": {"triton": "3.7.1"}})
        store.write(left / "sm_90" / "conv.json", "conv", [entry])
        wants = "file" if name in ("--baseline", "--from", "--merge") or words == ("explain", "file") else "folder"
        for what, path in self.bad(name, wants, tmp_path).items():
            arguments = [word.format(left=left) for word in self.NEEDED[" ".join(words)]]
            if name.startswith("-"):
                arguments += [name, str(path)]
            elif name in ("left", "right"):
                arguments[["left", "right"].index(name)] = str(path)
            else:
                arguments.append(str(path))
            if words == ("configs", "merge") and name != "--out":
                arguments += ["--out", str(tmp_path / "new")]
            if name == "--merge":
                arguments += ["--out", str(tmp_path / "new")]
            started = time.monotonic()
            code = cli.main([*words, *arguments])
            out, err = capfd.readouterr()
            assert code == 2, (what, out, err)
            assert err.count("\n") == 1 and str(path) in err, (what, err)
            assert out == "", what
            assert not (tmp_path / "new").exists()
            assert time.monotonic() - started < 20


class TestExplain:
    KERNELS = ("--backend", "triton", "--device", "h200")

    def explain(self, capsys, *arguments):
        pytest.importorskip("triton")
        assert cli.main(["explain", *arguments]) == 0
        return capsys.readouterr().out

    def test_model(self, capsys, tmp_path, monkeypatch):
        """One line a call, each with the name of the function that was called."""
        (tmp_path / "its_model.py").write_text(
            "import torch, tritune\n"
            "print('imported')\n"
            "def make():\n"
            "    print('made')\n"
            "    return torch.nn.Sequential(tritune.nn.Conv2d(3, 4, 3), tritune.nn.LPPool2d(2, 2),\n"
            "                               tritune.nn.AdaptiveAvgPool2d(1))\n"
        )
        monkeypatch.chdir(tmp_path)
        lines = self.explain(capsys, "model", "its_model:make", "1x3x8x8").splitlines()
        assert [line.partition(":")[0] for line in lines] == ["conv2d", "lp_pool2d", "adaptive_avg_pool2d"]
        document = json.loads(self.explain(capsys, "model", "its_model:make", "1x3x8x8", "--json"))
        assert [decision["op"] for decision in document] == ["conv2d", "lp_pool2d", "adaptive_avg_pool2d"]

    def test_what_a_model_prints_goes_to_standard_error(self, tmp_path, monkeypatch):
        """Whoever prints it, and whenever. In a process of its own, since what C keeps is written when that ends."""
        (tmp_path / "prints.py").write_text(
            "import ctypes, os, sys, torch, tritune\n"
            "def talk(when):\n"
            "    print('python', when)\n"
            "    print('kept', when, file=sys.__stdout__)\n"
            "    os.write(1, f'descriptor {when}\\n'.encode())\n"
            "    os.system(f'echo child {when}')\n"
            "    ctypes.CDLL(None).puts(f'C {when}'.encode())\n"
            "talk('imported')\n"
            "class Model(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        talk('made')\n"
            "    def forward(self, x):\n"
            "        talk('called')\n"
            "        return tritune.max_pool2d(x, 2)\n"
        )
        monkeypatch.chdir(tmp_path)
        command = ["explain", "model", "prints:Model", "1x2x4x4", "--json"]
        done = run_in_child(f"import sys; from tritune import cli; sys.exit(cli.main({command}))")
        assert done.returncode == 0, done.stderr
        assert [decision["op"] for decision in json.loads(done.stdout)] == ["max_pool2d"]
        who, when = ("python", "kept", "descriptor", "child", "C"), ("imported", "made", "called")
        assert sorted(done.stderr.splitlines()) == sorted(f"{one} {other}" for one in who for other in when)

    @pytest.mark.parametrize("last", [
        "import atexit\natexit.register(print, 'printed')\n",
        "import atexit, os\natexit.register(os.system, 'echo printed')\n",
        "import os\nclass Last:\n"
        "    def __del__(self, write=os.write):\n        write(1, b'printed')\nlast = Last()\n",
        "import os, threading, time\n"
        "def run():\n    while True:\n        os.write(1, b'printed')\n        time.sleep(0.001)\n"
        "threading.Thread(target=run, daemon=True).start()\n",
    ], ids=["atexit", "child", "finalizer", "thread"])  # fmt: skip
    @pytest.mark.full
    def test_what_a_model_prints_last_goes_to_standard_error(self, last, tmp_path, monkeypatch):
        (tmp_path / "prints_last.py").write_text(
            f"import torch, tritune\n{last}def make():\n    return tritune.nn.MaxPool2d(2)\n"
        )
        monkeypatch.chdir(tmp_path)
        command = ["explain", "model", "prints_last:make", "1x2x4x4", "--json"]
        done = run_in_child(f"import sys; from tritune import cli; sys.exit(cli.main({command}))")
        assert done.returncode == 0, done.stderr
        assert [decision["op"] for decision in json.loads(done.stdout)] == ["max_pool2d"]
        assert "printed" in done.stderr

    def test_nobody_reads(self, tmp_path):
        (tmp_path / "unread.py").write_text("import tritune\ndef make():\n    return tritune.nn.MaxPool2d(2)\n")
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "tritune", "explain", "model", "unread:make", "1x2x4x4"],
            env={**os.environ, "PYTHONPATH": str(SOURCE)}, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")

    def test_whoever_replaced_stdout_gets_it_back(self, capfd, tmp_path, monkeypatch):
        (tmp_path / "returns.py").write_text("import tritune\ndef make():\n    return tritune.nn.MaxPool2d(2)\n")
        monkeypatch.chdir(tmp_path)
        assert cli.main(["explain", "model", "returns:make", "1x2x4x4"]) == 0
        os.write(1, b"afterwards\n")
        lines = capfd.readouterr().out.splitlines()
        assert lines[0].startswith("max_pool2d: ") and lines[-1] == "afterwards"

    @pytest.mark.parametrize(
        "place", ["no_such_module:make", "its_model", "math:pi", "math:nothing", "sys:exit", "ends:make"]
    )
    def test_what_is_no_model(self, capsys, place, tmp_path, monkeypatch):
        (tmp_path / "ends.py").write_text("raise SystemExit(7)\n")
        monkeypatch.chdir(tmp_path)
        assert cli.main(["explain", "model", place, "1x3x8x8"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and place in err

    def test_convolution(self, capsys, monkeypatch):
        monkeypatch.setenv("TRITUNE_DEVICE", "")
        text = self.explain(
            capsys, "conv2d", "32x64x56x56", "64x64x3x3", "--padding", "1", "--activation", "relu", *self.KERNELS
        )
        assert text.startswith('conv2d: triton: use_backend("triton") is in force\n  conv: ')

    def test_pooling_as_json(self, capsys):
        text = self.explain(
            capsys, "max_pool2d", "32x64x112x112", "--kernel", "3", "--stride", "2", "--json", *self.KERNELS
        )
        document = json.loads(text)
        assert document["backend"] == "triton"
        assert document["kernels"][0]["kernel"] == "pool"
        assert document["kernels"][0]["config"]["BLOCK_C"] > 1

    @pytest.mark.parametrize("layout", ["nhwc", "nchw"])
    @pytest.mark.parametrize(
        "op, shape, options, kernel",
        [
            ("max_pool1d", "32x128x16000", "--kernel 4 --stride 3 --dilation 2 --ceil-mode", "pool"),
            ("max_pool3d", "4x64x16x56x56", "--kernel 3 --stride 2 --padding 1", "pool"),
            ("max_pool2d", "4x64x7x7", "--kernel 7", "global_pool"),
            ("avg_pool1d", "32x128x16000", "--ceil-mode", "pool"),
            ("avg_pool2d", "32x288x35x35", "--kernel 3 --stride 1 --padding 1", "pool"),
            ("avg_pool3d", "4x256x8x28x28", "", "pool"),
            ("adaptive_max_pool1d", "32x128x16000", "", "pool"),
            ("adaptive_max_pool2d", "256x256x28x28", "--size 7", "pool"),
            ("adaptive_max_pool3d", "4x64x16x56x56", "--size 1", "global_pool"),
            ("adaptive_avg_pool1d", "32x128x16000", "--size 5", "pool"),
            ("adaptive_avg_pool2d", "8x2048x60x60", "--size 6", "pool"),
            ("adaptive_avg_pool3d", "4x64x16x56x56", "", "pool"),
            ("lp_pool1d", "32x128x16000", "--norm 1", "pool"),
            ("lp_pool2d", "32x128x56x56", "--kernel 56", "global_pool"),
            ("lp_pool3d", "4x64x16x56x56", "--stride 1", "pool"),
            ("max_unpool1d", "32x128x8000", "", "max_unpool"),
            ("max_unpool2d", "32x64x56x56", "--kernel 3 --stride 2 --padding 1", "max_unpool"),
            ("max_unpool3d", "4x64x8x28x28", "", "max_unpool"),
            ("global_avg_pool", "32x2048x7x7", "", "global_pool"),
            ("global_max_pool", "1x64x512x512", "", "global_pool"),
        ],
    )
    def test_pooling(self, op, shape, options, kernel, layout, capsys):
        options = [*options.split(), "--layout", layout, *self.KERNELS]
        document = json.loads(self.explain(capsys, op, shape, *options, "--json"))
        assert (document["op"], document["backend"]) == (op, "triton")
        assert [one["kernel"] for one in document["kernels"]] == [kernel]

    def test_what_is_not_covered(self, capsys):
        text = self.explain(capsys, "conv2d", "1x8x8x8", "8x8x3x3", "--dtype", "fp64", "--device", "h200")
        assert text.startswith("conv2d: torch: ")
        assert "float64" in text

    def test_the_device_matters(self, capsys):
        texts = [
            self.explain(
                capsys, "conv2d", "32x256x56x56", "256x256x3x3", "--padding", "1", "--device", device, "--json"
            )
            for device in ("h200", "mi300x")
        ]
        assert texts[0] != texts[1]

    def test_it_leaves_the_environment_alone(self, capsys):
        """torch may set variables of its own when it imports its compiler."""

        def ours():
            return {name: value for name, value in os.environ.items() if name.startswith(("TRITUNE_", "TRITON_"))}

        before = ours()
        self.explain(capsys, "max_pool2d", "1x8x8x8", "--device", "mi300x")
        assert ours() == before

    def test_every_public_operator(self, capsys):
        """One that is added to the package must be added to the command."""
        from tritune import explain_command as command

        public = {
            name
            for name, value in vars(tritune).items()
            if re.match(r"tritune\.ops\.[a-z]", getattr(value, "__module__", ""))
        }
        assert set(command.OPS) == public
        for name, op in command.OPS.items():
            if name.startswith("fractional_max_pool"):
                continue  # no kernel covers it
            hidden = ["--hidden", "64"] if "--hidden" in op.options else []
            text = self.explain(capsys, name, *op.example.split(), *hidden, *self.KERNELS)
            assert '_backend("triton") is in force\n  ' in text

    @pytest.mark.parametrize("options", ["--backend torch", "--backend auto", "--device cpu", "--device h200"])
    @pytest.mark.parametrize("name", explain_command.OPS)
    def test_the_function_that_was_called_is_named(self, name, options, capsys):
        """Not another one that it is made of."""
        op = explain_command.OPS[name]
        hidden = ["--hidden", "64"] if "--hidden" in op.options else []
        assert self.explain(capsys, name, *op.example.split(), *hidden, *options.split()).startswith(f"{name}: ")

    @pytest.mark.parametrize("op, gates", [("rnn", 1), ("gru", 3), ("lstm", 4)])
    def test_recurrence(self, op, gates, capsys):
        text = self.explain(
            capsys, op, "512x64x32", "--hidden", "64", "--bidirectional", "--dtype", "fp32", "--precision", "tf32",
            *self.KERNELS,
        )  # fmt: skip
        assert text.startswith(f'{op}: triton: use_backend("triton") is in force\n  rnn: ')
        text = self.explain(capsys, op, "512x64x32", "--hidden", "2048", "--device", "h200")
        assert text.startswith(f"{op}: torch: no kernel covers the call\n  not triton: hidden_size=2048")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("conv2d", "1x8x8x8"), "the shapes of input weight [bias] are wanted, got 1"),
            (("lstm", "5x2x8", "8x8", "--hidden", "4"), "the shapes of input are wanted, got 2"),
            (("conv2d", "1,2,3,4", "8x8x3x3"), "the shapes of input weight [bias] are wanted, got 5"),
            (("conv2d", "1x8x8x8", "8x4x3x3"), "expected input"),
            (("max_pool2d", "1x8x8x8", "--padding", "-1"), "pad"),
            (("max_pool2d", "1x8x8x8", "--device", "abacus"), "unknown device 'abacus'"),
        ],
    )
    def test_errors_are_one_line(self, arguments, message, capsys):
        pytest.importorskip("triton")
        assert cli.main(["explain", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""

    def test_a_call_that_no_kernel_covers(self, capsys):
        pytest.importorskip("triton")
        assert cli.main(["explain", "conv2d", "1x8x8x8", "8x8x3x3", "--dtype", "fp64", *self.KERNELS]) == 1
        captured = capsys.readouterr()
        assert "no kernel covers the call" in captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""

    @pytest.mark.parametrize("text", ["x8", "8x-1", "8.5x3", "8xx3", "8×3", "٣x8"])
    def test_what_is_not_a_shape(self, text, capsys):
        pytest.importorskip("triton")
        for command in (
            ["conv2d", text, "8x8x3x3"],
            ["conv2d", f"8x8x3x3,{text}"],
            ["model", "torch.nn:Identity", text],
        ):
            assert cli.main(["explain", *command]) == 2
            assert f"{text!r} is not a shape such as 32x64x56x56" in capsys.readouterr().err

    CONV = ("conv2d", "32x64x56x56", "64x64x3x3", "--padding", "1")

    def test_the_default_is_this_machine(self, capsys, monkeypatch):
        """Without a GPU torch serves, whatever a GPU elsewhere would do; the last line says how to ask for that."""
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        first, why, hint = self.explain(capsys, *self.CONV).splitlines()
        assert first == "conv2d: torch: no kernel covers the call"
        assert why.startswith("  not triton: input is on the CPU")
        assert "--device h200" in hint
        document = json.loads(self.explain(capsys, *self.CONV, "--json"))
        assert (document["backend"], document["origin"], document["instead"]) == ("torch", "", [])

    def test_the_default_backend_is_auto(self, capsys):
        """Who serves the call, why, and what the kernel's config would be: one line each."""
        text = self.explain(capsys, *self.CONV, "--device", "h200")
        first, kernel = text.splitlines()
        assert re.fullmatch(r"conv2d: torch: not measured, and .*  \[rule\]", first)
        assert re.fullmatch(r"  triton would run conv: BLOCK_K=.*  \[model, target sm_90.*\].*", kernel)
        forced = self.explain(capsys, *self.CONV, *self.KERNELS).splitlines()[1]
        assert kernel.removeprefix("  triton would run ") == forced.removeprefix("  ")
        document = json.loads(self.explain(capsys, *self.CONV, "--device", "h200", "--json"))
        assert (document["backend"], document["origin"], document["kernels"]) == ("torch", "rule", [])
        (conv,) = document["instead"]
        assert (conv["kernel"], conv["place"], conv["origin"]) == ("conv", "target", "model")

    def test_a_rule_may_choose_the_kernels(self, capsys):
        text = self.explain(capsys, "lp_pool2d", "32x64x56x56", "--device", "h200")
        first, kernel = text.splitlines()
        assert re.fullmatch(r"lp_pool2d: triton: not measured; .*  \[rule\]", first)
        assert kernel.startswith("  pool: BLOCK_")

    @pytest.mark.parametrize("us, backend", [(5.0, "triton"), (50.0, "torch")])
    def test_measurements_choose(self, us, backend, capsys, monkeypatch, tmp_path):
        """What `tune` keeps of a layer in the same words."""
        pytest.importorskip("triton")
        from tritune.autotune import resolve, tune
        from tritune.perf import families

        (target,) = tune.targets(
            tune.Options(families.__name__, ["conv2d"], ["32x64x56x56,64x64x3x3,padding=1"], ["bf16"])
        )
        tunable, problem = target.identity()
        config, _ = resolve.ranked(tunable, problem, named("h200"))[-1]
        entry = store.Entry(tunable.features(problem), config, "measured", us=us, torch_us=10.0)
        store.write(tmp_path / "nvidia_h200" / "conv.json", "conv", [entry])
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        resolve.clear_memo()
        first, kernel = self.explain(capsys, *self.CONV, "--device", "h200").splitlines()
        resolve.clear_memo()
        assert first == f"conv2d: {backend}: measured: {us:.1f} us against 10.0 us of torch  [measured]"
        assert sorted(kernel.partition(": ")[2].partition("  [")[0].split()) == sorted(str(config).split())
        assert kernel.endswith("  [measured, user nvidia_h200]")

    @pytest.mark.parametrize("spelling", [
        "32x64x56x56 64x64x3x3 --padding 1 --activation relu",
        "32x64x56x56,64x64x3x3,padding=1,activation=relu",
        "32x64x56x56 padding=1 64x64x3x3 activation=relu",
        "padding=1,32x64x56x56, 64x64x3x3 --activation=relu",
    ])  # fmt: skip
    def test_spellings_of_a_call(self, spelling, capsys):
        expected = self.explain(capsys, *self.CONV, "--activation", "relu", "--device", "h200")
        assert self.explain(capsys, "conv2d", *spelling.split(), "--device", "h200") == expected

    def test_options_as_words(self, capsys):
        flags = ("--hidden", "64", "--bidirectional", "--nonlinearity", "relu")
        expected = self.explain(capsys, "rnn", "512x64x128", *flags, "--device", "h200")
        words = "512x64x128,hidden=64,bidirectional=1,nonlinearity=relu"
        assert self.explain(capsys, "rnn", words, "--device", "h200") == expected
        window = ["--pool-stride", "1", "--device", "h200"]
        expected = self.explain(capsys, "conv2d_max_pool2d", "32x3x64x64", "64x3x3x3", *window)
        words = "32x3x64x64,64x3x3x3,pool-stride=1"
        assert self.explain(capsys, "conv2d_max_pool2d", words, "--device", "h200") == expected


class TestDoctor:
    def test_a_healthy_machine(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITUNE_CACHE_DIR", str(tmp_path / "new" / "folder"))
        assert cli.main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert "no problems" in text
        assert "shipped sm_90" in text
        assert not (tmp_path / "new").exists(), "looking changes nothing"

    def test_json(self, capsys):
        assert cli.main(["doctor", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["problems"] == []
        assert document["tritune"] == tritune.__version__

    # A wrong value of each variable, and what is said of it.
    WRONG = {
        "TRITUNE_BACKEND": ("foo", "TRITUNE_BACKEND must be one of auto, triton, torch, got 'foo'"),
        "TRITUNE_AUTOTUNE": ("foo", "TRITUNE_AUTOTUNE must be one of cached, missing, always, got 'foo'"),
        "TRITUNE_LOG": ("foo", "TRITUNE_LOG must be one of debug, info, warning, error, got 'foo'"),
        "TRITUNE_CONFIG_PATH": ("/no/such/folder", "TRITUNE_CONFIG_PATH: /no/such/folder: No such file or directory"),
        "TRITUNE_CACHE_DIR": (__file__, f"TRITUNE_CACHE_DIR: {__file__} is not a folder"),
        "TRITUNE_DEVICE": ("abacus", "TRITUNE_DEVICE: unknown device 'abacus'"),
        "TRITUNE_ASSERT_TUNED": ("perhaps", "TRITUNE_ASSERT_TUNED must be 1 or 0, got 'perhaps'"),
        "TRITUNE_BACKND": ("torch", "TRITUNE_BACKND is not a variable of tritune"),
    }

    def test_every_variable_has_a_wrong_value(self):
        assert set(self.WRONG) == {*doctor.VARIABLES, "TRITUNE_BACKND"}

    @pytest.mark.checkout
    def test_every_variable_is_looked_at(self):
        table = (SOURCE.parent / "docs/environment.md").read_text(encoding="utf-8")
        assert set(re.findall(r"^\| `(TRITUNE_\w+)`", table, flags=re.MULTILINE)) == set(doctor.VARIABLES)

    @pytest.mark.parametrize("name", WRONG)
    def test_a_wrong_variable_is_named(self, name, capsys, monkeypatch):
        value, problem = self.WRONG[name]
        monkeypatch.setenv(name, value)
        assert cli.main(["doctor"]) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM: ")]
        assert len(lines) == 1
        assert lines[0].startswith(f"PROBLEM: {problem}")

    def test_all_of_them_at_once_in_a_process_of_its_own(self):
        """What goes wrong while the package is imported must not keep the command from saying so."""
        done = run_in_child(
            "import sys; from tritune import cli; sys.exit(cli.main(['doctor', '--json']))",
            **{name: value for name, (value, _) in self.WRONG.items()},
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        problems = json.loads(done.stdout)["problems"]
        assert all(any(one.startswith(problem) for one in problems) for _, problem in self.WRONG.values())

    @pytest.mark.parametrize("section", doctor.SECTIONS)
    def test_what_fails_while_it_is_looked_at_is_a_problem(self, section, capsys, monkeypatch):
        def fail(facts, hints):
            raise RuntimeError("driver gone\nstack of the driver")

        monkeypatch.setitem(doctor.SECTIONS, section, fail)
        assert cli.main(["doctor"]) == 1
        assert (
            f"PROBLEM: looking at {section} failed: RuntimeError: driver gone\n1 problem\n" in capsys.readouterr().out
        )

    def test_without_a_gpu_there_is_none(self, capsys, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert cli.main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert "\ngpu            none\n" in out
        facts = [line for line in out.splitlines() if not line.startswith(("hint: ", "entries"))]
        assert not [line for line in facts if "h200" in line or "sm_" in line]

    @pytest.mark.parametrize("minor", ["3.6", "3.7", "3.8", "3.9"])
    def test_what_ships_is_in_order_with_every_supported_triton(self, minor, monkeypatch):
        monkeypatch.setattr(store, "_minor", minor)
        _, problems, hints = doctor.examine()
        assert problems == []
        assert not [hint for hint in hints if "another Triton minor" in hint]

    def test_unsupported_triton(self, monkeypatch):
        monkeypatch.setattr(doctor, "_version_of", lambda package: "3.4.0" if package == "triton" else "1.0")
        _, problems, _ = doctor.examine()
        assert any("Triton 3.4.0 is outside 3.6 to 3.9" in problem for problem in problems)

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr(doctor, "_version_of", lambda package: None)
        _, problems, hints = doctor.examine()
        assert problems == []
        assert any("everything runs on torch" in hint for hint in hints)

    def test_entries_of_another_triton_are_counted(self, monkeypatch, tmp_path):
        entry = store.Entry({"C": 8}, store.Config(BLOCK=1), "model", extra={"env": {"triton": "3.1.0"}})
        store.write(tmp_path / "sm_90" / "conv.json", "conv", [entry])
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        _, _, hints = doctor.examine()
        assert any("come from another Triton minor" in hint for hint in hints)

    def test_a_broken_file_is_a_problem(self, monkeypatch, tmp_path):
        (tmp_path / "sm_90").mkdir()
        (tmp_path / "sm_90" / "conv.json").write_text("{")
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        _, problems, _ = doctor.examine()
        assert any("conv.json" in problem for problem in problems)
