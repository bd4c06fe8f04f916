"""The libraries saerec_fast is measured beside: imported where installed, with the reason where they are not."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

# Name here → distribution, module.
PEERS = {
    "sae_lens": ("sae-lens", "sae_lens"),
    "sparsify": ("eai-sparsify", "sparsify"),
    "dictionary_learning": ("dictionary-learning", "dictionary_learning.trainers.top_k"),
    "faiss": ("faiss-cpu", "faiss"),
    "implicit": ("implicit", "implicit.cpu.topk"),
    "nnsight": ("nnsight", "nnsight"),
    "rectools": ("rectools", "rectools.models.nn.transformers.sasrec"),
}

# Imported by sae_lens (experiment tracking) and dictionary_learning (tracing of language models), used by none of
# their SAEs; stood in for where they are not installed.
STAND_INS = ("wandb", "nnsight")


class PeerUnavailableError(Exception):
    """A peer that cannot be imported here; the message says why."""


def set_environment() -> None:
    """What has to be set before the libraries are loaded."""
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    # The OpenBLAS inside the faiss wheel takes a CPU newer than itself for one of 2004 and multiplies in SSE.
    flags = _cpu_flags()
    if "avx512bw" in flags:
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    elif "avx2" in flags:
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")


@cache
def load(peer: str) -> Any:
    """The package of a peer, the module of it that is needed imported.

    Raises:
        PeerUnavailableError: it cannot be imported.
    """
    for name in STAND_INS:
        if name != peer and name not in sys.modules and importlib.util.find_spec(name) is None:
            stand_in = MagicMock(name=name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = stand_in
    try:
        if isinstance(sys.modules.get(PEERS[peer][1]), MagicMock):
            raise ImportError("not installed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, which pytest would make errors of
            importlib.import_module(PEERS[peer][1])
        return sys.modules[PEERS[peer][1].partition(".")[0]]
    except Exception as error:  # a broken installation raises anything at all
        raise PeerUnavailableError(f"{peer}: {type(error).__name__}: {error}") from error


def versions() -> dict[str, str]:
    """Version of every peer, or why it is missing."""
    return {peer: version_of(peer) for peer in PEERS}


def version_of(peer: str) -> str:
    """Its version, or why it is missing."""
    try:
        load(peer)
        return version(PEERS[peer][0])
    except (PeerUnavailableError, PackageNotFoundError) as error:
        return f"not available: {error}"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
