"""Tuned configs: files, lookup order, memo; and the device table."""

from __future__ import annotations

import dataclasses
import json
import logging
import timeit
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch

from tritune.autotune import device as devices
from tritune.autotune import resolve, store
from tritune.autotune.config import Config, Estimate, Tunable

pytestmark = pytest.mark.torch
H200, H100, A100 = (devices.named(name) for name in ("h200", "h100", "a100"))


class Problem(NamedTuple):
    size: int
    dtype: str = "fp16"


CONFIGS = tuple(Config(BLOCK=block, num_warps=4, num_stages=2) for block in (64, 128, 256))
TUNABLE = Tunable(
    "toy", CONFIGS, lambda p: {"size": p.size, "dtype": p.dtype}, lambda p, c, d: max(64, p.size) >= c.BLOCK,
    lambda p, c, d: Estimate(abs(p.size - c.BLOCK), "memory"), lambda p, c: [],
)  # fmt: skip


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty stores: the user's and the shipped one."""
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path / "user"))
    resolve.clear_memo()
    yield tmp_path
    resolve.clear_memo()


def entry(size: int, block: int, dtype: str = "fp16", **more: Any) -> store.Entry:
    return store.Entry(
        {"size": size, "dtype": dtype}, Config(BLOCK=block, num_warps=4, num_stages=2), "measured", **more
    )


def put(folder: Any, slug: str, *entries: store.Entry) -> None:
    store.write(folder / slug / "toy.json", "toy", entries)
    resolve.clear_memo()


class TestLookup:
    def test_order(self, folders):
        """Each layer is found once the better ones are gone."""
        problem = Problem(1024)
        layers = [
            ("user", folders / "user", "nvidia_h200", entry(1024, 256)),
            ("shipped", folders / "shipped", "nvidia_h200", entry(1024, 128)),
            ("sibling", folders / "shipped", "nvidia_h100", entry(1024, 64)),
            ("target", folders / "shipped", "sm_90", entry(1024, 128)),
        ]
        for _, folder, slug, one in layers:
            put(folder, slug, one)
        for source, folder, slug, one in layers:
            choice = resolve.resolve(TUNABLE, problem, H200)
            assert (choice.source, choice.config) == (source, one.config)
            (folder / slug / "toy.json").unlink()
            resolve.clear_memo()
        assert resolve.resolve(TUNABLE, problem, H200).source == "model"

    def test_exact_entry_beats_a_nearer_layers_neighbour(self, folders):
        put(folders / "user", "nvidia_h200", entry(900, 64))
        put(folders / "shipped", "nvidia_h200", entry(1024, 256))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).source == "shipped"

    def test_nearest_by_doublings(self, folders):
        put(folders / "user", "nvidia_h200", entry(256, 64), entry(1024, 128), entry(8192, 256))
        assert resolve.resolve(TUNABLE, Problem(700), H200).config.BLOCK == 128
        assert resolve.resolve(TUNABLE, Problem(700), H200).distance == pytest.approx(0.5487, abs=1e-3)
        far = resolve.resolve(TUNABLE, Problem(1 << 20), H200)
        assert far.source == "model"

    def test_names_must_match_exactly(self, folders):
        put(folders / "user", "nvidia_h200", entry(1024, 256, dtype="fp32"))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).source == "model"

    def test_an_entry_must_serve_the_shape(self, folders):
        put(folders / "user", "nvidia_h200", entry(128, 256))
        assert resolve.resolve(TUNABLE, Problem(100), H200).config.BLOCK == 64

    def test_other_architecture_is_no_sibling(self, folders):
        put(folders / "shipped", "nvidia_a100", entry(1024, 256))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).source == "model"
        assert resolve.resolve(TUNABLE, Problem(1024), A100).source == "shipped"

    def test_another_version_of_the_parameters_is_ignored(self, folders):
        put(folders / "user", "nvidia_h200", entry(1024, 256, version=7))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).source == "model"

    def test_model_takes_the_lowest_estimate(self, folders):
        assert [resolve.resolve(TUNABLE, Problem(size), H200).config.BLOCK for size in (70, 130, 999)] == [64, 128, 256]

    def test_override(self, folders):
        forced = Config(BLOCK=7, num_warps=1, num_stages=1)
        with resolve.override(TUNABLE, forced):
            with resolve.override(TUNABLE, CONFIGS[0]):
                assert resolve.resolve(TUNABLE, Problem(1024), H200).config is CONFIGS[0]
            assert resolve.resolve(TUNABLE, Problem(1024), H200) == resolve.Choice(forced, "override")
        assert resolve.resolve(TUNABLE, Problem(1024), H200).source == "model"

    def test_assert_tuned(self, folders, monkeypatch):
        monkeypatch.setenv("TRITUNE_ASSERT_TUNED", "1")
        with pytest.raises(RuntimeError, match=r"toy.*1024"):
            resolve.resolve(TUNABLE, Problem(1024), H200)
        put(folders / "user", "nvidia_h200", entry(1024, 256))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).source == "user"

    def test_entry_of_another_triton_is_flagged(self, folders):
        put(folders / "user", "nvidia_h200", entry(1024, 256, extra={"env": {"triton": "3.1.0"}}))
        assert "made with Triton 3.1.0" in resolve.resolve(TUNABLE, Problem(1024), H200).note

    def test_memo_hit_is_cheap_and_bounded(self, folders):
        from tritune.kernels import conv

        geometry = conv.Geometry.of((1, 1), (1, 1), (1, 1), 1)
        image, window = (1, 56, 56), (1, 3, 3)
        problem = conv.ConvProblem(2, 32, 64, 64, image, window, image, geometry, torch.bfloat16, "16")
        resolve.resolve(conv.FORWARD, problem, H200)
        seconds = (
            min(timeit.repeat(lambda: resolve.resolve(conv.FORWARD, problem, H200), number=2000, repeat=20)) / 2000
        )
        plain = min(timeit.repeat(lambda: hash(problem), number=2000, repeat=20)) / 2000
        assert seconds < max(1e-6, 6 * plain), f"{seconds * 1e6:.2f} us for a memo hit"
        for size in range(resolve.MEMO_LIMIT + 10):
            resolve.resolve(TUNABLE, Problem(size), H200)
        assert len(resolve._memo) <= resolve.MEMO_LIMIT


class TestRejected:
    def test_any_declared_kind_of_config_counts(self):
        """A kernel for two layouts has two kinds of tiles; an entry of either is one of its own."""
        other = Config(TILE=4, num_warps=1, num_stages=1)
        both = dataclasses.replace(TUNABLE, configs=(*TUNABLE.configs, other))
        mine = store.Entry({"size": 8}, other, "model", TUNABLE.version)
        assert mine.rejected(both) == ""
        assert mine.rejected(TUNABLE).startswith("its parameters are TILE, num_warps, num_stages, the kernel has ")


class TestFiles:
    def test_round_trip_keeps_unknown_fields(self, tmp_path):
        path = tmp_path / "toy.json"
        one = entry(1024, 256, us=4.5, torch_us=9.0, extra={"env": {"triton": "3.7.1"}, "later": [1, 2]})
        store.write(path, "toy", [one])
        assert store.load(path) == (one,)
        assert json.loads(path.read_text())["entries"][0]["later"] == [1, 2]

    def test_one_entry_a_line_sorted(self, tmp_path):
        path = tmp_path / "toy.json"
        store.write(path, "toy", [entry(8, 64), entry(4, 64)])
        store.write(path, "toy", [entry(2, 64), entry(8, 128)])
        lines = path.read_text().splitlines()
        assert len(lines) == 5 and '"size": 2' in lines[1] and '"BLOCK": 128' in lines[3]

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99, "entries": []}', '{"schema": 1}'])
    def test_a_corrupt_file_is_one_warning(self, folders, caplog, text):
        path = folders / "user" / "nvidia_h200" / "toy.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        with caplog.at_level(logging.WARNING, logger="tritune"):
            for size in (1024, 2048):
                assert resolve.resolve(TUNABLE, Problem(size), H200).source == "model"
        assert len(caplog.records) == 1 and "toy.json" in caplog.text

    def test_a_corrupt_entry_leaves_the_others(self, tmp_path, caplog):
        path = tmp_path / "toy.json"
        store.write(path, "toy", [entry(1024, 256)])
        document = json.loads(path.read_text())
        document["entries"] += [{"key": {}}, {"key": {"size": None}, "config": {}, "source": "x"}, 7]
        path.write_text(json.dumps(document))
        store.clear()
        with caplog.at_level(logging.WARNING, logger="tritune"):
            assert [one.config.BLOCK for one in store.load(path)] == [256]
        assert len(caplog.records) == 3

    def test_concurrent_writers_lose_nothing(self, tmp_path):
        path = tmp_path / "toy.json"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda size: store.write(path, "toy", [entry(size, 64)]), range(1, 41)))
        store.clear()
        assert len(store.load(path)) == 40
        assert not list(tmp_path.glob("*.tmp"))

    def test_user_folders(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
        monkeypatch.setenv("TRITUNE_CACHE_DIR", str(tmp_path / "cache"))
        assert store.user_paths() == [tmp_path / "a", tmp_path / "b", tmp_path / "cache" / "configs"]


class TestDevices:
    @pytest.mark.parametrize("name, slug", [("h200", "nvidia_h200"), ("NVIDIA-H100", "nvidia_h100"),
                                            ("sm_80", "nvidia_a100"), ("gfx942", "amd_mi300x")])  # fmt: skip
    def test_names(self, name, slug):
        assert devices.named(name).slug == slug

    def test_unknown_name_lists_the_known(self):
        with pytest.raises(ValueError, match="nvidia_h200"):
            devices.named("voodoo2")

    def test_override(self, monkeypatch):
        monkeypatch.setenv("TRITUNE_DEVICE", "a100")
        assert devices.detect(torch.device("cpu")) is A100

    def test_every_target_stands_for_a_device_of_its_own(self):
        assert all(devices.DEVICES[slug].target == target for target, slug in devices.TARGETS.items())
