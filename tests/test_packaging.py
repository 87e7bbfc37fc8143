"""What a user installs: the archives, and the test-suite run against an installed wheel from outside the checkout."""

import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.checkout, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FOLDERS = {package: ROOT / folder for package, folder in SETUPTOOLS["package-dir"].items()}


def run(*command: str | Path, cwd: Path, **options) -> str:
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: a build leaves folders behind, and stale ones would get into the wheel."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    leftovers = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    return shutil.copytree(ROOT, copy, ignore=leftovers)


@pytest.fixture(scope="session")
def archives(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel built from that archive. Without isolation: no network."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=checkout)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def wheel_names(archives: tuple[Path, Path]) -> set[str]:
    with zipfile.ZipFile(archives[1]) as wheel:
        return set(wheel.namelist())


def new_environment(folder: Path) -> Path:
    """An environment that sees what is installed here (torch is too large to install twice), but not this checkout:
    the .pth files of a folder that is itself named by a .pth file are not read, and an editable install is one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    (inside,) = folder.glob("lib/python*/site-packages")
    (inside / "parent.pth").write_text("\n".join(site.getsitepackages()))
    return python


def pip_install(python: Path, *what: str | Path, cwd: Path) -> None:
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=cwd)


@pytest.fixture(scope="session")
def outside(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tests and their settings, and nothing of the package."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(checkout / "tests", folder / "tests")
    shutil.copy(checkout / "pyproject.toml", folder)
    return folder


@pytest.fixture(scope="session")
def wheel_python(archives: tuple[Path, Path], outside: Path) -> Path:
    python = new_environment(outside / "wheel")
    pip_install(python, archives[1], cwd=outside)
    return python


@pytest.fixture
def clean_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes find the package by its installation alone."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


def test_packages_are_the_folders() -> None:
    assert set(SETUPTOOLS["packages"]) == set(FOLDERS)
    on_disk = {path.parent for folder in FOLDERS.values() for path in folder.rglob("__init__.py")}
    assert on_disk == set(FOLDERS.values())
    modules = {path.parent for folder in FOLDERS.values() for path in folder.rglob("*.py")}
    assert modules - on_disk <= {ROOT / "perf/suite"}, (
        "a folder of modules without __init__.py is left out of the wheel"
    )


def test_wheel_holds_the_package_and_nothing_else(wheel_names: set[str]) -> None:
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for pattern in ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        for path in folder.glob(pattern)
    }
    metadata = {name for name in wheel_names if re.match(r"tritune-[^/]+\.dist-info/", name)}
    assert wheel_names - metadata == expected
    assert "tritune/py.typed" in expected
    assert any(re.fullmatch(r"tritune/autotune/configs/[^/]+/[^/]+\.json", name) for name in expected)


def test_wheel_names_the_command_and_the_licence(archives: tuple[Path, Path], wheel_names: set[str]) -> None:
    (entry_points,) = (name for name in wheel_names if name.endswith("entry_points.txt"))
    assert any(name.endswith("/licenses/LICENSE") for name in wheel_names)
    with zipfile.ZipFile(archives[1]) as wheel:
        assert "tritune = tritune.cli:main" in wheel.read(entry_points).decode()


def test_sdist_holds_the_tests(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")} <= names
    assert {"Makefile", "constraints.txt", "docs/environment.md"} <= names


@pytest.mark.usefixtures("clean_path")
def test_command_of_the_wheel(wheel_python: Path, outside: Path) -> None:
    assert "doctor" in run(wheel_python.parent / "tritune", "--help", cwd=outside)
    assert "doctor" in run(wheel_python, "-m", "tritune", "--help", cwd=outside)


@pytest.mark.usefixtures("clean_path")
@pytest.mark.parametrize(
    "named, subset, files",
    [
        # The sources are those of the checkout, so only what could be left behind counts: modules, configs, baselines,
        # and the commands and kernels that read them.
        ("torch", "not slow and not full", ["perf", "store"]),
        pytest.param("torch", "not slow and not full", ["cli", "explain", "replace"], marks=pytest.mark.full),
        pytest.param("interpret", "compat and not slow and not full", ["conv", "pool", "rnn"], marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_suite_passes_against_the_wheel(
    named: str, subset: str, files: list[str], wheel_python: Path, outside: Path
) -> None:
    origin = outside / "tests/test_origin.py"
    origin.write_text(f"""
import pytest
import tritune.autotune, tritune.kernels, tritune.ops, tritune.perf

@pytest.mark.{named}
@pytest.mark.compat
def test_origin():
    for package in (tritune, tritune.autotune, tritune.kernels, tritune.ops, tritune.perf):
        assert package.__file__.startswith({str(wheel_python.parents[1])!r})
    open("test_origin_passed", "w").close()
""")
    proof = outside / "test_origin_passed"
    proof.unlink(missing_ok=True)
    chosen = f"{named} and {subset} and not checkout"
    paths = [origin, *(f"tests/test_{name}.py" for name in files)]
    run(wheel_python, "-m", "pytest", *paths, "-m", chosen, "-x", "-n", "2", "-q", cwd=outside)
    assert proof.exists()


@pytest.mark.usefixtures("clean_path")
def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "editable")
    pip_install(python, "--editable", checkout, cwd=tmp_path)
    (checkout / "ops/_added_later.py").write_text("")
    code = """
import importlib.util
import tritune.ops._added_later
print(tritune.__file__, tritune.ops.__file__, sep="\\n")
assert not [name for name in ("autotune", "kernels", "ops", "perf", "tests") if importlib.util.find_spec(name)]
"""
    expected = [str(checkout / "src/tritune/__init__.py"), str(checkout / "ops/__init__.py")]
    assert run(python, "-c", code, cwd=tmp_path).split() == expected
    (checkout / "ops/_added_later.py").unlink()
