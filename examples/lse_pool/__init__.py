"""A new family from nothing: log-sum-exp pooling. `docs/architecture.md` walks through it; `tests/test_new_family.py`
runs all of it."""
