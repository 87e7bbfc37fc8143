"""``tritune tune``: the search on its own; the real command and its worker on planted configs and a made-up clock."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tritune
from tritune import cli
from tritune.autotune import progress, store
from tritune.autotune.config import Config, Estimate, Tunable
from tritune.autotune.device import named
from tritune.autotune.progress import Progress
from tritune.autotune.resolve import ranked
from tritune.autotune.search import Final, OutOfTime, Search, Trial, is_tuned, share, winner

pytestmark = pytest.mark.torch

SOURCE = Path(tritune.__file__).resolve().parents[1]
TESTS = Path(__file__).resolve().parent


# --- the search ------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Simulated:
    """A bench on a clock that only trials move. ``faults`` and ``us`` are by BLOCK."""

    def __init__(self, clock: Clock, us: dict[int, float], faults: dict[int, str] | None = None) -> None:
        self.clock, self.us, self.faults = clock, us, faults or {}
        self.limits: list[float] = []
        self.finalists: list[int] = []
        self.final_us: dict[int, float] = {}

    def attempt(self, config: Config, give_up_us: float) -> Trial:
        self.clock.now += 1.0
        self.limits.append(give_up_us)
        if config.BLOCK in self.faults:
            return Trial(config, fault=self.faults[config.BLOCK])
        us = self.us[config.BLOCK]
        return Trial(config, us, 3 if us > give_up_us else 7, facts={"err": 0.0})

    def final(self, configs: Sequence[Config]) -> Final:
        self.clock.now += 2.0
        self.finalists = [config.BLOCK for config in configs]
        return Final({config: self.final_us.get(config.BLOCK, self.us[config.BLOCK]) for config in configs}, 15.0)


class Problem(NamedTuple):
    size: int


TUNABLE = Tunable(
    "toy", tuple(Config(BLOCK=block) for block in range(1, 8)), lambda p: {"size": p.size}, lambda p, c, d: True,
    lambda p, c, d: Estimate(1, ""), lambda p, c: [], moved_bytes=lambda p, c: 1.0, version=3,
)  # fmt: skip
ENV = {"gpu": "NVIDIA H200", "triton": "3.6.0"}


def configs(count: int) -> list[Config]:
    return [Config(BLOCK=block) for block in range(1, count + 1)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestSearch:
    def search(self, clock: Clock, us: Sequence[float], faults: dict[int, str] | None = None, until: float = math.inf):
        bench = Simulated(clock, dict(enumerate(us, 1)), faults)
        search = Search(configs(len(us)), bench)
        search.run(until, clock)
        return search, bench

    def test_the_fastest_that_works_wins(self, clock):
        search, _ = self.search(clock, [20, 1, 10, 30], {2: "wrong: result: max 1e+00"})
        assert search.best == (Config(BLOCK=3), 10)
        entry = search.entry(TUNABLE, Problem(8), "measured", ENV)
        assert (entry.key, entry.config, entry.origin, entry.version) == ({"size": 8}, {"BLOCK": 3}, "measured", 3)
        assert (entry.us, entry.torch_us, entry.extra["default_us"], entry.extra["runner_up_us"]) == (10, 15, 20, 20)
        assert entry.extra["counts"] == {"wrong": 1, "slow": 2}
        assert entry.extra["broken"] == {"BLOCK=2": "wrong: result: max 1e+00"}
        assert (entry.extra["env"], entry.extra["tested"], entry.extra["err"]) == (ENV, 4, 0.0)
        assert "unfinished" not in entry.extra
        assert store.Entry.from_json(json.loads(json.dumps(entry.to_json()))) == entry

    def test_the_limit_follows_the_best(self, clock):
        search, bench = self.search(clock, [20, 10, 40, 12])
        assert bench.limits == [math.inf, 30, 15, 15]
        assert [trial.samples for trial in search.trials] == [7, 7, 3, 7]
        assert [trial.config.BLOCK for trial in search.slow()] == [1, 3]

    def test_the_final_decides_and_has_the_default(self, clock):
        bench = Simulated(clock, dict(enumerate([20, 9, 10, 11, 12, 13, 14], 1)))
        bench.final_us = {2: 10.5}
        search = Search(configs(7), bench)
        search.run(clock=clock)
        assert bench.finalists == [2, 3, 4, 5, 6, 1], "the best five of the trials, and the default"
        assert search.best == (Config(BLOCK=3), 10)

    def test_the_default_is_the_first_that_works(self, clock):
        search, _ = self.search(clock, [5, 20, 19.9], {1: "spill: 8 bytes a thread"})
        assert search.default == Config(BLOCK=2)
        assert search.best == (Config(BLOCK=2), 20), "2 % are noise"

    def test_budget(self, clock):
        search, _ = self.search(clock, [20] * 50, until=10)
        assert len(search.trials) == 10
        assert clock.now == 12, "nothing but the final runs later"

    def test_nothing_works(self, clock):
        search, bench = self.search(clock, [1, 1], {1: "crashed: exited with 7", 2: "hung: nothing for 3 s"})
        assert search.best is None and search.entry(TUNABLE, Problem(8), "measured", ENV) is None
        assert bench.finalists == []

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OutOfTime])
    def test_an_end_in_the_middle_leaves_the_best_so_far(self, clock, error):
        bench = Simulated(clock, dict(enumerate([20, 10, 5], 1)))

        def stop(search: Search) -> None:
            if len(search.trials) == 2:
                raise error

        search = Search(configs(3), bench, stop)
        if error is OutOfTime:
            search.run(clock=clock)
        else:
            with pytest.raises(KeyboardInterrupt):
                search.run(clock=clock)
        entry = search.entry(TUNABLE, Problem(8), "measured", ENV)
        assert (entry.config, entry.us, entry.torch_us) == ({"BLOCK": 2}, 10, None)
        assert entry.extra["unfinished"] is True

    def test_winner(self):
        default, other = configs(2)
        assert winner([(default, 10.0), (other, 9.9)], default) == (default, 10.0)
        assert winner([(default, 10.0), (other, 9.7)], default) == (other, 9.7)
        assert winner([(other, 9.9)], default) == (other, 9.9)

    def test_shares(self):
        assert share(now=0, deadline=120, keys_left=3) == 40
        assert share(now=90, deadline=120, keys_left=2) == 15, "what one key left over"
        assert share(now=0, deadline=120, keys_left=60) == 8, "too little for each: the first get enough"
        assert share(now=118, deadline=120, keys_left=60) == 2
        assert share(now=130, deadline=120, keys_left=1) == 0

    @pytest.mark.parametrize(
        "change, tuned",
        [
            ({}, True), ({"env": {**ENV, "triton": "3.6.1"}}, True), ({"env": {**ENV, "triton": "3.7.0"}}, False),
            ({"env": {**ENV, "gpu": "NVIDIA H100"}}, False), ({"origin": "rehearsed"}, False),
            ({"tunable": replace(TUNABLE, version=4)}, False), ({"key": {"size": 9}}, False),
            ({"tunable": replace(TUNABLE, configs=TUNABLE.configs[1:])}, False),
        ],
    )  # fmt: skip
    def test_resume(self, change, tuned):
        entry = store.Entry({"size": 8}, Config(BLOCK=1), "measured", 3, extra={"env": ENV})
        asked = {"tunable": TUNABLE, "key": {"size": 8}, "origin": "measured", "env": ENV} | change
        assert is_tuned(entries=[entry], **asked) is tuned
        unfinished = store.Entry(entry.key, entry.config, "measured", 3, extra={"env": ENV, "unfinished": True})
        assert not is_tuned(entries=[unfinished], **asked)


# --- the command on planted configs ----------------------------------------------------------------------------------

PLANTED = "good:20 wrong:1 forgets:1 wavers:1 raises:1 exits:1 segfaults:1 hangs:1 slow:100 good:10 good:10.1 good:14"


def environment(planted: str, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITUNE_")}
    kept.pop("TRITON_INTERPRET", None)
    path = os.pathsep.join(map(str, [SOURCE, TESTS]))
    return {**kept, "PYTHONPATH": path, "PLANTED": planted, "PLANTED_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}


def command(folder: Path, *options: str) -> list[str]:
    fixed = ["tune", "planted", "--rehearse", "--families", "planted_configs", "--out", str(folder)]
    return [sys.executable, "-m", "tritune", *fixed, *options]


def run(folder: Path, planted: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *options), env=environment(planted, folder), capture_output=True, text=True, check=False
    )


def entries(folder: Path) -> dict[int, store.Entry]:
    """By the size of the layer."""
    document = json.loads((folder / "rehearsal/planted.json").read_text())
    found = [store.Entry.from_json(data) for data in document["entries"]]
    return {int(entry.key["size"]): entry for entry in found}


def config(block: int) -> str:
    return f"BLOCK={block} num_warps=4 num_stages=1"


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One key with every fault; several tests look at what came of it."""
    folder = tmp_path_factory.mktemp("store")
    return folder, run(folder, PLANTED, "--shapes", "layer-100", "--trial-limit", "4s", "--json")


@pytest.mark.slow
class TestPlanted:
    def test_the_known_best_is_found(self, planted_run):
        folder, done = planted_run
        assert done.returncode == 0, done.stderr
        entry = entries(folder)[100]
        assert (entry.config, entry.us) == ({"BLOCK": 10, "num_warps": 4, "num_stages": 1}, 10)
        assert (entry.extra["default_us"], entry.extra["runner_up_us"]) == (20, 10.1)
        assert "unfinished" not in entry.extra

    def test_torch_is_a_candidate(self, planted_run):
        assert entries(planted_run[0])[100].torch_us == 15

    def test_times_of_a_rehearsal_are_not_passed_off_as_measured(self, planted_run):
        folder, _ = planted_run
        assert entries(folder)[100].origin == "rehearsed"
        assert list(folder.rglob("*.json")) == [folder / "rehearsal/planted.json"], "where no lookup ever reads"

    def test_each_fault_costs_one_trial_and_is_named(self, planted_run):
        folder, done = planted_run
        broken = entries(folder)[100].extra["broken"]
        expected = {
            2: "wrong: result: max ", 3: "wrong: result: max nan", 4: "wrong: two runs differ",
            5: "raised: ValueError: planted in kernel.py", 6: "crashed: exited with 7",
            7: "crashed: died of SIGSEGV", 8: "hung: nothing for 4 s",
        }  # fmt: skip
        assert set(broken) == {config(block) for block in expected}
        for block, fault in expected.items():
            assert broken[config(block)].startswith(fault)
            assert f"{broken[config(block)]}  {config(block)}"[:60] in done.stderr
        (key,) = json.loads(done.stdout)["keys"]
        assert [one["config"]["BLOCK"] for one in key["trials"]] == list(range(1, 13)), "each was tried once"
        assert "12 of 12 tried: 3 wrong, 1 raised, 2 crashed, 1 hung, 2 slow" in done.stderr

    def test_the_slow_one_is_given_up(self, planted_run):
        (key,) = json.loads(planted_run[1].stdout)["keys"]
        samples = {one["config"]["BLOCK"]: one["samples"] for one in key["trials"] if one["us"]}
        assert samples == {1: 7, 9: 3, 10: 7, 11: 7, 12: 7}

    def test_json(self, planted_run):
        folder, done = planted_run
        document = json.loads(done.stdout)
        assert document["files"] == [str(folder / "rehearsal/planted.json")]
        (key,) = document["keys"]
        assert (key["kernel"], key["layer"], key["status"]) == ("planted", "layer-100", "tuned")
        assert key["entry"]["us"] == 10

    def test_two_runs_at_once_resume(self, tmp_path, planted_run):
        """Each waits for the other's lock: nothing is lost and the file is whole."""
        shutil.copytree(planted_run[0] / "rehearsal", tmp_path / "rehearsal")
        runs = [
            subprocess.Popen(
                command(tmp_path, *(f"--shapes={layer}" for layer in layers)), env=environment(planted, tmp_path),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for planted, *layers in (
                (9 * "good:20 " + "good:6", "layer-100", "layer-200"), (9 * "good:20 " + "good:5", "layer-300")
            )
        ]  # fmt: skip
        texts = [process.communicate(timeout=60)[0] for process in runs]
        assert [process.returncode for process in runs] == [0, 0], texts
        assert "1 tuned, 1 in the store already" in texts[0]
        assert {size: entry.us for size, entry in entries(tmp_path).items()} == {100: 10, 200: 6, 300: 5}
        assert not list(tmp_path.rglob("*.tmp"))

    def test_an_interrupt_keeps_what_was_found(self, tmp_path):
        """Ctrl-C, and then a run that takes up what is unfinished and gets SIGTERM."""
        for number, planted, us in ((signal.SIGINT, "good:10", 10), (signal.SIGTERM, "good:5", 5)):
            process = subprocess.Popen(
                command(tmp_path, "--trial-limit", "1h"), env=environment(f"good:20 {planted} hangs:1", tmp_path),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            try:
                end = time.monotonic() + 60
                while not (tmp_path / "hanging").exists():
                    assert time.monotonic() < end and process.poll() is None
                    time.sleep(0.05)
                (tmp_path / "hanging").unlink()
                process.send_signal(number)
                text = process.communicate(timeout=30)[0]
            finally:
                process.kill()
                process.wait()
            assert process.returncode == 130, text
            assert "1 cut short, 1 left for the next run" in text
            assert set(entries(tmp_path)) == {100}
            entry = entries(tmp_path)[100]
            assert (entry.config["BLOCK"], entry.us, entry.extra["unfinished"]) == (2, us, True)

    def test_the_budget_is_kept(self, tmp_path):
        started = time.monotonic()
        done = run(tmp_path, " ".join(["sleeps:20"] * 400), "--budget", "10s")
        assert time.monotonic() - started < 17, "10 s, and the start and end of the command"
        assert done.returncode == 0, done.stdout + done.stderr
        assert 0 < entries(tmp_path)[100].extra["tested"] < 400


class Here:
    """A stand-in for the worker: trials by what the class says, on an H200 that is not there."""

    fault = ""
    broken = False
    seconds = 0.0

    def __init__(self, args: Any, deadline: float) -> None:
        self.deadline = deadline

    def start(self) -> dict[str, Any]:
        return {"env": {**ENV, "slug": "nvidia_h200"}, "device": asdict(named("h200"))}

    def open(self, target: Any) -> None:
        pass

    def end(self) -> None:
        pass

    def compile_ahead(self, keys: Sequence[Any], device: Any) -> None:
        pass

    def attempt(self, config: Config, give_up_us: float) -> Trial:
        if self.broken:
            raise tune_module().Broken("preparing it crashed: exited with 7")
        time.sleep(self.seconds)
        return Trial(config, fault=self.fault) if self.fault else Trial(config, 10.0, 7)

    def final(self, found: Sequence[Config]) -> Final:
        return Final(dict.fromkeys(found, 10.0), 15.0)


def tune_module() -> Any:
    """The module, with the families that ship."""
    from tritune.autotune import tune
    from tritune.perf import families  # noqa: F401  registers them

    return tune


def args(*arguments: str) -> Any:
    """What the command makes of them."""
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_module(), "main", made.append)
        assert cli.main(["tune", *arguments]) == 0
    return made[0]


class TestCommand:
    """In this process, with a worker that is made up."""

    ONE = ("max_pool2d", "--shapes", "resnet50-maxpool")

    @pytest.fixture(autouse=True)
    def worker(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(tune_module(), "Remote", Here)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    def tune(self, capsys, *options: str, code: int = 0) -> str:
        assert cli.main(["tune", *self.ONE, *options]) == code
        return capsys.readouterr().out

    def configs(self, *options: str) -> list[int]:
        """How many of each kernel fit the layer."""
        chosen = [target.identity() for target in tune_module().targets(args(*self.ONE, *options))]
        return [len(ranked(*identity, named("h200"))) for identity in chosen]

    def test_the_users_store_is_the_default(self, capsys):
        text = self.tune(capsys)
        (path,) = store.cache_dir().rglob("*.json")
        assert path == store.cache_dir() / "configs/nvidia_h200/pool.json"
        assert f"written to {path.parent}" in text
        (entry,) = store.load(path)
        assert (entry.origin, entry.us, entry.torch_us) == ("measured", 10, 15)
        assert entry.extra["env"]["gpu"] == "NVIDIA H200"

    def test_what_is_found_is_used(self, capsys):
        from tritune.autotune.resolve import clear_memo, resolve

        self.tune(capsys)
        clear_memo()
        (target,) = tune_module().targets(args(*self.ONE))
        choice = resolve(*target.identity(), named("h200"))
        assert (choice.place, choice.distance, choice.us, choice.torch_us) == ("user", 0, 10, 15)

    def test_force(self, capsys):
        assert "1 tuned" in self.tune(capsys)
        assert "1 in the store already" in self.tune(capsys)
        assert "1 tuned" in self.tune(capsys, "--force")

    def test_dry_run(self, capsys):
        both = ("--direction", "fwd,bwd")
        forward, backward = self.configs(*both)
        text = self.tune(capsys, "--dry-run", *both)
        assert text.splitlines()[1:] == [
            f"  pool resnet50-maxpool bf16: {forward} configs",
            f"  pool_backward resnet50-maxpool bf16: {backward} configs",
        ]
        assert min(forward, backward) >= 6
        assert not store.cache_dir().joinpath("configs").exists()

    def test_nothing_works(self, capsys, monkeypatch):
        monkeypatch.setattr(Here, "fault", "wrong: result: max 1.0e+00")
        text = self.tune(capsys, code=1)
        (n,) = self.configs()
        assert "no config works" in text and f"{n} of {n} tried: {n} wrong" in text
        assert not store.cache_dir().joinpath("configs").exists()

    def test_a_kernel_that_cannot_be_prepared(self, capsys, monkeypatch):
        monkeypatch.setattr(Here, "broken", True)
        assert "preparing it crashed: exited with 7" in self.tune(capsys, code=1)

    def test_a_share_of_the_budget_is_for_the_final(self, capsys, monkeypatch):
        monkeypatch.setattr(Here, "seconds", 0.1)
        text = self.tune(capsys, "--budget", "0.5s")
        (entry,) = store.load(store.cache_dir() / "configs/nvidia_h200/pool.json")
        assert entry.extra["tested"] < entry.extra["candidates"] == self.configs()[0]
        assert "unfinished" not in entry.extra and "1 tuned" in text

    def test_no_time(self, capsys):
        assert "1 left for the next run" in self.tune(capsys, "--budget", "0s")


# --- usage -----------------------------------------------------------------------------------------------------------


class TestUsage:
    @pytest.fixture(autouse=True)
    def needs_triton(self):
        pytest.importorskip("triton")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["conv2d"], "torch finds no GPU here"),
            (["nonsense"], "'nonsense' cannot be tuned: known are conv1d"),
            (["--static"], "--static needs a --target"),
            (["--static", "--target", "sm_90", "--dtype", "fp16"], "choose among that with -k"),
            (["--target", "sm_90"], "--target goes with --static"),
            (["conv2d", "--shapes", "resnet50-s1-3x3", "--shapes", "typo"], "conv2d have no layer 'typo'"),
            (["conv2d", "--shapes", "resnet50-s1-3x3", "vgg-c3"], "'vgg-c3' is a layer: give each its own --shapes"),
            (["-k", "nothing"], "no kernel has 'nothing' in its name"),
            (["--static", "--target", "sm_90", "-k", "nothing"], "no layer with 'nothing' in its name"),
            (["conv2d", "--dtype", "fp8"], "'fp8' is not one of bf16"),
            (["conv2d", "--shapes", "8x16x14x14,32x15x3x5"], "does not fit"),
            (["conv2d", "--shapes", "8x16x14x14,32x16x3x3,stride=a"], "conv2d 8x16x14x14,32x16x3x3,stride=a: "),
            (["--shapes", "8x16x14x14,32x16x3x3"], "shapes belong to one operator"),
            (["rnn", "--shapes", "5x4x8,hidden=12,cell=qrnn"], "cell must be one of tanh, gru, lstm"),
            (["max_pool2d", "--shapes", "5x4x8x8,hidden=12"], "No such option: hidden (Possible options: kernel"),
            (["max_pool2d", "--shapes", "5x4x8x8,strid=2"], "No such option: strid (Possible options: stride)"),
            (["max_pool2d", "--shapes", "5x4x8x8,kernel=0"], "kernel is a whole number from 1 on, not '0'"),
            (["max_pool2d", "--shapes", "5x4x8x8,kernel=9"], "Output size is too small"),
            (["conv2d", "--shapes", "1x2x8x8,3x2x3x3,groups=0"], "groups is a whole number from 1 on, not '0'"),
            (["conv2d", "--shapes", "1x2x8x8,3x2x3x3,padding=-1"], "padding is a whole number from 0 on, not '-1'"),
            (["conv2d", "--shapes", "1x2x0x8,3x2x3x3"], "a size is a whole number from 1 on, not '0'"),
            (["conv2d", "8x16x14x14", "32x15x3x5"], "does not fit"),
            (["conv2d", "8x16x14", "32x16x3"], "this is a layer of conv1d"),
            (["adaptive_avg_pool2d", "8x16x14x14,kernel=2"], "has no window: give it the size of the output"),
            (["global_avg_pool", "8x16x14x14,size=2"], "global_avg_pool has no window"),
            (["avg_pool2d", "8x16x14x14,size=2"], "avg_pool2d has no size"),
            (["conv2d", "8x16x14x14,16x32x2x2,transposed=1"], "No such option: transposed"),
            (["8x16x14x14", "32x16x3x3"], "shapes belong to one operator"),
            (["conv2d", "--shapes", "8x16x14x14", "--shapes", "8x16x14x14", "8x16x3x3"], "got 3"),
            (["rnn", "--shapes", "5x4x8,hidden="], "hidden is a whole number from 1 on, not ''"),
            (["rnn", "--shapes", "5x4x8,hidden=8,directions=3"], "one direction or two"),
            (["rnn", "--shapes", "5x4x8"], "Missing option: hidden"),
            (["attention", "--shapes", "2x6x8x16,2x4x8x16"], "a divisor of its heads"),
            (["attention", "--shapes", "2x6x8x16,score=norm"], "score is dot or cosine"),
            (["attention", "--shapes", ""], "attention have no layer ''"),
        ],
    )
    def test_what_cannot_be_tuned(self, arguments, message, capsys, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert cli.main(["tune", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("tritune tune: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""

    @pytest.mark.parametrize("option, value", [("--budget", "soon"), ("--direction", "up"), ("--target", "sm_1")])
    def test_bad_options(self, option, value, capsys):
        assert cli.main(["tune", option, value]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"tritune tune: Invalid value for '{option}': {value!r} is not ")
        assert message.count("\n") == 1

    def test_the_defaults_are_the_modules(self):
        lists = {"ops": [], "shapes": [], "dtypes": []}
        assert args() == tune_module().Options("tritune.perf.families", **lists)
        assert args("--budget", "5m", "--trial-limit", "1.5").budget == 300
        assert args("--budget", "5m", "--trial-limit", "1.5").trial_limit == 1.5

    def test_every_operator_of_the_families_can_be_tuned(self):
        from tritune.perf import families

        assert set(tune_module().operators()) == {
            op for family in families.FAMILIES.values() for op in family.OPERATORS
        }

    def test_every_family_has_what_the_tuner_asks_for(self):
        from tritune.autotune.workload import Family
        from tritune.perf.families import FAMILIES

        wanted = {*Family.__annotations__, *(name for name in vars(Family) if not name.startswith("_"))}
        for name, family in FAMILIES.items():
            assert {one for one in wanted if not hasattr(family, one)} == set(), name

    def targets(self, *arguments: str) -> list[Any]:
        return tune_module().targets(args(*arguments))

    def test_the_default_is_every_tuned_layer(self):
        from tritune.perf import families

        chosen = self.targets("--direction", "fwd,bwd")
        assert [(target.case, target.kind) for target in chosen] == families.tuned_kernels()
        assert {target.kind for target in self.targets("conv2d")} == {"fwd"}
        assert {target.kind for target in self.targets("conv2d", "--direction", "bwd")} == {"input_grad", "weight_grad"}

    def test_explicit_shapes(self):
        (conv,) = self.targets("conv2d", "--shapes", "8x16x14x14,32x16x3x3,padding=1,stride=2", "--dtype", "tf32")
        tunable, problem = conv.identity()
        assert tunable.name == "conv"
        key = tunable.features(problem)
        assert (key["pixels"], key["C"], key["K"], key["stride"], key["precision"]) == (8 * 49, 16, 32, "1x2x2", "tf32")
        (transposed,) = self.targets("conv_transpose2d", "--shapes", "8x16x14x14,16x32x2x2,stride=2")
        assert transposed.identity()[0].name == "conv_transpose"
        (lstm,) = self.targets("rnn", "--shapes", "5x4x8,hidden=12,cell=lstm", "--dtype", "fp16")
        tunable, problem = lstm.identity()
        assert tunable.features(problem)["cell"] == "lstm" and tunable.features(problem)["H"] == 12
        pool = self.targets("max_pool2d", "--shapes", "2x8x9x9,kernel=3", "--dtype", "ieee", "--direction", "fwd,bwd")
        assert [target.identity()[0].name for target in pool] == ["pool", "pool_backward"]
        assert pool[0].case.dtype == "fp32" and "precision" not in pool[0].case.kwargs
        for op, options, reduce in (
            ("avg_pool2d", "kernel=3,padding=1", "mean"), ("lp_pool2d", "kernel=2", "norm2"),
            ("adaptive_max_pool2d", "size=2", "max"), ("global_avg_pool", "", "mean"),
        ):  # fmt: skip
            (one,) = self.targets(op, "--shapes", ",".join(filter(None, ["2x8x9x9", options])))
            tunable, problem = one.identity()
            assert (one.case.op, problem.reduce) == (op, reduce)
        shapes = "2x16x9x9,16x16x3x3,padding=1,kernel=3,pool_stride=2"
        (fused,) = self.targets("conv2d_max_pool2d", "--shapes", shapes, "--direction", "fwd,bwd")
        tunable, problem = fused.identity()
        key = tunable.features(problem)
        assert (tunable.name, key["pixels"], key["window"], key["step"]) == ("conv_max_pool", 2 * 16, "3x3", "2x2")

    @pytest.mark.parametrize("layer", [
        ["8x16x14x14", "32x16x3x3", "padding=1"],
        ["8x16x14x14,32x16x3x3,padding=1"],
        ["--shapes", "8x16x14x14 32x16x3x3 padding=1"],
        ["--shapes", "padding=1, 8x16x14x14, 32x16x3x3"],
        ["--shapes", "8x16x14x14", "32x16x3x3", "padding=1"],
    ], ids=" ".join)  # fmt: skip
    def test_spellings_of_a_layer(self, layer, capsys, monkeypatch):
        """All of them come to the same kernel."""
        tune = tune_module()
        chosen = []
        monkeypatch.setattr(tune, "tune", lambda options, targets: chosen.append(targets) or 0)
        for words in (["--shapes", "8x16x14x14,32x16x3x3,padding=1"], layer):
            assert cli.main(["tune", "conv2d", *words, "--rehearse"]) == 0
        ((expected,), (target,)) = chosen
        assert target.identity() == expected.identity() and target.case.shapes == expected.case.shapes

    @pytest.mark.parametrize("op, layer, message", [
        ("conv2d", "8x16x14x14,32xax3x3", "'32xax3x3' is not a shape such as 32x64x56x56"),
        ("conv2d", "8x16x14x14,32x-1x3x3", "'32x-1x3x3' is not a shape such as 32x64x56x56"),
        ("conv2d", "8x16x14x14,32x16x3x3,pading=1", "No such option: pading (Possible options: padding)"),
        ("conv2d_max_pool2d", "8x3x9x9,4x3x3x3,pool-strid=1",
         "No such option: pool-strid (Possible options: pool_stride, stride)"),
        ("max_pool2d", "8x16x14x14,kernel=3,kernel=2", "kernel is given twice"),
        ("conv2d", "8x16x14x14,32x16x3x3,stride=0", "stride is a whole number from 1 on, not '0'"),
        ("conv2d", "8x16x14x14,32x16x3x3,padding=a", "padding is a whole number from 0 on, not 'a'"),
        ("rnn", "5x4x8", "Missing option: hidden"),
        ("max_pool2d", "8x16x14x14,8x16x14x14", "the shapes of input are wanted, got 2"),
    ])  # fmt: skip
    def test_the_same_fault_has_the_same_text_as_of_explain(self, op, layer, message, capsys):
        for command in (["tune", op, "--shapes", layer], ["explain", op, layer], ["explain", op, *layer.split(",")]):
            assert cli.main(command) == 2
            captured = capsys.readouterr()
            assert message in captured.err and captured.err.count("\n") == 1

    def test_a_case_survives_json(self):
        from tritune.autotune.workload import Case
        from tritune.perf.families import CASES

        for case in CASES:
            assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


# --- what people see -------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    LONG = "x" * 200

    def show(self, stream: io.StringIO) -> str:
        with Progress(stream, total=4) as progress:
            progress.update(1.5, 90.4, f"best 41.2 us, {self.LONG}")
            progress.line(f"[1/4] {self.LONG}")
        return stream.getvalue()

    @pytest.mark.parametrize("stream", [io.StringIO, Terminal])
    def test_without_a_bar_standard_error_tells_every_few_seconds(self, stream, monkeypatch, capsys):
        monkeypatch.setattr(progress, "SECONDS", 0.01)
        monkeypatch.setitem(sys.modules, "rich.console", None)
        with Progress(stream(), total=4) as shown:
            time.sleep(0.05)
            assert capsys.readouterr().err == "", "nothing is known yet"
            shown.update(1.5, 90.4, "pool/vgg")
            deadline = time.monotonic() + 10
            lines: list[str] = []
            while len(lines) < 2 and time.monotonic() < deadline:  # also while nothing changes
                time.sleep(0.01)
                lines += capsys.readouterr().err.splitlines()
        assert set(lines) == {"1/4  1:30 left  pool/vgg"} and len(lines) >= 2
        capsys.readouterr()
        time.sleep(0.05)
        assert capsys.readouterr().err == "", "it has ended"

    def test_a_file_gets_whole_lines_and_no_bar(self):
        assert self.show(io.StringIO()) == f"[1/4] {self.LONG}\n"

    def test_a_terminal_without_rich_gets_lines_that_fit(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setitem(sys.modules, "rich.progress", None)
        monkeypatch.setitem(sys.modules, "rich.console", None)
        assert self.show(Terminal()) == f"[1/4] {self.LONG}"[:79] + "\n"

    def test_a_terminal_with_rich_gets_a_bar(self, monkeypatch):
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "xterm-256color")
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.show(Terminal()))
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        assert f"[1/4] {self.LONG}"[:79] in lines
        assert any("1/4 1:30 left best 41.2 us, xx" in line for line in lines)
        assert max(map(len, lines)) <= 80
