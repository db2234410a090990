"""Runs the fuzzer, with libFuzzer's own arguments."""

import sys

import atheris
import torch

with atheris.instrument_imports(include=["common"]):
    from fuzz import wire

torch.set_num_threads(1)
atheris.Setup(sys.argv, wire.only_wire_errors)
atheris.Fuzz()
