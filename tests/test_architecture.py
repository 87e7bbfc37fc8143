"""The rules that hold the folders together, checked on the sources without importing them."""

import ast
import re
import subprocess
import tempfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.checkout]

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {  # subpackage -> folder; a package imports only what stands above it in this list
    "tritune.autotune": "autotune",
    "tritune.kernels": "kernels",
    "tritune.ops": "ops",
    "tritune": "src/tritune",
    "tritune.perf": "perf",
}
FLOORS = list(FOLDERS)
ON_TOP = re.compile(r"tritune\.(cli|commands|__main__)\b")  # the command stands on all floors


class Import(NamedTuple):
    target: str
    level: int  # leading dots; 0 is absolute
    when: str  # "load", "call" (inside a function) or "check" (under TYPE_CHECKING)


def read_modules(root: Path) -> dict[str, str]:
    """Module name -> source, for every module of the package."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder).with_suffix("").parts
            if inner[0] == "suite":  # benchmarks for pytest: files of the checkout, not modules of the package
                continue
            name = ".".join([package, *inner])
            modules[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return modules


def imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    package = module if is_package else module.rpartition(".")[0]

    def walk(node: ast.AST, when: str) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, 0, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*parent, base]))
            # What follows `import` may be a module of its own: the caller knows.
            yield from (Import(f"{base}.{alias.name}", node.level, when) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, "check")
            for child in node.orelse:
                yield from walk(child, when)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, "call" if inside and when == "load" else when)

    yield from walk(ast.parse(source), "load")


def floor(module: str) -> int:
    if module == "tritune._version":  # imports nothing
        return 0
    package = max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len)
    return FLOORS.index(package)


def problems(modules: dict[str, str]) -> list[str]:
    """Every breach of the import rules, one line each."""
    found = []
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        is_package = any(name.startswith(f"{module}.") for name in modules)
        graph[module] = set()
        for target, level, when in imports(source, module, is_package):
            if target.partition(".")[0] == "triton" and when == "load" and floor(module) != floor("tritune.kernels"):
                found.append(f"{module} imports triton at module level: only kernels/ may")
            if target.partition(".")[0] != "tritune":
                continue
            if level == 0:
                found.append(f"{module} imports {target} by its full name: a copy under another name would load both")
            imported = target if target in modules else target.rpartition(".")[0]
            if imported not in modules or imported == module:
                found.append(f"{module} imports {target}, which does not exist")
                continue
            if when == "load":
                graph[module].add(imported)
            if floor(imported) > floor(module) and not ON_TOP.match(module):
                found.append(f"{module} imports {imported}, which is a floor above it")
            is_kernel = floor(imported) == floor("tritune.kernels")
            if when == "load" and is_kernel and floor(module) in (floor("tritune.ops"), floor("tritune")):
                found.append(f"{module} imports {imported} at module level: without triton it could not be loaded")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("import cycle: " + " -> ".join(reversed(error.args[1])))
    return found


def test_imports_go_down() -> None:
    assert problems(read_modules(ROOT)) == []


@pytest.mark.parametrize(
    "module, line, problem",
    [
        ("tritune.autotune.store", "from ..ops import conv", "a floor above"),
        ("tritune.autotune.store", "def f():\n    from .. import nn", "a floor above"),
        ("tritune.nn", "from .perf import families", "a floor above"),
        ("tritune.ops.conv", "from tritune.autotune import store", "full name"),
        ("tritune.ops.conv", "import triton.language as tl", "triton at module level"),
        ("tritune.perf.families", "from triton import jit", "triton at module level"),
        ("tritune.ops.conv", "if x:\n    from ..kernels.conv import launch", "could not be loaded"),
        ("tritune.ops.conv", "from ..autotune.gone import x", "does not exist"),
        ("tritune.autotune.store", "from . import device", "cycle: "),
        ("tritune.autotune.store", "from ..perf import families", "a floor above"),
    ],
)
def test_a_breach_is_found(module: str, line: str, problem: str) -> None:
    names = ["autotune.device", "autotune.store", "kernels.conv", "ops.conv", "perf.families", "nn"]
    packages = ["tritune", "tritune.autotune", "tritune.kernels", "tritune.ops", "tritune.perf"]
    modules = dict.fromkeys([*packages, *(f"tritune.{name}" for name in names)], "")
    modules["tritune.kernels.conv"] = "import triton\nfrom ..autotune import device"
    modules["tritune.autotune.device"] = "from .store import x"
    modules["tritune.nn"] = "from .ops.conv import conv2d\nif TYPE_CHECKING:\n    import triton"
    modules["tritune.ops.conv"] = "def f():\n    import triton\n    from ..kernels import conv"
    assert problems(modules) == []

    modules[module] += f"\n{line}"
    assert len(problems(modules)) == 1
    assert problem in problems(modules)[0]


def strings_of_code(source: str) -> set[str]:
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_the_tuner_knows_no_family() -> None:
    """Families register themselves; a name of one, or of a kernel, in the tuner would be a lookup by family again."""
    modules = read_modules(ROOT)
    families = {module.rpartition(".")[2] for module in modules if module.startswith("tritune.perf.")} & {
        module.rpartition(".")[2] for module in modules if module.startswith("tritune.kernels.")
    }
    assert {"conv", "conv_pool", "pool", "rnn", "attention"} == families
    kernels = set(re.findall(r"register\(\s*Tunable\(\s*\"(\w+)\"", "\n".join(modules.values())))
    assert {"conv", "pool_backward", "attention_bias_grad"} < kernels, "the registered kernels are found"
    found = {
        f"{module}: {word}"
        for module, source in modules.items()
        if module.startswith("tritune.autotune")
        for word in strings_of_code(source) & (families | kernels)
    }
    assert found == set()


FAMILIES = ("conv", "conv_pool", "pool", "rnn", "attention")


def family_of(module: str) -> str:
    """The family that a module belongs to by its name: that of ``tritune.kernels.pool_space`` is pool."""
    word = module.rpartition(".")[2]
    return next((one for one in sorted(FAMILIES, key=len, reverse=True) if f"{word}_".startswith(f"{one}_")), "")


def test_adding_a_family_touches_few_files() -> None:
    """Beside its own files, and those of families that build on it, what imports a family's modules is where families
    are listed: one line each."""
    modules = read_modules(ROOT)
    importers = set()
    for module, source in modules.items():
        is_package = any(name.startswith(f"{module}.") for name in modules)
        for target, _, _ in imports(source, module, is_package):
            imported = target if target in modules else target.rpartition(".")[0]
            if family_of(imported) and not family_of(module):
                importers.add(module)
    # In the last three the import is of functions, which have the names of modules.
    assert importers <= {
        "tritune.ops", "tritune.nn", "tritune.perf.families", "tritune", "tritune.explain_command",
        "tritune.huggingface",
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["kernels", "ops"])
def test_files_of_one_sitting(folder: str) -> None:
    longest = max((len(path.read_text().splitlines()), path.name) for path in (ROOT / folder).glob("*.py"))
    assert longest[0] <= 900, f"{longest[1]}: split it by what it holds (docs/decisions.md, Files of one sitting)"


def test_environment_variables_are_documented() -> None:
    pattern = re.compile(r"\bTRITUNE_[A-Z]\w*")
    strings = set[str]().union(*map(strings_of_code, read_modules(ROOT).values()))
    in_code = {name for string in strings for name in pattern.findall(string)}
    table = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(TRITUNE_\w+)`", table, flags=re.MULTILINE)
    assert sorted(documented) == sorted(in_code)


def test_no_removed_triton_api() -> None:
    removed = {"make_block_ptr", "advance"}  # block pointers end with Triton 3.9
    used = {
        f"{module}: {node.attr}"
        for module, source in read_modules(ROOT).items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in removed
    }
    assert used == set()


def test_no_path_of_a_machine() -> None:
    """A path of the author's computer in a result, a log or a document helps nobody and gives away who ran it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    own = {str(ROOT), str(Path.home()), tempfile.gettempdir()} - {"/"}
    usual = [r"/(?:home|Users|mnt|media)/\w"]
    pattern = re.compile("|".join([*(rf"(?<![\w.~)]){re.escape(path)}(?!\w)" for path in own), *usual]))
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or path.samefile(__file__):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{name}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []
