"""Would the tests see a fault in a kernel? One is planted at a time, in a copy of the sources, and its tests are run.

    python tests/mutants.py                  three faults in each file of device code, the short interpreted suite
    python tests/mutants.py -k pool -n 10    ten in each file with pool in its name
    python tests/mutants.py --full           what survives runs against the full suite, too

A fault is one change of one expression of a `@triton.jit` function: a comparison, an operator, a mask without one of
its conditions, a branch taken the other way, a sum that is not added, another value in place of what is masked. Which
ones are drawn depends on the source and the seed alone. Some change nothing that can be seen (an index that is masked
anyway); those are for a person to judge, so survivors are printed with their line.

Exit status: 0; 1 with --full, if the full suite kills a mutant that the short one lets live.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("autotune", "kernels", "ops", "perf", "src", "tests", "examples", "docs", "pyproject.toml")
# Beside the tests of a family these walk over all kernels.
COMMON = ("test_memory.py", "test_traffic.py", "test_extremes.py", "test_fuzz.py")
SECONDS = 900  # after which a mutant counts as killed: something waits for ever


class Mutant(NamedTuple):
    """One change: the text between two places of a file is replaced."""

    file: str
    line: int
    begin: int
    end: int
    text: str
    was: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.was}  ->  {self.text}"


def mutants(file: Path) -> list[Mutant]:
    """Every change that is known for the device code of a file."""
    source = file.read_text(encoding="utf-8")
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()
    found = []
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or "triton.jit" not in map(_name, function.decorator_list):
            continue
        for statement in function.body:
            for node in ast.walk(statement):
                for changed in _changes(node):
                    begin = starts[node.lineno - 1] + node.col_offset
                    end = starts[node.end_lineno - 1] + node.end_col_offset
                    was = " ".join(data[begin:end].decode().split())
                    found.append(Mutant(file.name, node.lineno, begin, end, ast.unparse(changed), was))
    return found


def _name(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mod, ast.BitOr: ast.BitAnd}
CALLS = {"tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum", "tl.max": "tl.min", "tl.sqrt_rn": "tl.abs"}


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in COMPARISONS:
        new.ops[0] = COMPARISONS[type(new.ops[0])]()
        yield new
    elif isinstance(new, ast.BinOp) and type(new.op) in OPERATORS:
        new.op = OPERATORS[type(new.op)]()
        yield new
    elif isinstance(new, ast.BinOp) and isinstance(new.op, ast.BitAnd):
        yield new.left
        yield new.right
    elif isinstance(new, ast.BinOp) and isinstance(new.op, ast.Mult):
        yield new.left
    elif isinstance(new, ast.AugAssign):
        yield ast.Pass()
    elif isinstance(new, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
        yield new
    elif isinstance(new, ast.Call) and ast.unparse(new.func) in CALLS:
        new.func = ast.parse(CALLS[ast.unparse(new.func)], mode="eval").body
        yield new
    elif isinstance(new, ast.Call) and ast.unparse(new.func) == "tl.where":
        new.args[1], new.args[2] = new.args[2], new.args[1]
        yield new
    elif isinstance(new, ast.Call) and ast.unparse(new.func) == "tl.load":
        for keyword in new.keywords:
            if keyword.arg == "other":
                keyword.value = ast.Constant(7.0)
                yield new


def drawn(count: int, pattern: str, seed: int) -> list[Mutant]:
    """So many of each file of device code."""
    chosen = []
    for file in sorted((ROOT / "kernels").glob("*.py")):
        if pattern in file.name:
            known = mutants(file)
            chosen += random.Random(f"{seed} {file.name}").sample(known, min(count, len(known)))
    return chosen


def tests_of(mutant: Mutant) -> list[str]:
    """Those of the family first; of what families share, those of all."""
    names = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    words = mutant.file.removesuffix(".py").split("_")
    for length in range(len(words), 0, -1):
        own = [name for name in names if name.startswith("_".join(["test", *words[:length]])) and "errors" not in name]
        if own and words[0]:
            return [*own, *COMMON]
    return ["test_conv.py", "test_pool.py", "test_attention.py", "test_rnn.py", *COMMON]


def is_killed(mutant: Mutant, full: bool) -> bool:
    """Do the interpreted tests fail with it?"""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder)
        path = Path(folder, "kernels", mutant.file)
        data = path.read_bytes()
        path.write_bytes(data[: mutant.begin] + mutant.text.encode() + data[mutant.end :])
        tier = "interpret" if full else "interpret and not full"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", tier, "-p", "no:cacheprovider"]
        env = {**os.environ, "PYTHONPATH": str(Path(folder, "src")), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [*command, *(f"tests/{name}" for name in tests_of(mutant))], cwd=folder, env=env, check=False,
                capture_output=True, timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return True
        if done.returncode not in (0, 1, 2):
            raise RuntimeError(done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:])
        return done.returncode != 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-k", dest="pattern", default="", help="only files with this in their name")
    parser.add_argument("-n", dest="count", type=int, default=3, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="what survives the short suite runs against the full one")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(argv)
    chosen = drawn(args.count, args.pattern, args.seed)
    survivors, missed = [], []
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, killed in zip(chosen, pool.map(lambda one: is_killed(one, False), chosen), strict=True):
            print(f"{'killed' if killed else 'SURVIVED':8} {mutant}", flush=True)
            if not killed:
                survivors.append(mutant)
        if args.full:
            again = pool.map(lambda one: is_killed(one, True), survivors)
            missed = [one for one, killed in zip(survivors, again, strict=True) if killed]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed by the short suite")
    for mutant in missed:
        print(f"killed by the full suite only: {mutant}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
