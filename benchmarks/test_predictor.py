"""Requests per second and latency of the predictor, asked from several threads at once."""

from __future__ import annotations

import threading
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from steering import LENGTH, N_FEATURES, N_ITEMS, Plan, autoencoder, host, sharing_copy
from ways import set_threads

import saerec_fast as sf

CALLERS = (1, 4, 16)
REQUESTS = 128
# Requests a call, and calls from all threads together.
CALLS = {1: 512, 32: 32}


@pytest.mark.parametrize("callers", CALLERS, ids="threads{}".format)
@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
@pytest.mark.parametrize("rows", CALLS, ids="rows{}".format)
def test_predictor(benchmark: Any, rows: int, steered: bool, callers: int) -> None:
    set_threads(1)  # a call runs on its own thread alone
    requests, alone = _requests(steered), _alone(steered)
    predictor = _predictor()
    calls = CALLS[rows]
    batches = [[(call * rows + i) % REQUESTS for i in range(rows)] for call in range(calls)]
    answers: list[Any] = [None] * calls
    latencies = [0.0] * calls

    def ask_from_all() -> None:
        barrier = threading.Barrier(callers)

        def ask(first: int) -> None:
            barrier.wait()
            for call in range(first, calls, callers):
                columns = {name: [column[i] for i in batches[call]] for name, column in requests.items()}
                started = time.perf_counter()
                answers[call] = predictor(columns)
                latencies[call] = time.perf_counter() - started

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    benchmark.group = f"Predictor: {rows} requests a call, {'steered' if steered else 'plain'}"
    benchmark.pedantic(ask_from_all, rounds=1, iterations=1)
    for batch, answer in zip(batches, answers, strict=True):
        for place, request in enumerate(batch):
            assert answer["error"][place] is None
            for name in ("items", "scores"):
                np.testing.assert_array_equal(answer[name][place], alone[request][name][0])
    p50, p99 = np.percentile(latencies, [50, 99])
    benchmark.extra_info.update(
        task="predictor",
        rows=rows,
        steered=steered,
        threads=callers,
        calls=calls,
        requests_per_second=rows * calls / benchmark.stats.stats.median,
        p50=p50,
        p99=p99,
    )
    predictor.close()


@cache
def _alone(steered: bool) -> list[Any]:
    """The answer to every request in a call of its own."""
    requests = _requests(steered)
    with _predictor() as predictor:
        return [predictor({name: column[i : i + 1] for name, column in requests.items()}) for i in range(REQUESTS)]


def _predictor() -> sf.Predictor:
    model = sharing_copy(host("gpt2").recommender).model
    titles = [f"item {i}" for i in range(N_ITEMS)]
    sae = autoencoder("gpt2", "relu")
    return sf.Predictor(model, titles, sae, "h.0", item_embeddings="wte.weight", max_length=LENGTH)


@cache
def _requests(steered: bool) -> dict[str, list[Any]]:
    generator = torch.Generator().manual_seed(3)
    histories = torch.randint(N_ITEMS, (REQUESTS, LENGTH), generator=generator).tolist()
    if not steered:
        return {"history": histories}
    plan = Plan("own")
    return {"history": histories, "edits": [plan.steering(edits) for edits in plan.rows(REQUESTS, N_FEATURES)]}
