"""The files of a GPU run, written again after each result so that an end at any time loses nothing.

<family>.json              every measurement: {"schema", "suite", "env", "cases": [...]}, one case a line
measured_configs.json      the best configs found: {"schema", "slug", "env", "kernels": {"<kernel>": [entry, ...]},
                           "sweeps": [what came of each sweep, ...]}
gpu_tests.json             tier 4 of the tests
summary.md                 for people
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .families import FAMILIES
from .gpu_tests import in_words
from .providers import PROVIDERS

SCHEMA = 1
FULL_PEERS = ("torch", "torch_channels_last")  # those that compute all that we do
TABLE_ROWS = 48
SAME = ("gpu", "driver", "torch", "triton", "sources", "variables")  # of the runs whose results stand together


class Results:
    """What a run has found so far.

    Args:
        out: folder of the files.
        env: fingerprint of the worker.
        headers: what there is to measure, in order.
    """

    def __init__(self, out: Path, env: dict[str, Any], headers: list[dict[str, Any]]) -> None:
        self.out, self.env, self.headers = out, env, headers
        self.records: list[dict[str, Any]] = []
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.done: set[str] = set()
        self.earlier: list[str] = []
        self.todo = headers
        self.tests: dict[str, Any] | None = None

    def resume(self) -> None:
        """Takes over what an earlier run left in the folder. What failed there is to do again, as is what is new.

        Raises:
            ValueError: those are no results, or of another GPU, or of other versions, sources or settings.
        """
        try:
            for suite in FAMILIES:
                cases = self._earlier(f"{suite}.json").get("cases", [])
                correct = {one["id"] for one in cases if one["provider"] == "tritune" and one["correct"]}
                self.records += [one for one in cases if one["id"] in correct]
                self.done |= correct
            for event in self._earlier("measured_configs.json").get("sweeps", []):
                if not _wrong(event):
                    self.sweeps[event["id"]] = event
                    self.done.add(event["id"])
            self.tests = self._earlier("gpu_tests.json") or None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.out} holds no results: {type(error).__name__} {error}") from None
        self.earlier = sorted(self.done)
        self.todo = [header for header in self.headers if header["id"] not in self.done]

    def _earlier(self, name: str) -> dict[str, Any]:
        """A file of an earlier run; empty if there is no such file."""
        path = self.out / name
        if not path.exists():
            return {}
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} holds no results: {error}") from None
        other = [key for key in SAME if document["env"].get(key) != self.env.get(key)]
        if other:
            raise ValueError(f"{path} is of another {', '.join(other)}: give another folder, or leave out --resume")
        return document

    def add(self, header: dict[str, Any], event: dict[str, Any]) -> None:
        """Takes the worker's event of one item."""
        name = header["id"]
        self.done.add(name)
        if event["event"] == "sweep":
            self.sweeps[name] = {"id": name, **event}
            if wrong := _wrong(event):
                self.failures[name] = "; ".join(wrong)
        elif event["event"] == "case":
            self.records += event["records"]
            ours = event["records"][0]
            if not ours["correct"]:
                err = ours["err"]
                self.failures[name] = f"wrong result: {err['where']}, error {err['error']}, allowed {err['allowed']}"
        else:
            self.fail(header, f"raised {event['error']}")

    def fail(self, header: dict[str, Any], reason: str) -> None:
        self.done.add(header["id"])
        self.failures[header["id"]] = reason
        if not header["id"].startswith("sweep-"):
            self.records.append({**header, "provider": "tritune", "correct": False, "error": reason})

    @property
    def ok(self) -> bool:
        return not self.failures and not (self.tests and (self.tests["failures"] or self.tests_broke()))

    def tests_broke(self) -> bool:
        """Did the test run end in another way than by its end or ours? pytest exits with 5 if it selects nothing."""
        assert self.tests is not None
        return not self.tests["ended"].startswith(("exited with 0", "exited with 5", "out of time", "interrupted"))

    def not_run(self) -> list[str]:
        return [header["id"] for header in self.headers if header["id"] not in self.done]

    # --- files

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for suite in FAMILIES:
            records = [record for record in self.records if record["family"] == suite]
            if records:
                head = json.dumps({"schema": SCHEMA, "suite": suite, "env": self.env})[:-1]
                lines = ",\n".join(json.dumps(record) for record in records)
                self._replace(f"{suite}.json", f'{head}, "cases": [\n{lines}\n]}}\n')
        if self.sweeps:
            self._replace("measured_configs.json", self._configs())
        self._replace("summary.md", self.markdown())

    def to_json(self) -> dict[str, Any]:
        """All of it in one document."""
        return {
            "schema": SCHEMA, "env": self.env, "folder": str(self.out), "cases": self.records,
            "configs": list(self.sweeps.values()), "tests": self.tests, "failures": self.failures,
            "not_run": self.not_run(),
        }  # fmt: skip

    def write_tests(self, tests: dict[str, Any]) -> None:
        self.tests = tests
        self.out.mkdir(parents=True, exist_ok=True)
        self._replace("gpu_tests.json", json.dumps({"schema": SCHEMA, "env": self.env, **tests}, indent=1) + "\n")

    def _configs(self) -> str:
        kernels: dict[str, list[Any]] = {}
        for event in self.sweeps.values():
            if event["entry"]:
                kernels.setdefault(event["kernel"], []).append(event["entry"])
        head = json.dumps({"schema": SCHEMA, "slug": self.env["slug"], "env": self.env})[:-1]
        parts = (
            f"{json.dumps(kernel)}: [\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]"
            for kernel, entries in sorted(kernels.items())
        )
        sweeps = ",\n".join(json.dumps(event) for event in self.sweeps.values())
        return f'{head}, "kernels": {{\n' + ",\n".join(parts) + f'\n}}, "sweeps": [\n{sweeps}\n]}}\n'

    def _replace(self, name: str, text: str) -> None:
        draft = self.out / f"{name}.draft"
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self.out / name)

    # --- tables

    def rows(self) -> list[list[str]]:
        """One row a case, as the heads of the tables say."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for record in self.records:
            found.setdefault(record["id"], {})[record["provider"]] = record
        return [_row(providers) for providers in found.values()]

    def table(self) -> str:
        rows = self.rows()
        head = ["op", "shape", "dtype", "direction", "ours us", "torch us", "faster", "floor", "correct"]
        shown = [head, *rows[:TABLE_ROWS]]
        widths = [max(len(row[i]) for row in shown) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
        ]
        if len(rows) > TABLE_ROWS:
            lines.append(f"... {len(rows) - TABLE_ROWS} more in summary.md")
        failures = [f"FAILED {name}: {why[:150]}" for name, why in list(self.failures.items())[:6]]
        if len(self.failures) > len(failures):
            failures.append(f"... {len(self.failures) - len(failures)} more failures in summary.md")
        return "\n".join([*lines, *failures, in_words(self.tests), self.counts()])

    def counts(self) -> str:
        left = self.not_run()
        return f"{len(self.headers) - len(left)} of {len(self.headers)} items measured" + (
            f", {len(left)} not run" if left else ""
        )

    def markdown(self) -> str:
        env = self.env
        head = ["op", "shape", "dtype", "direction", "ours µs", "torch µs", "faster", "% of floor", "correct"]
        parts = [
            f"# {env['gpu'] or 'Rehearsal on the CPU: the times mean nothing'}",
            f"{env['date']}, torch {env['torch']}, Triton {env['triton']}, driver {env.get('driver')}, "
            f"commit {env['commit']}{' with changes' if env['dirty'] else ''}, sources {env['sources']}.",
            "torch µs is the faster of the two peers that compute the same:",
            "\n".join(f"- `{name}`: {meaning}" for name, meaning in PROVIDERS.items()),
            _markdown_table(head, self.rows()),
            in_words(self.tests) + ".",
        ]
        if self.failures:
            parts += ["## Failures", "\n".join(f"- `{name}`: {why}" for name, why in self.failures.items())]
        if self.tests and self.tests["failures"]:
            failed = (f"- `{one['test']}`: {one['message']}" for one in self.tests["failures"])
            parts += ["## Failed tests", "\n".join(failed)]
        if self.sweeps:
            parts += ["## Configs", self._sweep_table()]
        if self.not_run():
            parts += ["## Not run", "\n".join(f"- `{name}`" for name in self.not_run())]
        return "\n\n".join(parts) + "\n"

    def _sweep_table(self) -> str:
        rows = []
        for name, event in self.sweeps.items():
            entry = event["entry"] or {}
            config = " ".join(f"{key}={value}" for key, value in entry.get("config", {}).items())
            times = [_us(entry.get(key)) for key in ("default_us", "us", "torch_us")]
            rows.append([name.removeprefix("sweep-"), event["kernel"], *times, config])
        return _markdown_table(["case", "kernel", "model's choice µs", "best µs", "torch µs", "best config"], rows)


def _wrong(event: dict[str, Any]) -> list[str]:
    """The configs of a sweep that gave a wrong result."""
    return [f"{config}: {why}" for config, why in event["failed"].items() if why.startswith("wrong")]


def _row(providers: dict[str, dict[str, Any]]) -> list[str]:
    ours = providers["tritune"]
    times = {name: record["device_us"]["p50"] for name, record in providers.items() if "device_us" in record}
    own_us = times.get("tritune")
    torch_us = min((times[name] for name in FULL_PEERS if name in times), default=None)
    faster = f"{torch_us / own_us:.2f}x" if own_us and torch_us else "-"
    floor = f"{ours['pct_limit']:.0f}%" if own_us else "-"
    verdict = "yes" if ours["correct"] and own_us else "NO" if not ours["correct"] else "not timed"
    return [
        ours["op"], ours["shape"], ours["dtype"] + (" nchw" if ours["layout"] == "nchw" else ""), ours["direction"],
        _us(own_us), _us(torch_us), faster, floor, verdict,
    ]  # fmt: skip


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
