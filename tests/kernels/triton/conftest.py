"""What is in interpreted/ needs TRITON_INTERPRET=1 before anything imports triton; test_interpreter.py starts it so."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["interpreted/*"]
