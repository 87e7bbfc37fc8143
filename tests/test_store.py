"""Tuned configs: files, lookup order, memo; and the device table."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import damage
import pytest
import torch

from tritune import doctor
from tritune.autotune import device as devices
from tritune.autotune import resolve, schema, store
from tritune.autotune.config import Config, Estimate, Tunable

pytestmark = pytest.mark.torch
H200, H100, A100 = (devices.named(name) for name in ("h200", "h100", "a100"))


class Problem(NamedTuple):
    size: int
    dtype: str = "fp16"


CONFIGS = tuple(Config(BLOCK=block, num_warps=4, num_stages=2) for block in (64, 128, 256))
TUNABLE = Tunable(
    "toy", CONFIGS, lambda p: {"size": p.size, "dtype": p.dtype}, lambda p, c, d: max(64, p.size) >= c.BLOCK,
    lambda p, c, d: Estimate(abs(p.size - c.BLOCK), "memory"), lambda p, c: [], moved_bytes=lambda p, c: 1.0,
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
        """Each place is asked once the nearer ones have nothing."""
        layers = [
            ("user", folders / "user", "nvidia_h200", 256),
            ("shipped", folders / "shipped", "nvidia_h200", 128),
            ("user", folders / "user", "nvidia_h100", 64),
            ("sibling", folders / "shipped", "nvidia_h100", 256),
            ("user", folders / "user", "sm_90", 128),
            ("target", folders / "shipped", "sm_90", 64),
        ]
        for _, folder, slug, block in layers:
            put(folder, slug, entry(1024, block))
        for place, folder, slug, block in layers:
            choice = resolve.resolve(TUNABLE, Problem(1024), H200)
            assert (choice.place, choice.slug, choice.config.BLOCK, choice.origin) == (place, slug, block, "measured")
            (folder / slug / "toy.json").unlink()
            resolve.clear_memo()
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"

    def test_every_file_that_is_listed_is_read(self, folders):
        """What ``configs list`` shows of a device is what its calls ask."""
        for folder in ("user", "shipped"):
            for slug in ("nvidia_h200", "nvidia_h100", "sm_90"):
                put(folders / folder, slug, entry(1024, 256))
        asked = [path for _, path, _ in store.layers("toy", H200)]
        assert {path for _, path in store.files()} <= set(asked)

    def test_exact_entry_beats_a_nearer_layers_neighbour(self, folders):
        put(folders / "user", "nvidia_h200", entry(900, 64))
        put(folders / "shipped", "nvidia_h200", entry(1024, 256))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "shipped"

    def test_nearest_by_doublings(self, folders):
        put(folders / "user", "nvidia_h200", entry(256, 64), entry(1024, 128), entry(8192, 256))
        assert resolve.resolve(TUNABLE, Problem(700), H200).config.BLOCK == 128
        assert resolve.resolve(TUNABLE, Problem(700), H200).distance == pytest.approx(math.log2(1024 / 700))
        far = resolve.resolve(TUNABLE, Problem(1 << 20), H200)
        assert far.place == "none"

    def test_names_must_match_exactly(self, folders):
        put(folders / "user", "nvidia_h200", entry(1024, 256, dtype="fp32"))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"

    def test_the_first_name_of_origin_is_still_read(self, folders):
        put(folders / "user", "nvidia_h200", entry(1024, 256))
        path = folders / "user/nvidia_h200/toy.json"
        path.write_text(path.read_text().replace('"origin"', '"source"'))
        resolve.clear_memo()
        assert resolve.resolve(TUNABLE, Problem(1024), H200).origin == "measured"
        store.write(path, "toy", [entry(64, 64)])
        assert [one.origin for one in store.load(path, "toy")] == ["measured", "measured"]

    @pytest.mark.parametrize("old", ["float16", "torch.float16"])
    def test_the_first_spellings_of_a_dtype_are_still_read(self, old, folders):
        put(folders / "user", "nvidia_h200", entry(1024, 256, dtype=old))
        path = folders / "user/nvidia_h200/toy.json"
        assert f'"{old}"' in path.read_text()
        choice = resolve.resolve(TUNABLE, Problem(1024), H200)
        assert (choice.place, choice.config.BLOCK, choice.distance) == ("user", 256, 0.0)
        assert [one.key for one in store.load(path, "toy")] == [{"size": 1024, "dtype": "fp16"}]
        put(folders / "user", "nvidia_h200", entry(64, 64))
        assert f'"{old}"' in path.read_text(), "what is written beside an entry leaves it as it is"
        put(folders / "user", "nvidia_h200", entry(1024, 128))
        assert f'"{old}"' not in path.read_text(), "a new entry takes the place of one with the same key"
        assert resolve.resolve(TUNABLE, Problem(1024), H200).config.BLOCK == 128

    def test_names_that_are_no_dtype_stay(self, folders):
        key = {"window": "3x3", "bias": "None", "stride": "", "cell": "lstm", "precision": "ieee"}
        assert store.Entry.from_json({"key": key, "config": {"BLOCK": 64}, "origin": "model"}).key == key

    def test_the_origin_where_nothing_is_stored(self, folders):
        """The model ranked the configs, or saw no difference: then the order of declaration is the rule."""
        choice = resolve.resolve(TUNABLE, Problem(128), H200)
        assert (choice.place, choice.origin, choice.config.BLOCK) == ("none", "model", 128)
        alike = dataclasses.replace(TUNABLE, name="alike", estimate=lambda p, c, d: Estimate(1.0, "memory"))
        choice = resolve.resolve(alike, Problem(128), H200)
        assert (choice.place, choice.origin, choice.config) == ("none", "rule", CONFIGS[0])
        assert str(choice).endswith("  [rule, nothing stored]")
        choice = resolve.resolve(TUNABLE, Problem(1), H200)  # served by one config alone
        assert (choice.origin, choice.config) == ("rule", CONFIGS[0])

    def test_an_entry_must_serve_the_shape(self, folders):
        put(folders / "user", "nvidia_h200", entry(128, 256))
        assert resolve.resolve(TUNABLE, Problem(100), H200).config.BLOCK == 64

    def test_other_architecture_is_no_sibling(self, folders):
        put(folders / "shipped", "nvidia_a100", entry(1024, 256))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"
        assert resolve.resolve(TUNABLE, Problem(1024), A100).place == "shipped"

    def test_another_version_of_the_parameters_is_ignored(self, folders):
        put(folders / "user", "nvidia_h200", entry(1024, 256, version=7))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"

    def test_times_of_a_rehearsal_or_a_model_are_none(self, folders):
        for origin in ("model", "rehearsed"):
            put(folders / "user", "nvidia_h200", dataclasses.replace(entry(1024, 256, us=1, torch_us=2), origin=origin))
            choice = resolve.resolve(TUNABLE, Problem(1024), H200)
            assert (choice.place, choice.origin, choice.us, choice.torch_us) == ("user", origin, None, None)

    def test_model_takes_the_lowest_estimate(self, folders):
        assert [resolve.resolve(TUNABLE, Problem(size), H200).config.BLOCK for size in (70, 130, 999)] == [64, 128, 256]

    def test_override(self, folders):
        forced = Config(BLOCK=7, num_warps=1, num_stages=1)
        with resolve.override(TUNABLE, forced):
            with resolve.override(TUNABLE, CONFIGS[0]):
                assert resolve.resolve(TUNABLE, Problem(1024), H200).config is CONFIGS[0]
            assert resolve.resolve(TUNABLE, Problem(1024), H200) == resolve.Choice(forced, "none", "override")

    def test_overrides_of_two_threads_end_in_any_order(self, folders):
        def config() -> Config:
            return resolve.resolve(TUNABLE, Problem(1024), H200).config

        alone = config()
        one, other = (resolve.override(TUNABLE, config) for config in CONFIGS[:2])
        one.__enter__()
        other.__enter__()
        assert config() == CONFIGS[1]
        one.__exit__(None, None, None)
        assert config() == CONFIGS[1]
        other.__exit__(None, None, None)
        assert config() == alone
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"

    def test_assert_tuned(self, folders, monkeypatch):
        monkeypatch.setenv("TRITUNE_ASSERT_TUNED", "1")
        with pytest.raises(RuntimeError, match=r"toy.*1024.*nothing is stored"):
            resolve.resolve(TUNABLE, Problem(1024), H200)
        for folder, slug, one in [
            ("user", "nvidia_h200", dataclasses.replace(entry(1024, 256), origin="model")),
            ("user", "nvidia_h200", entry(1000, 256)),
            ("user", "nvidia_h100", entry(1024, 256)),
            ("shipped", "sm_90", entry(1024, 256)),
        ]:
            put(folders / folder, slug, one)
            with pytest.raises(RuntimeError, match=rf"toy.*1024.*there is BLOCK=256.*{slug}"):
                resolve.resolve(TUNABLE, Problem(1024), H200)
            (folders / folder / slug / "toy.json").unlink()
        put(folders / "user", "nvidia_h200", entry(1024, 256))
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "user"

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


OPTIONS = {"num_warps": 4, "num_stages": 2}


class TestDeclared:
    """A config runs only if the declared space holds it."""

    @pytest.mark.parametrize(
        "config, words",
        [
            ({"BLOCK": -16, **OPTIONS}, "config is {'BLOCK': -16, "),
            ({"BLOCK": 10**400, **OPTIONS}, "config is {'BLOCK': 1000"),
            ({"BLOCK": True, **OPTIONS}, "config is {'BLOCK': True, "),
            ({"BLOCK": 256.0, **OPTIONS}, "config is {'BLOCK': 256.0, "),
            ({"BLOCK": "256", **OPTIONS}, "config is {'BLOCK': '256', "),
            ({"BLOCK": 0, **OPTIONS}, "the kernel has no config with BLOCK=0"),
            ({"BLOCK": 512, **OPTIONS}, "the kernel has no config with BLOCK=512"),
            ({"BLOCK": 256, "num_warps": 3, "num_stages": 2}, "the kernel has no config with num_warps=3"),
            ({"BLOCK": 256, "SPLIT": 1, **OPTIONS}, "its parameters are BLOCK, SPLIT, num_warps, num_stages, the kern"),
            ({"BLOCK": 256, "num_warps": 4}, "its parameters are BLOCK, num_warps, the kernel has BLOCK, num_warps, n"),
            ({}, "its parameters are , the kernel has BLOCK, num_warps, num_stages"),
            ({"BLOCK": 32, **OPTIONS}, "the kernel has no config BLOCK=32 num_warps=4 num_stages=2"),
        ],
    )  # fmt: skip
    def test_the_next_source_is_asked(self, folders, caplog, config, words):
        """One warning for any number of calls, with file and line, and the next place serves."""
        both = dataclasses.replace(TUNABLE, configs=(*CONFIGS, Config(BLOCK=32, num_warps=8, num_stages=2)))
        put(folders / "shipped", "nvidia_h200", entry(1024, 128))
        path = folders / "user/nvidia_h200/toy.json"
        path.parent.mkdir(parents=True)
        one = {"key": {"size": 1024, "dtype": "fp16"}, "config": config, "origin": "measured"}
        path.write_text('{"schema": 1, "kernel": "toy", "entries": [\n' + json.dumps(one) + "\n]}")
        with caplog.at_level(logging.WARNING, logger="tritune"):
            for size in (1024, 1025, 1026):
                assert resolve.resolve(both, Problem(size), H200)[:2] == (CONFIGS[1], "shipped")
        (record,) = caplog.records
        assert record.getMessage().startswith(f"ignoring an entry in {path}, line 2: {words}")

    def test_any_declared_kind_of_config_counts(self):
        """A kernel for two layouts has two kinds of tiles; an entry of either is one of its own."""
        other = Config(TILE=4, num_warps=1, num_stages=1)
        both = dataclasses.replace(TUNABLE, configs=(*TUNABLE.configs, other))
        mine = store.Entry({"size": 8}, other, "model", TUNABLE.version)
        assert mine.rejected(both) == ""
        assert mine.rejected(TUNABLE).startswith("its parameters are TILE, num_warps, num_stages, the kernel has ")

    @pytest.mark.slow
    def test_every_parameter_of_every_kernel(self, folders):
        """An exact entry for a real layer, with one parameter changed to what the kernel does not declare."""
        pytest.importorskip("triton")
        from tritune.perf.families import layers

        seen = set()
        for _, tunable, problem in layers("sm_90"):
            if tunable.name in seen:
                continue
            seen.add(tunable.name)
            best, _ = resolve.ranked(tunable, problem, H200)[0]
            for name in best:
                declared = {one.get(name) for one in tunable.configs}
                for value in {0, 3, 2**20} - declared:
                    wrong = Config({**best, name: value})
                    assert not tunable.holds(problem, wrong, H200)
                    one = store.Entry(tunable.features(problem), wrong, "measured", tunable.version)
                    store.write(folders / f"user/nvidia_h200/{tunable.name}.json", tunable.name, [one])
                    resolve.clear_memo()
                    assert resolve.resolve(tunable, problem, H200)[:2] == (best, "none")
        from tritune.kernels import registered

        assert seen == registered().keys()

    def test_what_ships(self):
        """Every shipped entry passes the schema, and its kernel declares its config."""
        pytest.importorskip("triton")
        from tritune.kernels import registered

        shipped = sorted(store.SHIPPED.glob("*/*.json"))
        assert len(shipped) > 100
        for path in shipped:
            file = store.contents(path)
            assert (file.kernel, file.problems, file.fields) == (path.stem, (), {})
            assert [one.rejected(registered()[path.stem]) for one in file.entries] == [""] * len(file.entries)

    def test_keys_of_every_kernel_can_be_written(self):
        """A kernel whose features the schema does not hold would be tuned in vain."""
        pytest.importorskip("triton")
        from tritune.perf.families import layers

        for _, tunable, problem in layers("sm_90"):
            written = store.Entry(tunable.features(problem), tunable.configs[0], "measured", tunable.version)
            assert store.Entry.from_text(written.to_text()) == written


def file_with(folder: Any, data: bytes) -> Any:
    """The user's file for the H200."""
    path = folder / "user" / "nvidia_h200" / "toy.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    resolve.clear_memo()
    return path


class TestReading:
    @pytest.mark.parametrize("data", damage.UNREADABLE.values(), ids=damage.UNREADABLE)
    def test_a_corrupt_file_is_one_warning(self, folders, caplog, data):
        path = file_with(folders, data)
        with caplog.at_level(logging.WARNING, logger="tritune"):
            for size in (512, 1024, 2048):
                assert resolve.resolve(TUNABLE, Problem(size), H200).place == "none"
        (record,) = caplog.records
        assert record.getMessage().startswith(f"ignoring the tuned configs in {path}: ")
        assert "\n" not in record.getMessage() and len(record.getMessage()) < len(str(path)) + 300

    @pytest.mark.parametrize("place", damage.NO_FILES)
    def test_what_is_no_file_is_one_warning(self, folders, caplog, place):
        path = file_with(folders, b"")
        path.unlink()
        place(path)
        with caplog.at_level(logging.WARNING, logger="tritune"):
            for size in (512, 1024):
                assert resolve.resolve(TUNABLE, Problem(size), H200).place == "none"
        assert len(caplog.records) == 1

    def test_a_huge_file_is_not_read(self, folders, caplog):
        path = file_with(folders, damage.WHOLE)
        os.truncate(path, store.LARGEST_FILE + 1)
        with caplog.at_level(logging.WARNING, logger="tritune"):
            assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"
        assert "larger than 16 MiB" in caplog.text

    def test_a_file_for_another_kernel(self, folders, caplog):
        file_with(folders, damage.WHOLE.replace(b'"toy"', b'"ball"'))
        with caplog.at_level(logging.WARNING, logger="tritune"):
            assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"
        assert "it holds configs of ball" in caplog.text and len(caplog.records) == 1

    @pytest.mark.parametrize("value", damage.VALUES, ids=lambda value: value[:12])
    @pytest.mark.parametrize("name", schema.FIELDS)
    def test_every_field_with_every_value(self, folders, caplog, name, value):
        """Either the schema refuses it, in one warning that names the line, or everything works with it."""
        marked = {**damage.ENTRIES[0], name: "HERE"}
        text = json.dumps(marked).replace('"HERE"', value)
        path = file_with(folders, damage.WHOLE.replace(json.dumps(damage.ENTRIES[0]).encode(), text.encode()))
        with caplog.at_level(logging.WARNING, logger="tritune"):
            assert resolve.resolve(TUNABLE, Problem(512), H200).config in TUNABLE.space
            assert resolve.resolve(TUNABLE, Problem(1024), H200).config.BLOCK == 128, "the others are as they were"
        assert len(caplog.records) <= 1
        assert all(f"ignoring an entry in {path}, line 2: " in record.getMessage() for record in caplog.records)
        for one in store.load(path):
            assert [one.staleness(), one.rejected(TUNABLE), one.to_text()]
            assert one.us is None or 0 < one.us < float("inf")
        store.write(path, "toy", [entry(7, 64)])
        assert value in path.read_text()

    @pytest.mark.parametrize(
        "name, value",
        [
            ("us", "0"), ("us", "-16"), ("us", "NaN"), ("us", "1e400"), ("us", '"x"'), ("us", "null"), ("us", "true"),
            ("torch_us", "-Infinity"), ("env", "null"), ("env", '"x"'), ("env", '{"gpu": 3}'), ("key", "[]"),
            ("key", '{"size": 1' + 400 * "0" + "}"), ("key", '{"size": -3}'), ("key", '{"size": true}'),
            ("key", '{"size": 1.5}'), ("key", r'{"dtype": "\u001b[2J"}'), ("key", r'{"dtype": "\ud800"}'),
            ("key", '{"size": 1, "size": 2}'), ("config", "null"), ("config", '{"BLOCK": "64"}'), ("version", '"1"'),
            ("version", "true"), ("origin", '"guessed"'), ("origin", "[]"), ("unfinished", "1"), ("counts", "[]"),
            ("later", 30 * "[" + 30 * "]"), ("later", "NaN"),
        ],
    )  # fmt: skip
    def test_refused(self, name, value):
        text = json.dumps({**damage.ENTRIES[0], name: "HERE"}).replace('"HERE"', value)
        with pytest.raises(ValueError, match=rf"^{name} is |is nested too|has two values|is not a number|is too large"):
            store.Entry.from_text(text)

    @pytest.mark.parametrize("name", schema.REQUIRED)
    def test_required(self, name):
        rest = {field: value for field, value in damage.ENTRIES[0].items() if field != name}
        with pytest.raises(ValueError, match=f"it has no {name}"):
            store.Entry.from_json(rest)

    def test_a_corrupt_entry_leaves_the_others(self, folders, caplog):
        """Lines are those of the file, however it is laid out."""
        path = file_with(folders, damage.WHOLE.replace(b"\n]}", b',\n7,\n\n{"key": {}}, 8\n]}'))
        with caplog.at_level(logging.WARNING, logger="tritune"):
            assert [one.line for one in store.load(path)] == [2, 3, 4]
        lines = [record.getMessage().partition(", ")[2].partition(":")[0] for record in caplog.records]
        assert lines == ["line 5", "line 7", "line 7"]

    def test_a_file_of_nothing_else_is_few_warnings_and_quick(self, folders, caplog):
        count = 200_000
        path = file_with(folders, b'{"schema": 1, "entries": [\n' + b",\n".join([b"7"] * count) + b"\n]}")
        started = time.monotonic()
        with caplog.at_level(logging.WARNING, logger="tritune"):
            assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"
        assert time.monotonic() - started < 20
        assert len(caplog.records) == store.MOST_WARNINGS + 1
        assert caplog.records[-2].getMessage().startswith(f"ignoring an entry in {path}, line 21: ")
        assert caplog.records[-1].getMessage() == f"ignoring {count - 20} more entries in {path}"

    def test_the_first_of_two_entries_for_a_key_counts(self, folders, caplog):
        again = json.dumps({**damage.ENTRIES[0], "config": {**damage.TOY, "BLOCK": 256}}).encode()
        path = file_with(folders, damage.WHOLE.replace(b"\n]}", b",\n" + again + b"\n]}"))
        with caplog.at_level(logging.WARNING, logger="tritune"):
            assert resolve.resolve(TUNABLE, Problem(512), H200).config.BLOCK == 64
        assert "line 5: an earlier one has its key" in caplog.text
        store.write(path, "toy", [entry(8, 64)])
        assert again in path.read_bytes()

    def test_layout_does_not_matter(self, folders):
        path = file_with(folders, damage.WHOLE)
        store.write(path, "toy", [])
        plain = store.contents(path).entries  # in the order of a file of ours
        document = json.loads(damage.WHOLE)
        for text in (json.dumps(document, indent=2), json.dumps(document, separators=(",", ":")).replace(",", ",\r\n")):
            path = file_with(folders, b"\xef\xbb\xbf" + text.encode())
            assert set(map(str, store.contents(path).entries)) == set(map(str, plain))
            store.write(path, "toy", [])
            assert store.contents(path).entries == plain
            assert len(path.read_text().splitlines()) == 5


def on_one_line(texts: Any) -> str:
    return re.sub(r"(\\n| )+", " ", repr(texts))


class TestDamage:
    """Any file at all: a call gets a declared config, and the next write loses nothing."""

    @pytest.mark.parametrize("start", range(0, 2400, 300))
    def test_damaged_files(self, folders, caplog, start, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda fd: None)
        outcomes = set()
        for seed in range(start, start + 300):
            data = damage.damaged(seed)
            path = file_with(folders, data)
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="tritune"):
                for size in (1, 512, 1024, 2048, 4096):
                    assert resolve.resolve(TUNABLE, Problem(size), H200).config in TUNABLE.space, seed
            warned = len(caplog.records)
            before = store.contents(path)
            assert len(before.problems) <= warned <= len(before.entries) + len(before.problems) + 1
            new = entry(77, 128)
            store.write(path, "toy", [new])
            after = store.contents(path)
            assert new in after.entries
            asides = list(path.parent.glob("toy.json.set-aside-*"))
            if asides:
                assert [one.read_bytes() for one in asides] == [data]
                asides[0].unlink()
            else:
                kept = {**after.texts, **before.texts}, before.strange, before.fields
                assert on_one_line(kept) == on_one_line((after.texts, after.strange, after.fields))
            outcomes.add((bool(asides), len(before.entries)))
        assert {(True, 0), (False, 2), (False, 3)} <= outcomes, "the damage is of many kinds"


class TestWriting:
    @pytest.mark.parametrize("data", damage.UNREADABLE.values(), ids=damage.UNREADABLE)
    def test_what_cannot_be_extended_is_set_aside(self, folders, caplog, data):
        """Under a name of its own, each time, with one warning."""
        path = file_with(folders, data)
        for number in (1, 2):
            caplog.clear()
            path.write_bytes(data)
            with caplog.at_level(logging.WARNING, logger="tritune"):
                store.write(path, "toy", [entry(8, 64)])
            aside = path.with_name(f"toy.json.set-aside-{number}")
            assert aside.read_bytes() == data
            assert len(caplog.records) == 1 and f"is kept in {aside}: " in caplog.text
            assert store.load(path) == (entry(8, 64),)
        assert len(list(path.parent.glob("*set-aside*"))) == 2

    def test_another_kernels_file_is_set_aside(self, folders):
        path = file_with(folders, damage.WHOLE.replace(b'"toy"', b'"ball"'))
        store.write(path, "toy", [entry(8, 64)])
        assert b'"ball"' in path.with_name("toy.json.set-aside-1").read_bytes()
        assert store.load(path, "toy") == (entry(8, 64),)

    def test_what_is_not_understood_stays(self, folders):
        """A newer version's fields, in the file and in entries, and entries that cannot be used."""
        strange = [b'{"key": {"size": 1e400}, "config": {}}', b'"\\u0000"', b"[[1, 1.10]]", b"7", b'{"a": 1, "a": 2}']
        path = file_with(folders, damage.WHOLE.replace(b"\n]}", b",\n" + b",\n".join(strange) + b'\n], "b": 1.10}'))
        for size in (8, 16):
            store.write(path, "toy", [entry(size, 64)])
        lines = [line.rstrip(b",") for line in path.read_bytes().splitlines()]
        assert lines[0] == b'{"schema": 1, "kernel": "toy", "note": ["kept"], "b": 1.10, "entries": ['
        assert lines[-6:-1] == strange
        assert {json.dumps(one).encode() for one in damage.ENTRIES} < set(lines)

    def test_only_the_line_that_is_written_changes(self):
        """What ships was written by the same code, so an entry more is a line more in a diff."""
        for shipped in sorted(store.SHIPPED.glob("*/conv*.json")):
            text = shipped.read_text()
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / shipped.name
                copy.write_text(text)
                store.write(copy, shipped.stem, [store.load(shipped)[0]])
                assert copy.read_text() == text

    def test_an_entry_that_could_not_be_read_again_is_not_written(self, folders):
        path = file_with(folders, damage.WHOLE)
        wrong = (entry(8, 64, us=float("nan")), entry(8, -64), entry(8, 64, extra={"env": {"gpu": 3}}))
        for one, words in zip(wrong, ("NaN", "config", "env"), strict=True):
            with pytest.raises(ValueError, match=f"^{words} is "):
                store.write(path, "toy", [entry(16, 64), one])
        assert path.read_bytes() == damage.WHOLE

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

    def test_concurrent_writers_lose_nothing(self, tmp_path):
        path = tmp_path / "toy.json"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda size: store.write(path, "toy", [entry(size, 64)]), range(1, 41)))
        store.clear()
        assert len(store.load(path)) == 40
        assert not list(tmp_path.glob("*.tmp"))

    @pytest.mark.slow
    def test_processes_at_once_lose_nothing(self, tmp_path):
        """Two writers, and a file that cannot be read when the first of them comes."""
        path = tmp_path / "toy.json"
        path.write_text("{")
        code = """
import sys
from pathlib import Path
from tritune.autotune import store
for size in range(int(sys.argv[2]), int(sys.argv[2]) + 40):
    config = store.Config(BLOCK=64, num_warps=4, num_stages=2)
    store.write(Path(sys.argv[1]), "toy", [store.Entry({"size": size, "dtype": "fp16"}, config, "measured")])
"""
        both = [subprocess.Popen([sys.executable, "-c", code, str(path), str(start)]) for start in (1, 1001)]
        assert [process.wait(120) for process in both] == [0, 0]
        assert len(store.load(path)) == 80
        assert sorted(one.name for one in tmp_path.iterdir()) == ["toy.json", "toy.json.lock", "toy.json.set-aside-1"]


class TestFiles:
    @pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
    def test_a_new_file_has_the_mode_that_the_umask_says(self, tmp_path, umask):
        previous = os.umask(umask)
        try:
            store.write(tmp_path / "toy.json", "toy", [entry(8, 64)])
        finally:
            os.umask(previous)
        assert {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()} == {0o666 & ~umask}

    def test_a_file_keeps_its_mode(self, tmp_path):
        path = tmp_path / "toy.json"
        store.write(path, "toy", [entry(8, 64)])
        path.chmod(0o640)
        store.write(path, "toy", [entry(16, 64)])
        assert stat.S_IMODE(path.stat().st_mode) == 0o640 and len(store.load(path)) == 2

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_link_is_followed_and_stays(self, tmp_path, exists):
        target = tmp_path / "elsewhere" / "team.json"
        if exists:
            store.write(target, "toy", [entry(8, 64)])
        link = tmp_path / "toy.json"
        link.symlink_to("elsewhere/team.json")
        store.load(link)
        store.write(link, "toy", [entry(16, 64)])
        assert link.is_symlink() and store.load(link) == store.load(target)
        assert len(store.load(target)) == 1 + exists

    @pytest.mark.parametrize("place", damage.NO_FILES)
    def test_what_is_no_file_is_refused(self, tmp_path, place):
        path = tmp_path / "toy.json"
        place(path)
        with pytest.raises(OSError, match=r"(toy\.json|/dev/zero) is a .*, not a file$|Too many levels"):
            store.write(path, "toy", [entry(8, 64)])
        assert not path.is_file() and os.path.lexists(path)
        assert not list(tmp_path.glob("*set-aside*"))

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make a file")
    def test_a_lock_that_cannot_be_made_fails_at_once(self):
        started = time.monotonic()
        with pytest.raises(OSError, match=r"^/proc/toy.json is not written, for /proc/toy.json.lock cannot be made: "):
            store.write(Path("/proc/toy.json"), "toy", [entry(8, 64)])
        assert time.monotonic() - started < 2

    def test_a_lock_that_another_holds_is_not_waited_for_without_end(self, tmp_path, monkeypatch):
        from filelock import FileLock

        monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
        with FileLock(tmp_path / "toy.json.lock"), ThreadPoolExecutor(1) as pool:
            fault = pool.submit(store.write, tmp_path / "toy.json", "toy", [entry(8, 64)]).exception()
        assert isinstance(fault, OSError)
        assert re.search(r"toy\.json is not written: another process has held .* for 0 s$", str(fault))

    def test_a_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "sm_90").touch()
        with pytest.raises(OSError, match="sm_90"):
            store.write(tmp_path / "sm_90/toy.json", "toy", [entry(8, 64)])

    def test_leftovers_are_swept(self, tmp_path):
        """Of killed runs, an hour old, and only files that are named as ours."""
        old = ["tmpab12_xyz.tmp", "toy.json.0123abcd.tmp", "conv.json.0123abcd.tmp"]
        others = ["notes.tmp", "tmpab12_xyz.txt", "toy.json.set-aside-1", "toy.json.0123abcd.tmp.bak"]
        for name in (*old, *others):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (1, 1))
        (tmp_path / "tmpffffffff.tmp").mkdir()
        (tmp_path / "toy.json.ffffffff.tmp").touch()  # somebody writes it now
        store.write(tmp_path / "toy.json", "toy", [entry(8, 64)])
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {*others, "tmpffffffff.tmp", "toy.json.ffffffff.tmp", "toy.json", "toy.json.lock"}

    def test_a_temporary_file_is_named_so_that_it_is_swept(self, tmp_path, monkeypatch):
        """A process that is killed between writing and replacing."""
        monkeypatch.setattr(os, "replace", lambda source, target: made.append(Path(source).name))
        made: list[str] = []
        store.write(tmp_path / "toy.json", "toy", [entry(8, 64)])
        assert store.LEFTOVERS.fullmatch(made[0]) and (tmp_path / made[0]).exists()

    def test_a_write_that_fails_leaves_all_as_it_was(self, tmp_path, monkeypatch):
        path = tmp_path / "toy.json"
        store.write(path, "toy", [entry(8, 64)])
        before = path.read_bytes()

        def full(fd: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.write(path, "toy", [entry(16, 64)])
        assert path.read_bytes() == before
        assert sorted(one.name for one in tmp_path.iterdir()) == ["toy.json", "toy.json.lock"]


@pytest.fixture
def ordinary_user():
    """As root every folder is open: until the test ends this process has the rights of nobody."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


class TestUsersLayer:
    def test_user_folders(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
        monkeypatch.setenv("TRITUNE_CACHE_DIR", str(tmp_path / "cache"))
        assert store.user_paths() == [tmp_path / "a", tmp_path / "b", tmp_path / "cache" / "configs"]

    def test_no_home(self, folders, monkeypatch):
        """The user of a container may be in no list of users: what ships serves, and a command says what to set."""
        for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "TRITUNE_CACHE_DIR", "TRITUNE_CONFIG_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
        put(folders / "shipped", "nvidia_h200", entry(1024, 256))
        assert store.user_paths() == []
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "shipped"
        assert [layer for layer, _ in store.files()] == ["shipped"]
        with pytest.raises(OSError, match="set TRITUNE_CACHE_DIR"):
            store.cache_dir()
        _, problems, _ = doctor.examine()
        assert any("set TRITUNE_CACHE_DIR" in problem for problem in problems)

    @pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME", "TRITUNE_CACHE_DIR"])
    def test_a_closed_folder(self, folders, monkeypatch, caplog, variable, request):
        """Nothing of the user's is there, and nothing is complained of at a call."""
        closed = folders / "closed"
        closed.mkdir(mode=0)
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "TRITUNE_CACHE_DIR", "TRITUNE_CONFIG_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(variable, str(closed))
        monkeypatch.setattr(store, "SHIPPED", folders / "nothing")
        request.getfixturevalue("ordinary_user")
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"
        assert not caplog.records
        with pytest.raises(OSError, match=re.escape(str(closed))):
            store.write(store.cache_dir() / "configs/sm_90/toy.json", "toy", [entry(8, 64)])
        assert list(store.files()) == []

    @pytest.mark.parametrize("variable", ["TRITUNE_CONFIG_PATH", "TRITUNE_CACHE_DIR", "XDG_CACHE_HOME"])
    @pytest.mark.parametrize("value", ["/proc/self/mem", "/dev/null", 5000 * "x", "relative", "/" + 200 * "x/"])
    def test_any_path(self, folders, monkeypatch, variable, value):
        monkeypatch.delenv("TRITUNE_CACHE_DIR")
        monkeypatch.setenv(variable, value)
        assert resolve.resolve(TUNABLE, Problem(1024), H200).place == "none"
        assert list(store.files()) == []


@pytest.mark.slow
class TestWarnings:
    """They are seen without being asked for, once, and never become exceptions."""

    CODE = """
from types import SimpleNamespace
from tritune.autotune import resolve
from tritune.autotune.config import Config, Estimate, Tunable
from tritune.autotune.device import named
tunable = Tunable("toy", (Config(BLOCK=64),), lambda p: {"size": p}, lambda p, c, d: True,
                  lambda p, c, d: Estimate(1, ""), lambda p, c: [], moved_bytes=lambda p, c: 1.0)
for size in (8, 9, 10):
    resolve.resolve(tunable, size, named("h200"))
"""

    @pytest.mark.parametrize(
        "level, lines",
        [(None, 1), ("warning", 1), ("error", 0), ("nonsense", 1)],
    )
    def test_standard_error(self, folders, level, lines):
        path = file_with(folders, b"{")
        environment = {**os.environ, "TRITUNE_CONFIG_PATH": str(folders / "user")}
        if level:
            environment["TRITUNE_LOG"] = level
        # A word that is not known is a warning of Python's, and counts as unset.
        warnings = "ignore" if level == "nonsense" else "error"
        command = [sys.executable, "-W", warnings, "-c", self.CODE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found = done.stderr.splitlines()
        assert len(found) == lines
        assert not lines or f"ignoring the tuned configs in {path}: " in found[-1]


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
