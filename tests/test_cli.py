"""The ``tritune`` command: what it says, what it returns, and what it does without its extras."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tritune
from tritune import cli, doctor
from tritune.autotune import store

pytestmark = pytest.mark.torch

SOURCE = Path(tritune.__file__).resolve().parents[1]


def run_in_child(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SOURCE), **variables}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


class TestCommand:
    def test_help_lists_every_command(self, capsys):
        with pytest.raises(SystemExit) as end:
            cli.main([])
        assert end.value.code == 0
        text = capsys.readouterr().out
        for words in cli.COMMANDS:
            assert f"  {' '.join(words)} " in text
        assert max(map(len, text.splitlines())) <= 80

    def test_help_of_every_command(self, capsys):
        pytest.importorskip("triton")
        for words in cli.COMMANDS:
            with pytest.raises(SystemExit) as end:
                cli.main([*words, "--help"])
            assert end.value.code == 0
            assert f"usage: tritune {' '.join(words)}" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments", [["nonsense"], ["bench"], ["bench", "nonsense"], ["explain"], ["explain", "nonsense"]]
    )
    def test_bad_usage(self, arguments, capsys):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2
        assert "usage: tritune" in capsys.readouterr().err

    def test_version(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["--version"])
        assert capsys.readouterr().out == f"tritune {tritune.__version__}\n"

    def test_help_needs_no_triton(self):
        code = "import sys\nfrom tritune import cli\nsys.modules['triton'] = None\ncli.main(['--help'])"
        done = run_in_child(code)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        "missing, arguments",
        [("triton", ["bench", "static"]), ("rich", ["demo"]), ("sklearn", ["demo"]), ("matplotlib", ["demo"])],
    )
    def test_a_missing_extra_is_named(self, missing, arguments):
        for module in ("triton", "rich", "matplotlib", "sklearn"):
            pytest.importorskip(module)
        code = (
            f"import sys\nsys.modules[{missing!r}] = None\nfrom tritune import cli\nsys.exit(cli.main({arguments!r}))"
        )
        done = run_in_child(code)
        assert done.returncode == 2, done.stderr
        extra = cli.COMMANDS[tuple(arguments)][2]
        assert done.stderr == f"tritune {' '.join(arguments)} needs {missing}: pip install 'tritune[{extra}]'\n"
        assert done.stdout == ""


class TestExplain:
    def explain(self, capsys, *arguments):
        pytest.importorskip("triton")
        assert cli.main(["explain", *arguments]) == 0
        return capsys.readouterr().out

    def test_convolution(self, capsys, monkeypatch):
        monkeypatch.setenv("TRITUNE_DEVICE", "")
        text = self.explain(capsys, "conv2d", "32x64x56x56", "64x64x3x3", "--padding", "1", "--activation", "relu")
        assert text.startswith('conv2d: triton: use_backend("triton") is in force\n  conv: ')

    def test_pooling_as_json(self, capsys):
        text = self.explain(capsys, "max_pool2d", "32x64x112x112", "--kernel", "3", "--stride", "2", "--json")
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
        document = json.loads(self.explain(capsys, op, shape, *options.split(), "--layout", layout, "--json"))
        assert (document["op"], document["backend"]) == (op, "triton")
        assert [one["kernel"] for one in document["kernels"]] == [kernel]

    def test_what_is_not_covered(self, capsys):
        text = self.explain(capsys, "conv2d", "1x8x8x8", "8x8x3x3", "--dtype", "fp64", "--backend", "auto")
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
        before = dict(os.environ)
        self.explain(capsys, "max_pool2d", "1x8x8x8", "--device", "mi300x")
        assert dict(os.environ) == before

    def test_every_public_operator(self, capsys):
        """One that is added to the package must be added to the command."""
        from tritune import explain_command as command

        public = {
            name
            for name, value in vars(tritune).items()
            if getattr(value, "__module__", "").startswith("tritune.ops.")
            and value.__module__ != "tritune.ops._dispatch"
        }
        assert set(command.OPS) == public
        for name, op in command.OPS.items():
            hidden = ["--hidden", "64"] if "--hidden" in op.options else []
            text = self.explain(capsys, name, *op.example.split(), *hidden)
            assert '_backend("triton") is in force\n  ' in text

    @pytest.mark.parametrize("op, gates", [("rnn", 1), ("gru", 3), ("lstm", 4)])
    def test_recurrence(self, op, gates, capsys):
        text = self.explain(
            capsys, op, "512x64x32", "--hidden", "64", "--bidirectional", "--dtype", "fp32", "--precision", "tf32"
        )
        assert text.startswith(f'{op}: triton: use_backend("triton") is in force\n  rnn: ')
        text = self.explain(capsys, op, "512x64x32", "--hidden", "2048", "--backend", "auto")
        assert text.startswith(f"{op}: torch: no kernel covers the call\n  not triton: hidden_size=2048")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("conv2d", "1x8x8x8"), "conv2d takes input weight [bias]: "),
            (("lstm", "5x2x8", "8x8", "--hidden", "4"), "lstm takes input: "),
            (("conv2d", "1x8x8x8", "8x4x3x3"), "expected input"),
            (("max_pool2d", "1x8x8x8", "--padding", "-1"), "pad"),
            (("conv2d", "1x8x8x8", "8x8x3x3", "--dtype", "fp64"), "no kernel covers the call"),
            (("max_pool2d", "1x8x8x8", "--device", "abacus"), "unknown device 'abacus'"),
        ],
    )
    def test_errors_are_one_line(self, arguments, message, capsys):
        pytest.importorskip("triton")
        assert cli.main(["explain", *arguments]) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1

    @pytest.mark.parametrize("text", ["1,2,3,4", "x8", "8x-1", "8.5x3"])
    def test_what_is_not_a_shape(self, text, capsys):
        pytest.importorskip("triton")
        with pytest.raises(SystemExit):
            cli.main(["explain", "conv2d", text, "8x8x3x3"])
        assert f"argument SHAPE: {text!r} is not a shape such as 32x64x56x56" in capsys.readouterr().err


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

    @pytest.mark.parametrize(
        "name, value, problem",
        [
            ("TRITUNE_BACKND", "torch", "TRITUNE_BACKND is not a variable of tritune"),
            ("TRITUNE_DEVICE", "abacus", "unknown device 'abacus'"),
            ("TRITUNE_CACHE_DIR", __file__, f"{__file__} cannot be written"),
        ],
    )
    def test_a_problem(self, name, value, problem, capsys, monkeypatch):
        monkeypatch.setenv(name, value)
        assert cli.main(["doctor"]) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM: ")]
        assert len(lines) == 1
        assert problem in lines[0]

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
