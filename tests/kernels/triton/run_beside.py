"""Runs the commands of stdin, a json list, and writes what became of the i-th to FOLDER/i.json.

python run_beside.py FOLDER AT_ONCE
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def run(number: int, command: list[str]) -> None:
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    part = folder / f"{number}.part"
    part.write_text(json.dumps({"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}))
    part.replace(folder / f"{number}.json")  # whoever waits for it finds it whole


folder, at_once = Path(sys.argv[1]), int(sys.argv[2])
os.nice(10)  # what runs in front is waited for
with ThreadPoolExecutor(at_once) as pool:
    for future in [pool.submit(run, number, command) for number, command in enumerate(json.load(sys.stdin))]:
        future.result()
