"""``tritune configs``: what it lists, shows, compares and merges, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import damage
import pytest
import torch

from tritune import cli, doctor
from tritune.autotune import resolve, store
from tritune.autotune.config import Config
from tritune.autotune.device import named

pytestmark = pytest.mark.torch


def entry(size: int, block: int, us: float | None = None, **more: Any) -> store.Entry:
    env = {"triton": more.pop("triton", "3.7.1"), "date": more.pop("date", "2026-01-01")}
    fields = {"origin": "model" if us is None else "measured", "version": 1} | more
    return store.Entry({"C": size, "dtype": "bf16"}, Config(BLOCK=block), us=us, extra={"env": env}, **fields)


def put(folder: Path, *entries: store.Entry, name: str = "nvidia_h200/pool.json") -> Path:
    store.write(folder / name, Path(name).stem, entries)
    return folder


def put_text(folder: Path, data: bytes) -> Path:
    path = folder / "nvidia_h200/toy.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def run(capsys):
    def command(*arguments: object, code: int = 0) -> str:
        assert cli.main(["configs", *map(str, arguments)]) == code
        captured = capsys.readouterr()
        return captured.out if code < 2 and captured.out else captured.err

    return command


class TestList:
    def test_what_ships(self, run):
        text = run("list")
        assert "shipped sm_90\n  kernel " in text
        assert max(map(len, text.splitlines())) <= 80
        rows = json.loads(run("list", "--json"))["files"]
        assert {row["origin"] for row in rows} == {"model"}
        assert sum(row["entries"] for row in rows) > 500
        assert sum(row["ignored"] for row in rows) == 0

    def test_the_users_come_first(self, run):
        put(store.cache_dir() / "configs", entry(8, 16, 3.0))
        rows = json.loads(run("list", "--json"))["files"]
        assert (rows[0]["store"], rows[0]["device"], rows[0]["origin"]) == ("user", "nvidia_h200", "measured")

    def test_by_source_and_version(self, run, tmp_path, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(store, "_minor", "3.7")
        entries = [entry(8, 1), entry(16, 1), entry(32, 1, 3.0), entry(64, 1, triton="3.1.0"), entry(128, 1, version=9)]
        put(tmp_path, *entries)
        rows = json.loads(run("list", tmp_path, "--json"))["files"]
        assert [(row["origin"], row["triton"], row["entries"], row["stale"], row["ignored"]) for row in rows] == [
            ("measured", "3.7.1", 1, 0, 1), ("model", "3.1.0", 1, 1, 1), ("model", "3.7.1", 3, 0, 3)
        ], "BLOCK is no parameter of the kernel"  # fmt: skip

    def test_a_corrupt_file_is_named(self, run, tmp_path, monkeypatch, capsys):
        put(tmp_path, entry(8, 1))
        (tmp_path / "nvidia_h200/rnn.json").write_text("{")
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        assert cli.main(["configs", "list"]) == 2
        text = capsys.readouterr().out
        assert "user nvidia_h200" in text and "PROBLEM: ignoring the tuned configs in " in text


class TestShow:
    def test_a_table(self, run, tmp_path):
        put(tmp_path, entry(8, 16, 3.25, torch_us=4.0), entry(16, 32))
        lines = run("show", "pool", "--store", tmp_path).splitlines()
        assert lines[0].startswith("pool for nvidia_h200, ") and lines[0].endswith(": 2 entries")
        assert lines[2].split()[:7] == ["-", "-", "model", "C=16", "dtype=bf16", "->", "BLOCK=32"]
        assert lines[3].split()[:7] == ["3.2", "4.0", "measured", "C=8", "dtype=bf16", "->", "BLOCK=16"]

    def test_what_would_serve_a_device(self, run, monkeypatch, tmp_path):
        """In the order of a lookup: device, sibling, target, each time the user's entries before the shipped ones."""
        monkeypatch.setattr(store, "SHIPPED", tmp_path)
        for number, name in enumerate(("sm_90", "nvidia_h100", "nvidia_h200", "nvidia_a100", "sm_80"), 1):
            put(tmp_path, entry(number, 16), name=f"{name}/pool.json")
            put(store.cache_dir() / "configs", entry(10 * number, 16), name=f"{name}/pool.json")

        def sizes(device: str) -> list[int]:
            shown = json.loads(run("show", "pool", "--device", device, "--json"))
            return [one["key"]["C"] for part in shown for one in part["entries"]]

        read = [one.key["C"] for *_, entries in store.layers("pool", named("h200")) for one in entries]
        assert sizes("h200") == sizes("NVIDIA-H200") == read == [30, 3, 20, 2, 10, 1]
        assert sizes("a100") == [40, 4, 50, 5]
        assert sizes("sm_90") == [10, 1]
        assert "unknown device 'abacus'" in run("show", "pool", "--device", "abacus", code=2)

    def test_what_ships_serves_an_h200(self, run):
        assert json.loads(run("show", "conv", "--device", "h200", "--json"))

    @pytest.mark.parametrize("device, found", [("h200", True), ("NVIDIA-H200", True), ("sm_90", False)])
    def test_device(self, run, tmp_path, device, found):
        put(tmp_path, entry(8, 16))
        text = run("show", "pool", "--store", tmp_path, "--device", device, code=0 if found else 1)
        assert ("BLOCK=16" in text) is found
        if not found:
            assert text == "tritune configs show: no entries of pool for sm_90\n"

    def test_json(self, run):
        (found,) = json.loads(run("show", "pool", "--device", "sm_90", "--json"))
        assert found["store"] == "shipped" and found["entries"][0]["origin"] == "model"


class TestDiff:
    def test_same(self, run, tmp_path):
        left = put(tmp_path / "a", entry(8, 16, 3.0))
        right = put(tmp_path / "b", entry(8, 16, 4.0))
        assert run("diff", left, right) == "0 added, 0 removed, 0 changed\n", "a time alone is no difference"

    def test_added_removed_changed(self, run, tmp_path):
        left = put(tmp_path / "a", entry(8, 16), entry(16, 16))
        right = put(tmp_path / "b", entry(8, 32, 4.0), entry(32, 16))
        put(right, entry(8, 16), name="sm_90/rnn.json")
        lines = run("diff", left, right, code=1).splitlines()
        assert lines == [
            "nvidia_h200/pool.json",
            "  C=16 dtype=bf16",
            "    - BLOCK=16  model",
            "  C=32 dtype=bf16",
            "    + BLOCK=16  model",
            "  C=8 dtype=bf16",
            "    - BLOCK=16  model",
            "    + BLOCK=32  4.0 us, measured",
            "sm_90/rnn.json",
            "  C=8 dtype=bf16",
            "    + BLOCK=16  model",
            "2 added, 1 removed, 1 changed",
        ]
        document = json.loads(run("diff", left, right, "--json", code=1))
        assert [bool(one["old"]) + 2 * bool(one["new"]) for one in document] == [1, 2, 3, 2]

    def test_folders_and_files_of_other_names(self, run, tmp_path):
        put(tmp_path / "a", entry(8, 16), name="sm_90/pool.json")
        put(tmp_path / "a", entry(8, 32), name="sm_80/pool.json")
        assert "1 changed" in run("diff", tmp_path / "a/sm_90", tmp_path / "a/sm_80", code=1)
        one = put(tmp_path / "a", entry(8, 32), name="sm_80/other.json") / "sm_80/other.json"
        assert "1 changed" in run("diff", tmp_path / "a/sm_90/pool.json", one, code=1)

    def test_what_cannot_be_read(self, run, tmp_path):
        left = put(tmp_path / "a", entry(8, 16))
        assert "does not exist" in run("diff", left, tmp_path / "b", code=2)
        (tmp_path / "b").mkdir()
        assert "holds no configs" in run("diff", left, tmp_path / "b", code=2)
        (tmp_path / "b/rnn.json").write_text('{"schema": 1, "entries": [7]}')
        assert "ignoring an entry in " in run("diff", left, tmp_path / "b", code=2), "a part must not count as removed"


class TestMerge:
    @pytest.mark.parametrize("keep, blocks", [("best", [16, 32, 32, 16, 32]), ("newest", [32, 32, 16, 32, 32]),
                                              ("left", [16, 16, 16, 16, 16])])  # fmt: skip
    def test_conflicts(self, run, tmp_path, keep, blocks):
        new = {"date": "2026-02-02"}
        put(
            tmp_path / "a",
            entry(1, 16, 3.0),
            entry(2, 16),
            entry(3, 16, 4.0, **new),
            entry(4, 16, 3.0),
            entry(5, 16, 3.0),
        )
        put(tmp_path / "b", entry(1, 32, 4.0, **new), entry(2, 32, 9.0, **new), entry(3, 32, 3.0), entry(4, 32, **new),
            entry(5, 32, 4.0, version=2), entry(6, 32))  # fmt: skip
        text = run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c", "--keep", keep)
        assert "6 entries, 1 of them only on the right" in text and "5 conflicts: " in text
        found = store.load(tmp_path / "c/nvidia_h200/pool.json")
        assert [one.config["BLOCK"] for one in found] == [*blocks, 32]
        assert sorted(path.name for path in (tmp_path / "c").rglob("*")) == ["nvidia_h200", "pool.json"]

    def test_into_the_left(self, run, tmp_path):
        left = put(tmp_path / "a", entry(1, 16))
        put(left, entry(1, 16), name="sm_90/rnn.json")
        right = put(tmp_path / "b", entry(2, 32))
        document = json.loads(run("merge", left, right, "-o", left, "--json"))
        assert document["conflicts"] == {"left": 0, "right": 0}
        store.clear()
        assert len(store.load(left / "nvidia_h200/pool.json")) == 2
        assert len(store.load(left / "sm_90/rnn.json")) == 1

    def test_files(self, run, tmp_path):
        left = put(tmp_path / "a", entry(1, 16)) / "nvidia_h200/pool.json"
        right = put(tmp_path / "b", entry(2, 32)) / "nvidia_h200/pool.json"
        run("merge", left, right, "-o", tmp_path / "pool.json")
        assert len(store.load(tmp_path / "pool.json")) == 2
        assert json.loads((tmp_path / "pool.json").read_text())["kernel"] == "pool"

    def test_nothing_is_overwritten(self, run, tmp_path):
        left, right, other = (put(tmp_path / name, entry(1, 16)) for name in "abc")
        before = (other / "nvidia_h200/pool.json").read_text()
        assert "exists" in run("merge", left, right, "-o", other, code=2)
        assert (other / "nvidia_h200/pool.json").read_text() == before
        file, out = left / "nvidia_h200/pool.json", tmp_path / "d"
        assert "a file and a folder" in run("merge", file, right / "nvidia_h200", "-o", out, code=2)
        for command in (["diff", file, right], ["diff", left, right / "nvidia_h200"], ["merge", left, file, "-o", out]):
            assert "are not alike" in run(*command, code=2)


class TestEntriesThatCountForNothing:
    @pytest.mark.parametrize(
        "one, reason",
        [
            (entry(8, 1, version=9), "made for version 9 of the kernel, which is at 1"),
            (entry(8, 1), "its parameters are BLOCK, the kernel has BLOCK_M, BLOCK_C, num_warps, num_stages"),
        ],
    )
    def test_doctor_names_them(self, one, reason, tmp_path, monkeypatch):
        pytest.importorskip("triton")
        put(tmp_path, one, one)
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        _, problems, _ = doctor.examine()
        (problem,) = (text for text in problems if "pool.json" in text)
        assert f"1 ignored, {reason}" in problem

    def test_a_kernel_that_is_gone(self, tmp_path, monkeypatch):
        pytest.importorskip("triton")
        put(tmp_path, entry(8, 1), name="nvidia_h200/conv9d.json")
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        _, problems, _ = doctor.examine()
        assert any("no kernel is called conv9d" in problem for problem in problems)

    def test_a_lookup_passes_over_them(self, tmp_path, monkeypatch):
        """A config with the parameters of another version would fail in the launcher."""
        pytest.importorskip("triton")
        from tritune.autotune.device import named
        from tritune.autotune.resolve import clear_memo, resolve
        from tritune.kernels import pool
        from tritune.perf.pool import LAYERS, problem_of

        problem = problem_of(LAYERS["small-maxpool"], torch.bfloat16, 1, True)
        stale = store.Entry(pool.FORWARD.features(problem), Config(BLOCK=1), "measured")
        put(tmp_path, stale)
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        clear_memo()
        assert resolve(pool.FORWARD, problem, named("h200")).place == "target"


def rest_of(command: str, damaged: Path, whole: Path, out: Path) -> list[object]:
    return {
        "list": ["list", damaged],
        "list --json": ["list", damaged, whole, "--json"],
        "show": ["show", "toy", "--store", damaged],
        "show --json": ["show", "toy", "--store", damaged, "--json", "--device", "h200"],
        "diff": ["diff", damaged, whole],
        "diff, turned": ["diff", whole, damaged, "--json"],
        "merge": ["merge", damaged, whole, "-o", out],
        "merge, turned": ["merge", whole, damaged, "-o", out, "--keep", "newest", "--json"],
        "merge into": ["merge", whole, damaged, "-o", whole],
        "merge over": ["merge", whole, whole, "-o", damaged],
    }[command]


ATTACKS = ("list", "list --json", "show", "show --json", "diff", "diff, turned", "merge", "merge, turned", "merge into",
           "merge over")  # fmt: skip


def a_name_that_is_no_text(path: Path) -> None:
    path.with_name("\udcff\udcfe.json").write_bytes(damage.WHOLE)


def a_folder_of_nothing(path: Path) -> None:
    (path / "toy.json").mkdir(parents=True)


class TestAttacks:
    """Whatever lies there: an exit status, and one line about it on standard error."""

    def attack(self, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: Path) -> int:
        whole = tmp_path / "whole"
        put_text(whole, damage.WHOLE)
        resolve.clear_memo()
        status = cli.main(["configs", *map(str, rest_of(command, damaged, whole, tmp_path / "out"))])
        printed = capsys.readouterr()
        assert status in (0, 1, 2)
        assert status < 2 or printed.err.startswith("tritune configs ") or "problem" in printed.out.lower()
        assert printed.err.count("\n") <= 1
        if "--json" in command and status < 2:
            json.loads(printed.out)
        assert (whole / "nvidia_h200/toy.json").read_bytes() == damage.WHOLE or command == "merge into"
        return status

    @pytest.mark.parametrize("command", ATTACKS)
    @pytest.mark.parametrize("data", damage.UNREADABLE.values(), ids=damage.UNREADABLE)
    def test_unreadable_files(self, tmp_path, capsys, command, data):
        put_text(tmp_path / "damaged", data)
        assert self.attack(command, tmp_path, capsys, tmp_path / "damaged") == 2
        assert self.attack(command, tmp_path, capsys, tmp_path / "damaged/nvidia_h200/toy.json") == 2
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "damaged/nvidia_h200/toy.json").read_bytes() == data

    @pytest.mark.parametrize("command", ATTACKS)
    def test_damaged_files(self, tmp_path, capsys, command):
        for seed in range(60):
            path = put_text(tmp_path / "damaged", damage.damaged(seed))
            self.attack(command, tmp_path, capsys, tmp_path / "damaged")
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            shutil.rmtree(tmp_path / "whole", ignore_errors=True)
            assert command == "merge over" or path.read_bytes() == damage.damaged(seed)

    @pytest.mark.parametrize("command", ATTACKS)
    @pytest.mark.parametrize("place", [*damage.NO_FILES, a_name_that_is_no_text, a_folder_of_nothing])
    def test_what_is_no_file(self, tmp_path, capsys, command, place):
        path = tmp_path / "damaged/nvidia_h200/toy.json"
        path.parent.mkdir(parents=True)
        place(path)
        self.attack(command, tmp_path, capsys, tmp_path / "damaged")
        self.attack(command, tmp_path, capsys, path)
        self.attack(command, tmp_path, capsys, path / "below")

    @pytest.mark.parametrize("command", ATTACKS)
    @pytest.mark.parametrize("path", ["", "nowhere", "/dev/null", "/proc/self/mem", 5000 * "x", "\udcff", "-", "a\nb"])
    def test_paths(self, tmp_path, capsys, command, path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        self.attack(command, tmp_path, capsys, Path(path) if path != "-" else tmp_path / "-")

    @pytest.mark.parametrize(
        "out", ["/proc/out", "/dev/null", "/dev/null/out", "whole", "fifo", 5000 * "x", "file/out"]
    )
    def test_places_that_cannot_be_written(self, run, tmp_path, monkeypatch, out):
        monkeypatch.chdir(tmp_path)
        put_text(tmp_path / "whole", damage.WHOLE)
        put_text(tmp_path / "left", damage.WHOLE)
        os.mkfifo("fifo")
        Path("file").touch()
        text = run("merge", "left", "whole", "-o", out, code=2)
        assert text.startswith("tritune configs merge: ") and text.count("\n") == 1

    def test_the_users_own_files(self, capsys, tmp_path, monkeypatch):
        """Without a path the commands read what a lookup reads: a damaged file is named, the others are shown."""
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        for seed in range(40):
            put_text(tmp_path, damage.damaged(seed))
            for command in (["list"], ["list", "--json"], ["show", "toy"], ["show", "toy", "--json"]):
                capsys.readouterr()
                assert cli.main(["configs", *command]) in (0, 1, 2)
                if "--json" in command:
                    json.loads(capsys.readouterr().out)


class TestMergedKernels:
    def test_two_kernels_are_not_mixed(self, run, tmp_path):
        """Also where both declare the same parameters, and nobody would notice."""
        left = put(tmp_path / "a", entry(1, 16)) / "nvidia_h200/pool.json"
        right = put(tmp_path / "b", entry(2, 32), name="nvidia_h200/rnn.json") / "nvidia_h200/rnn.json"
        assert "two kernels, pool and rnn" in run("merge", left, right, "-o", tmp_path / "out.json", code=2)
        right.rename(right.with_name("pool.json"))
        assert "two kernels, pool and rnn" in run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c", code=2)
        assert not (tmp_path / "out.json").exists() and not (tmp_path / "c").exists()

    def test_a_copy_under_another_name_stays_the_kernels(self, run, tmp_path):
        left = put(tmp_path / "a", entry(1, 16)) / "nvidia_h200/pool.json"
        left = left.rename(left.with_name("backup.json"))
        right = put(tmp_path / "b", entry(2, 32)) / "nvidia_h200/pool.json"
        run("merge", left, right, "-o", tmp_path / "pool.json")
        assert len(store.load(tmp_path / "pool.json", "pool")) == 2

    def test_with_itself(self, run, tmp_path):
        left = put(tmp_path / "a", entry(1, 16))
        (tmp_path / "link").symlink_to(left)
        for right in (left, tmp_path / "link"):
            assert "are the same" in run("merge", left, right, "-o", left, code=2)
            assert "are the same" in run("merge", left, right, "-o", tmp_path / "c", code=2)

    def test_fields_of_the_files_are_kept(self, run, tmp_path):
        for name, field in (("a", b'"note": 1'), ("b", b'"hint": 2')):
            put_text(tmp_path / name, damage.WHOLE.replace(b'"note": ["kept"]', field))
        run("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c")
        document = json.loads((tmp_path / "c/nvidia_h200/toy.json").read_text())
        assert (document["note"], document["hint"], len(document["entries"])) == (1, 2, 3)
        assert document["entries"] == sorted(damage.ENTRIES, key=lambda one: json.dumps(one["key"]))
