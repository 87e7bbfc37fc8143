"""Validators, schemas, autograd, CPU fallback, dispatch and the public functions."""
