"""What the compiler makes of the shipped configs, and that the static suite sees what it must.

The scratch kernels below each carry one fault; the suite must name it.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

import tritune  # noqa: E402
from tritune import cli  # noqa: E402
from tritune.autotune import compilers, static_profile, store, tune_worker  # noqa: E402
from tritune.autotune.bench import Bench, Target  # noqa: E402
from tritune.autotune.check import Machine, Verdict  # noqa: E402
from tritune.autotune.config import Config  # noqa: E402
from tritune.autotune.device import TARGETS, named  # noqa: E402
from tritune.autotune.layout import empty  # noqa: E402
from tritune.autotune.resolve import ranked, resolve  # noqa: E402
from tritune.autotune.workload import ALL_LAYERS, Kernel  # noqa: E402
from tritune.kernels import attention, conv, conv_pool, pool, registered, rnn  # noqa: E402
from tritune.kernels._launch import Launch  # noqa: E402
from tritune.ops.conv_operators import module_of, weight_grad_module_of  # noqa: E402
from tritune.perf import conv as conv_layers  # noqa: E402
from tritune.perf import families, static  # noqa: E402

pytestmark = pytest.mark.static
SOURCE = Path(tritune.__file__).resolve().parents[1]
TUNABLES = registered()
# Hopper and AMD between them have each kind of rule; `make test` leaves the other targets to `make test-all`. The other
# versions of Triton compile for Hopper in `make compat`, and for all targets in `make compat-all`.
MARKS = {"sm_90": [pytest.mark.compat], "gfx942": []}
TARGET_ROWS = [pytest.param(target, marks=MARKS.get(target, [pytest.mark.full])) for target in TARGETS]
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]

CHANNELS_LAST = conv.problem_of(
    (8, 64, 32, 32), (64, 64, 3, 3), (32, 32), conv.Geometry.of((1, 1), (1, 1), (1, 1), 1), torch.bfloat16, "16", True
)


# --- what ships ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", TUNABLES)
@pytest.mark.parametrize("target", TARGET_ROWS)
def test_shipped_configs(target, kernel):
    """No spill, within shared memory, tensor cores and wide loads where due, nothing worse than the baseline."""
    baseline = static.load_baseline(static.BASELINES / f"static-{static.minor(static_profile.TRITON)}.json")
    assert baseline, f"no baseline for Triton {static_profile.TRITON}: tritune bench static --update"
    selected = list(static.rows([target], f"/{kernel}/"))
    assert len(selected) >= (7 if target in ALL_LAYERS else 2)
    bad = {}
    for row, one in static.measure(selected, static_profile.Row.profile):
        assert row.name in baseline
        found = static_profile.faults(row.tunable, row.problem, one, target) if row.is_main else []
        found += static.regressions(baseline[row.name], one)
        if found:
            bad[row.name] = found
    assert bad == {}


@pytest.mark.parametrize("target", TARGETS)
def test_every_layer_has_a_shipped_config(target):
    """What the suite compiles is what a user gets: the nearest entry is the layer's own."""
    for name, tunable, problem in families.layers(target):
        choice = resolve(tunable, problem, named(target))
        assert (choice.place, choice.distance) == ("target", 0), f"{tunable.name} {name}: {choice}"


def test_the_baseline_has_no_more_than_what_ships():
    names = {row.name for row in static.rows()}
    for path in sorted(static.BASELINES.glob("static-*.json")):
        assert set(static.load_baseline(path)) == names, path.name


@pytest.mark.parametrize("name", ["resnet50-s1-3x3", "resnet50-stem", "resnext50-g32", "convnext-dw-s1"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_headline_layers_use_the_machine(name, precision):
    """16-byte loads on sm_90, and WGMMA in every product, forward and both gradients, as the README says."""
    layer = conv_layers.LAYERS[name]
    problem = conv_layers.problem_of(layer, precision)
    kind = (layer.weight, (layer.stride, layer.stride), layer.groups)
    module, weight_grad = module_of(*kind), weight_grad_module_of(*kind).WEIGHT_GRAD
    # Nobody asks for the gradient of an image.
    tunables = (module.FORWARD, weight_grad, *([module.TRANSPOSE] if name != "resnet50-stem" else []))
    for tunable in tunables:
        launch = tunable.launches(problem, resolve(tunable, problem, named("sm_90")).config)[0]
        one = static_profile.profile(launch, "sm_90")
        assert one.spill_bytes == 0
        assert one.load_bytes == 16, tunable.name
        assert one.mma == ("" if "direct" in tunable.name else "HGMMA"), tunable.name


@pytest.mark.compat
@pytest.mark.parametrize("tunable", [conv.FORWARD, conv.TRANSPOSE], ids=lambda tunable: tunable.name)
@pytest.mark.parametrize("target", NVIDIA)
def test_nchw_results_are_stored_in_runs(target, tunable):
    """16 bytes of neighbouring pixels at a time, where an image holds a whole number of them."""
    p = CHANNELS_LAST._replace(channels_last=False)
    one = static_profile.profile(tunable.launches(p, ranked(tunable, p, named(target))[0][0])[0], target)
    assert (one.spill_bytes, one.store_bytes) == (0, 16)


def test_binaries_of_killed_runs_are_swept(tmp_path, monkeypatch):
    """They lie in the folder for temporary files, under names of ours, and are an hour old."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    static_profile._swept_folder.cache_clear()
    for name, seconds in (("tritune-ab12_xyz.cubin", 1), ("tmpab12_xyz.cubin", 1), ("tritune-11111111.cubin", None)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds) if seconds else None)
    read = []
    run = static_profile._run
    monkeypatch.setattr(static_profile, "_run", lambda *command: read.append(command[-1]) or run(*command))
    launch = conv.FORWARD.launches(CHANNELS_LAST, ranked(conv.FORWARD, CHANNELS_LAST, named("sm_90"))[0][0])[0]
    static_profile.profile(launch, "sm_90")
    static_profile._swept_folder.cache_clear()
    assert {path.name for path in tmp_path.iterdir()} == {"tmpab12_xyz.cubin", "tritune-11111111.cubin"}
    assert all(Path(name).parent == tmp_path and static_profile.LEFTOVERS.fullmatch(Path(name).name) for name in read)
    assert len(read) == 2


@pytest.mark.compat
@pytest.mark.parametrize("dy, g", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("target", NVIDIA)
def test_the_epilogues_gradient_moves_runs_of_either_layout(target, dy, g):
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    dy, g = (empty(like, (8, 256, 28, 28), last) for last in (dy, g))
    p = conv.EpilogueProblem(8 * 28 * 28, 256, torch.bfloat16, True, True, True)
    config = ranked(conv.EPILOGUE_GRAD, p, named(target))[0][0]
    launch = conv.plan_epilogue_grad(p, config, dy, torch.empty_like(dy), g, like.new_empty(256), "relu")[0]
    one = static_profile.profile(launch, target)
    assert (one.spill_bytes, one.load_bytes, one.store_bytes) == (0, 16, 16)


BOXES = [config for config in conv.FORWARD.configs if "TMA" in config]


@pytest.mark.compat
@pytest.mark.parametrize("target, unit", [("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
@pytest.mark.parametrize("tunable", [conv.FORWARD, conv.TRANSPOSE], ids=lambda tunable: tunable.name)
@pytest.mark.parametrize("window, configs", [((3, 3), BOXES), ((1, 1), BOXES[:1]), ((3, 3, 3), BOXES[:1])])
def test_copied_boxes_are_multiplied_from_shared_memory(window, configs, tunable, target, unit):
    """No thread holds an operand between the copy and the product."""
    rank, pad = len(window), tuple(size // 2 for size in window)
    image = (4, 64, 256)[3 - rank :]
    geometry = conv.Geometry.of((1,) * rank, pad, (1,) * rank, 1)
    p = conv.problem_of((4, 256, *image), (256, 256, *window), image, geometry, torch.bfloat16, "16", True)
    for config in configs:
        assert tunable.accepts(p, config, named(target))
        assert not tunable.accepts(p, config, named("sm_120"))
        (launch,) = tunable.launches(p, config)
        products = re.findall(r"(?:warp_group_dot|tc_gen5_mma) .*", launch.compile(target).asm["ttgir"])
        assert products
        assert all("#ttg.dot_op" not in product and "!ttg.memdesc" in product for product in products)
        one = static_profile.profile(launch, target)
        assert (one.mma, one.spill_bytes, one.load_bytes, one.store_bytes) == (unit, 0, 16, 16), config


# --- configs are chosen by shape -------------------------------------------------------------------------------------


def sweep(kernel):
    """Layers from one image of 2x2 to 64 of 224x224, with 3 to 2048 channels."""
    dense = conv.Geometry.of((1, 1), (1, 1), (1, 1), 1)
    for n in (1, 8, 64):
        for size in (2, 7, 28, 112, 224):
            for channels in (3, 8, 16, 32, 96, 512, 2048):
                for last in (True, False):
                    x, w = (n, channels, size, size), (channels, channels, 3, 3)
                    if kernel.startswith("attention"):
                        yield attended(kernel, n, size, channels, last)
                    elif kernel == "conv_epilogue_grad":
                        yield conv.EpilogueProblem(n * size * size, channels, torch.bfloat16, True, True, last)
                    elif kernel.startswith("rnn"):
                        cell, batch = "lstm" if last else "tanh", n * size
                        yield rnn.RnnProblem(cell, 64, batch, min(channels, 128), 1, torch.bfloat16, "16", True)
                    elif "pool" in kernel and not kernel.startswith("conv"):
                        yield planes(kernel, x, last)
                    else:
                        geometry = dense
                        if "direct" in kernel:
                            geometry, w = dense._replace(groups=channels), (channels, 1, 3, 3)
                        problem = conv.problem_of(x, w, (size, size), geometry, torch.bfloat16, "16", last)
                        yield pooled(problem, 3 if last else 2) if kernel == "conv_max_pool" else problem


def pooled(problem, window):
    side = problem.output[2] // 2
    pad = window // 3
    return conv_pool.conv_pool_problem(problem, conv_pool.PoolWindow(window, window, 2, 2, pad, pad), (side, side))


def planes(kernel, shape, last):
    """Windows of 2x2, or the whole plane."""
    size = shape[2]
    taps, out = ((size, size), (1, 1)) if kernel == "global_pool" else ((2, 2), (size // 2, size // 2))
    window = pool.Window.of(taps, taps, (0, 0), (1, 1))
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    reduce, index = {"max_unpool": ("last", 8), "global_pool": ("mean", 0)}.get(kernel, ("max", 1))
    return pool.problem_of(x, out, window, reduce, index_bytes=index, layout="nhwc" if last else "nchw")


def attended(kernel, heads, size, channels, causal):
    """Sequences from 2 to 3 584, heads of 3 to 256."""
    m, d = size * 16, min(channels, 256)
    if kernel.startswith("attention_normalize"):
        return attention.NormalizeProblem(heads * m, d, torch.bfloat16)
    shift, bias = 0 if causal else None, torch.bfloat16 if kernel == "attention_bias_grad" else None
    return attention.AttentionProblem(
        1, heads, m, m, d, d, 1, torch.bfloat16, "16", shift, bias=bias, bias_dims="hmn" if bias else "", saves=True
    )


@pytest.mark.parametrize("kernel", TUNABLES)
def test_at_least_six_configs_are_chosen_by_shape(kernel):
    for target in TARGETS:
        covered = (p for p in sweep(kernel) if not kernel.startswith("rnn") or rnn.fits(p, named(target)))
        chosen = {ranked(TUNABLES[kernel], problem, named(target))[0][0] for problem in covered}
        assert len(chosen) >= 6, f"{target}: {chosen}"


# --- what is compiled is what would run ------------------------------------------------------------------------------


@pytest.mark.compat
@pytest.mark.parametrize("kernel", TUNABLES)
def test_source_is_specialised_as_triton_would(kernel):
    """Launch.source against Triton's own reading of the same arguments."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(triton.backends.compiler.GPUTarget("cuda", 90, 32))
    tunable = TUNABLES[kernel]
    seen = 0
    for _, other, problem in families.layers("sm_90"):
        if other is not tunable:
            continue
        order = [config for config, _ in ranked(tunable, problem, named("sm_90"))]
        boxes = [config for config in order if "TMA" in config]
        for launch in itertools.chain(*(tunable.launches(problem, config) for config in (order[0], *boxes[:1]))):
            binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
            values = {
                name: torch.empty(16, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
                for name, value in launch.args.items()
            }
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
            _, specialisation, _ = binder(**values, **launch.constants, **options)
            source = launch.source()
            for index, (parameter, (kind, key)) in enumerate(zip(launch.kernel.params, specialisation, strict=True)):
                assert source.signature[parameter.name] == kind, parameter.name
                if kind == "constexpr":
                    assert source.constants[(index,)] == key, parameter.name
                else:
                    assert ((index,) in source.attrs) == (key == "D"), parameter.name
            seen += 1
    assert seen


# --- planted faults --------------------------------------------------------------------------------------------------


@triton.jit
def _product(x_ptr, y_ptr, stride, BLOCK: tl.constexpr, MODE: tl.constexpr, STEPS: tl.constexpr):
    """A chain of products [BLOCK, BLOCK]; MODE plants a fault."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK)
    if MODE == "narrow":
        offsets = row[:, None] * stride + column[None, :] * stride
    else:
        offsets = row[:, None] * BLOCK + column[None, :]
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for step in range(STEPS):
        a = tl.load(x_ptr + step * BLOCK * BLOCK + offsets)
        b = tl.load(x_ptr + (STEPS + step) * BLOCK * BLOCK + offsets)
        if MODE == "no_dot":
            acc += a.to(tl.float32) * b.to(tl.float32)
        else:
            acc += tl.dot(a, b)
    tl.store(y_ptr + row[:, None] * BLOCK + column[None, :], acc.to(y_ptr.dtype.element_ty))


def planted(mode="none", block=64, warps=4, stages=3, steps=8):
    x, y = (torch.empty(1 << 20, dtype=torch.bfloat16, device="meta") for _ in range(2))
    args = {"x_ptr": x, "y_ptr": y, "stride": 3}
    return Launch(_product, 1, args, {"BLOCK": block, "MODE": mode, "STEPS": steps}, warps, stages)


@pytest.mark.parametrize(
    "launch, target, found",
    [
        (planted(), "sm_90", []),
        (planted(), "gfx942", []),
        (planted(block=128, warps=1, stages=1), "sm_90", ["spill", "tensor cores: HMMA"]),
        (planted(mode="no_dot"), "sm_90", ["tensor cores: none, expected HGMMA"]),
        (planted(mode="no_dot"), "gfx942", ["tensor cores: none, expected MFMA"]),
        (planted(mode="narrow"), "sm_90", ["loads: 2 bytes wide, expected 16"]),
        (planted(mode="narrow"), "gfx942", ["loads: 2 bytes wide, expected 16"]),
        (planted(block=128, warps=8, stages=5), "sm_90", ["shared memory"]),
        (planted(block=128, warps=4, stages=3), "gfx942", ["shared memory"]),
    ],
)
def test_planted_faults_are_named(launch, target, found):
    named_faults = static_profile.faults(conv.FORWARD, CHANNELS_LAST, static_profile.profile(launch, target), target)
    assert len(named_faults) == len(found), named_faults
    for fault, expected in zip(named_faults, found, strict=True):
        assert fault.startswith(expected)


# --- what keeps strides single parameters ----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["strides"])
def _takes_a_tuple(x_ptr, strides, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK) * strides[0] * strides[1], 0.0)


@pytest.mark.compat
def test_a_tuple_of_strides_is_specialised():
    """By value, whatever the kernel says, so that another batch would be compiled anew (docs/decisions.md, "Strides of
    a kernel stay single parameters"). Where this fails, tuples can shorten the kernels' parameter lists."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(_takes_a_tuple.signature, _takes_a_tuple.params, backend)
    kinds = {strides: bind(torch.empty(64), strides, 64)[1][1] for strides in ((1, 7), (16, 7), (3, 7), (2**31, 7))}
    assert len(set(kinds.values())) == len(kinds)


# --- the baseline ----------------------------------------------------------------------------------------------------

GOOD = static_profile.StaticProfile(100, 0, 1000, "HGMMA", 16, 16, 1000, 16)


@pytest.mark.parametrize(
    "change, named_as",
    [
        ({"spill_bytes": 8}, "spill: 0 -> 8 bytes"),
        ({"mma": "HMMA"}, "tensor cores: HGMMA -> HMMA"),
        ({"mma": ""}, "tensor cores: HGMMA -> none"),
        ({"load_bytes": 8}, "loads: 16 -> 8 bytes wide"),
        ({"store_bytes": 2}, "stores: 16 -> 2 bytes wide"),
        ({"instructions": 1151}, "instructions: 1000 -> 1151"),
        ({"warps": 12}, "occupancy: 16 -> 12 warps"),
    ],
)
class TestBaseline:
    def test_a_regression_is_named(self, change, named_as):
        assert static.regressions(GOOD, dataclasses.replace(GOOD, **change)) == [named_as]

    def test_update_refuses_it(self, change, named_as, tmp_path, capsys):
        path = tmp_path / "static.json"
        assert static.update(path, {"a": GOOD, "b": GOOD}, accept=False)
        before = path.read_text()
        capsys.readouterr()

        worse = {"b": dataclasses.replace(GOOD, **change), "c": GOOD}
        assert not static.update(path, worse, accept=False)
        text = capsys.readouterr().out
        assert f"WORSE    b: {named_as}\n" in text
        assert "new      c\n" in text
        assert "refused" in text
        assert path.read_text() == before

        assert static.update(path, worse, accept=True)
        assert static.load_baseline(path) == {"a": GOOD, **worse}


@pytest.mark.parametrize("change", [{"registers": 90}, {"instructions": 900}, {"warps": 20}, {"load_bytes": 32}])
def test_what_is_no_worse_is_printed_and_taken(change, tmp_path, capsys):
    path = tmp_path / "static.json"
    static.update(path, {"a": GOOD}, accept=False)
    better = dataclasses.replace(GOOD, **change)
    assert static.regressions(GOOD, better) == []
    assert static.update(path, {"a": better}, accept=False)
    assert "changed  a: " in capsys.readouterr().out
    assert static.load_baseline(path) == {"a": better}


# --- what the tuner makes of it --------------------------------------------------------------------------------------


class TestTuner:
    def bench(self, launch):
        """A bench on a GPU that is not there; its kernel must not be run."""
        tunable = dataclasses.replace(conv.FORWARD, launches=lambda problem, config: [launch])
        bench = Bench.__new__(Bench)
        bench.machine, bench.prunes = Machine("cuda", named("sm_90"), None, 0.0), True
        bench.kernel = Kernel(tunable, CHANNELS_LAST, None, None)
        bench._verdict = lambda config: Verdict(True, 0.0, 1.0, "")
        return bench

    @pytest.mark.parametrize(
        "launch, fault",
        [
            (planted(), ""),
            (planted(block=128, warps=1, stages=1), "spill: "),
            (planted(block=128, warps=8, stages=5), "shared memory: "),
            (planted(mode="no_dot"), "tensor cores: none, expected HGMMA"),
        ],
    )
    def test_what_the_compiler_spoiled_is_never_run(self, launch, fault):
        trial = self.bench(launch).attempt(Config(BLOCK=1))
        assert trial.fault.startswith(fault) and bool(trial.fault) == bool(fault)
        assert ("static" in trial.facts) is not fault

    def test_without_the_tools_that_read_a_binary(self, monkeypatch):
        def no_tool(launch, target):
            raise FileNotFoundError("cuobjdump")

        monkeypatch.setattr(static_profile, "profile", no_tool)
        assert self.bench(planted()).attempt(Config(BLOCK=1)).fault == ""

    def test_a_gpu_of_another_kind(self):
        bench = self.bench(planted(mode="no_dot"))
        bench.machine = bench.machine._replace(spec=dataclasses.replace(named("sm_90"), target="sm_89"))
        assert bench.attempt(Config(BLOCK=1)).fault == ""

    def test_compiling_ahead_fills_the_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        case, kind = next(one for one in families.tuned_kernels() if one[0].op == "max_pool2d")
        tunable, problem = Target(case, kind).identity()
        configs = [config for config, _ in ranked(tunable, problem, named("sm_90"))[:2]]
        bad = Config({**configs[0], "BLOCK_M": 3})  # not a power of two
        monkeypatch.setattr(tune_worker, "ranked", lambda *_: [(bad, 1.0), *((config, 1.0) for config in configs)])
        work = {"case": json.loads(json.dumps(case.to_json())), "kind": kind}
        tune_worker.compile_ahead({"device": dataclasses.asdict(named("sm_90")), "work": [work]})
        compiled = set(tmp_path.rglob("*.cubin"))
        assert len(compiled) == 2
        for config in configs:
            static_profile.profile(tunable.launches(problem, config)[0], "sm_90")
        assert set(tmp_path.rglob("*.cubin")) == compiled, "the same binaries"


class TestRanking:
    def tune(self, *options):
        return cli.main(["tune", "--static", "--target", "sm_90", "-k", "pool_backward/resnet50-maxpool", *options])

    def test_entries_are_written_and_say_model(self, tmp_path, capsys):
        assert self.tune("--out", str(tmp_path)) == 0
        *lines, count, where = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and all(line.startswith("pool_backward/resnet50-maxpool-") for line in lines)
        assert (count, where) == ("   4 entries for pool_backward on sm_90", f"written to {tmp_path / 'sm_90'}")
        (path,) = (one for one in tmp_path.rglob("*") if one.is_file())
        entries = store.load(path)
        assert {one.origin for one in entries} == {"model"} and all(one.us is None for one in entries)
        shipped = {str(one.key): one.config for one in store.load(store.SHIPPED / "sm_90/pool_backward.json")}
        assert all(shipped[str(one.key)] == one.config for one in entries)

    def test_without_a_place_nothing_is_written(self, capsys, monkeypatch):
        def write(*_):
            raise AssertionError("somebody writes")

        monkeypatch.setattr(store, "write", write)
        assert self.tune("--json") == 0
        captured = capsys.readouterr()
        assert [len(entries) for entries in json.loads(captured.out)["kernels"].values()] == [4]
        assert "written nowhere: --out STORE names a place" in captured.err

    def test_a_dry_run_compiles_nothing(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(compilers.Compilers, "attempt", None)
        assert self.tune("max_pool2d", "--out", str(tmp_path), "--dry-run", "--json") == 0
        (layers,) = json.loads(capsys.readouterr().out)["layers"].values()
        assert len(layers) == 4
        assert cli.main(["tune", "--static", "--target", "sm_90", "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(int(line.split()[0]) for line in lines) == len(list(families.layers("sm_90")))
        assert not list(tmp_path.iterdir())

    def test_operators(self, capsys):
        assert self.tune("conv2d") == 2
        assert "no layer with 'pool_backward/resnet50-maxpool' in its name" in capsys.readouterr().err


def command(*options):
    fixed = ["bench", "static", "--target", "sm_90", "-k", "/pool/resnet50-maxpool-bf16-nhwc/"]
    return cli.main([*fixed, *options])


def test_the_command(tmp_path, capsys):
    path = tmp_path / "static.json"
    assert command("--baseline", str(path), "--update") == 0
    assert "1 kernels compiled" in capsys.readouterr().out
    assert command("--baseline", str(path), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (profile,) = document["profiles"].values()
    assert (document["triton"], document["faults"], document["new"]) == (static_profile.TRITON, {}, [])

    path.write_text(path.read_text().replace(f'"warps": {profile["warps"]}', '"warps": 64'))
    assert command("--baseline", str(path)) == 1
    assert f"occupancy: 64 -> {profile['warps']} warps" in capsys.readouterr().out
    assert command("--baseline", str(path), "--update") == 1
    assert command("--baseline", str(path), "--update", "--accept") == 0
    assert command("--baseline", str(path)) == 0


# --- compilers in processes of their own -----------------------------------------------------------------------------


class TestCompilers:
    """The real processes, on one layer."""

    @pytest.fixture
    def row(self):
        (row,) = static.rows(["sm_90"], "/pool/resnet50-maxpool-bf16-nhwc/0")
        return row

    def test_they_say_what_this_process_says(self, row):
        with compilers.Compilers(families.__name__) as pool:
            assert pool.attempt(row) == row.profile()

    def test_what_is_known_is_not_compiled_again(self, row, monkeypatch):
        with compilers.Compilers(families.__name__) as pool:
            first = pool.attempt(row)
        monkeypatch.setattr(compilers, "Child", None)
        with compilers.Compilers(families.__name__) as pool:
            assert pool.attempt(row) == first
        pool.profiles.path.write_text(pool.profiles.path.read_text() + '\n{"binary": "half a li')
        assert compilers.Profiles().find(row.binary) == first

    def test_what_was_read_in_another_way_is_not_believed(self, row):
        profiles = compilers.Profiles()
        old = profiles.path.with_name(f"triton-{static_profile.TRITON}-000000000000.jsonl")
        old.parent.mkdir(parents=True)
        old.write_text("")
        profiles.keep(row.binary, GOOD)
        assert [path.name for path in old.parent.iterdir()] == [profiles.path.name]

    def test_a_refusal_and_a_crash_are_one_line_and_the_next_compiles(self, row, monkeypatch):
        bad = dataclasses.replace(row, config=Config({**row.config, "BLOCK_C": 3}))  # not a power of two
        with compilers.Compilers(families.__name__) as pool:
            refused = pool.attempt(bad)
            assert refused.startswith("does not compile: ") and "\n" not in refused
            (child,) = pool.children
            os.kill(child.process.pid, signal.SIGKILL)
            assert pool.attempt(bad) == "does not compile: the compiler died of SIGKILL"
            assert pool.attempt(row) == row.profile()

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
    @pytest.mark.parametrize("words", [["bench", "static"], ["tune", "--static", "--target", "sm_90"]], ids=" ".join)
    def test_an_interrupt_is_one_line_at_once(self, words, number, tmp_path):
        """As a terminal sends it, to the whole group, while compilers run; what is done is kept, none of them stays."""
        env = {**os.environ, "PYTHONPATH": str(SOURCE), "TRITON_CACHE_DIR": str(tmp_path / "triton"),
               "TRITUNE_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}  # fmt: skip
        command = [sys.executable, "-m", "tritune", *words]
        if words[0] == "tune":
            command += ["--out", str(tmp_path / "out")]
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                end = time.monotonic() + 120
                first = "out/sm_90/*.json" if words[0] == "tune" else "cache/static/*.jsonl"
                while not list(tmp_path.glob(first)):
                    assert time.monotonic() < end and process.poll() is None
                    time.sleep(0.1)
                time.sleep(1)  # the next ones are under way
                started = time.monotonic()
                os.killpg(process.pid, number)
                out, err = process.communicate(timeout=30)
            finally:
                process.kill()
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        assert time.monotonic() - started < 1.5 * busy, "a second, on a machine that has nothing else to do"
        assert process.returncode == 130, err
        reports = re.compile(r"\d+/\d+  .+")  # where it stands, every few seconds
        (last,) = (line for line in err.splitlines() if not reports.fullmatch(line))
        assert last.startswith(f"tritune {words[0]}") and "interrupted" in last and "goes on from there" in last
        assert all(re.fullmatch(r"\w+/[\w.-]+: \w+=.*", line) for line in out.splitlines()), out
        assert processes_with(f"TRITUNE_CACHE_DIR={tmp_path / 'cache'}") == []
        if words[0] == "tune":
            kept = [store.load(path) for path in (tmp_path / "out/sm_90").glob("*.json")]
            assert sum(map(len, kept)) == len(out.splitlines()) >= 1


def processes_with(variable: str) -> list[str]:
    """Command lines of the processes that have inherited it; of one that has ended there is none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found
