"""One process, one tier: which tests a process runs, and the state each of them starts from."""

import contextlib
import importlib.util
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TIERS = ("torch", "interpret", "static", "gpu")
SEED = 20260101

tier_key = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-architectures",
        action="store_true",
        help="tests/test_models.py writes its findings into docs/architectures.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    tier = choose_tier(config)
    config.stash[tier_key] = tier
    # Both are read when triton and tritune are first imported, which must not have happened yet.
    assert not {"triton", "tritune"} & set(sys.modules), "imported before the tier was known"
    cache = tempfile.TemporaryDirectory(prefix="tritune-tests-")
    config.add_cleanup(cache.cleanup)
    clear_environment()
    os.environ["TRITUNE_CACHE_DIR"] = cache.name
    if tier == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("tritune") is None:
        use_checkout()
    with contextlib.suppress(ImportError):
        import hypothesis

        # The same examples in every run: a red test is red again, and no deadline fails on a busy machine.
        hypothesis.settings.register_profile("tritune", derandomize=True, deadline=None)
        hypothesis.settings.load_profile("tritune")


def choose_tier(config: pytest.Config) -> str:
    """The one tier that ``-m`` names, or ``torch``. Whatever else ``-m`` says narrows that tier."""
    expression = config.option.markexpr
    named = [tier for tier in TIERS if re.search(rf"\b{tier}\b", expression)]
    if len(named) > 1:
        raise pytest.UsageError(f"-m {expression!r} names the tiers {', '.join(named)}: run each in its own process")
    tier = named[0] if named else "torch"
    config.option.markexpr = f"{tier} and ({expression})" if expression else tier
    return tier


def clear_environment() -> None:
    """Forget the user's settings: no test may depend on them."""
    for name in [name for name in os.environ if name.startswith("TRITUNE_")]:
        del os.environ[name]
    os.environ.pop("TRITON_INTERPRET", None)


def use_checkout() -> None:
    """Make ``import tritune`` work with nothing installed, here and in the processes that tests start."""
    source = str(Path(__file__).resolve().parents[1] / "src")
    sys.path.insert(0, source)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))


def pytest_report_header(config: pytest.Config) -> str:
    spec = importlib.util.find_spec("tritune")
    return f"tier: {config.stash[tier_key]}, tritune: {spec.origin if spec else 'missing'}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    found = [node for node in report.result if isinstance(node, pytest.Item)]
    untiered = [item.nodeid for item in found if not any(item.get_closest_marker(tier) for tier in TIERS)]
    if untiered:
        # Without a tier a test would never run, and nobody would notice.
        report.outcome = "failed"
        report.longrepr = "\n  ".join([f"no tier marker ({', '.join(TIERS)}) on", *untiered])
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.stash[tier_key] == "gpu":
        import torch

        # A run that is short of time has then seen something of everything; the same order in each process.
        random.Random(SEED).shuffle(items)
        if not torch.cuda.is_available():
            for item in items:
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch.cuda can use"))


@pytest.fixture(scope="session")
def tier(pytestconfig: pytest.Config) -> str:
    return pytestconfig.stash[tier_key]


@pytest.fixture(scope="session")
def device(tier: str) -> str:
    return "cuda" if tier == "gpu" else "cpu"


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed seed and an empty tuned store for every test, whatever ran before it."""
    import torch

    random.seed(SEED)
    torch.manual_seed(SEED)
    monkeypatch.setenv("TRITUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    lookups = sys.modules.get("tritune.autotune.resolve")  # tests of the sources and the archives never import it
    if lookups:
        lookups.clear_memo()


@pytest.fixture(autouse=True)
def only_ours_is_registered() -> Iterator[None]:
    """No test leaves a kernel or a family of its own in the registries, over which other tests of its process walk."""
    yield
    registries = (("autotune.config", "TUNABLES"), ("autotune.workload", "FAMILIES"))
    for module, registry in registries:
        held = getattr(sys.modules.get(f"tritune.{module}"), registry, {})
        left = [name for name, one in held.items() if not defined_in(one).startswith("tritune.")]
        assert not left, f"a test left {', '.join(left)} in {registry}"


def defined_in(one: Any) -> str:
    """The module of a kernel that was declared there, or of a family."""
    launches = getattr(one, "launches", None)
    return getattr(launches, "func", launches).__module__ if launches else one.__name__


@pytest.fixture(autouse=True, scope="session")
def checked_memory(tier: str) -> Iterator[None]:
    """Whatever the interpreter runs has each of its addresses checked."""
    if tier != "interpret" or importlib.util.find_spec("triton") is None:
        yield
        return
    import memory

    with memory.checked():
        yield
