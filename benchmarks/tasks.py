"""What is measured: for every task its ways, inputs, and how a way is checked against float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from steering import SteeringCase, steering_truth
from torch import Tensor
from torch.testing import assert_close
from ways import CATALOGUE, RELU, STEP_RELU, STEP_TOPK, TOPK, Step, Way, set_threads
from workloads import (
    CatalogueCase,
    SaeCase,
    catalogue_inputs,
    catalogue_truth,
    gradient_truth,
    reconstruction_truth,
    sae_inputs,
)

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Task:
    """A table of the report.

    Attributes:
        title: of the table.
        ways: by name.
        inputs: of a case; ``x`` of them is what a way is called with.
        check: raises where a way is wrong.
        training: whether gradients are computed.
    """

    title: str
    ways: dict[str, Way]
    inputs: Callable[[Any], Any]
    check: Callable[[Any, Any, Tensor], None]
    training: bool = False

    def prepare(self, case: Any, way: str, threads: int) -> tuple[Callable[[Tensor], Any], Tensor]:
        """A way, built, and what to call it with.

        Raises:
            peers.PeerUnavailableError: the way's library cannot be imported.
        """
        inputs = self.inputs(case)
        call = self.ways[way].build(inputs, case.k)
        # After the way is built: only then is its library loaded.
        set_threads(threads)
        return call, inputs.x


def check_reconstruction(case: SaeCase, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    rows, truth = reconstruction_truth(case)
    _assert_near(call(x)[rows], truth)


def check_gradients(case: SaeCase, call: Step, x: Tensor) -> None:
    rows, loss, gradients = gradient_truth(case)
    _assert_near(call(rows), loss)
    for gradient, truth in zip(call.gradients(), gradients, strict=True):
        _assert_near(gradient, truth)


def check_catalogue(case: CatalogueCase, call: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> None:
    scores, truth = catalogue_truth(case)
    values, ids = (found[: len(truth)] for found in call(x))
    _assert_near(values, truth)
    # The scores of the ids, rather than the ids: two items may score the same. Seen ones score minus infinity.
    _assert_near(scores.gather(1, ids.long()), truth)
    assert all(len(set(row)) == case.k for row in ids.tolist()), "an item was recommended twice"


def check_recommendations(case: SteeringCase, call: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Compare what a steered recommender recommends with the float64 reference; the tokens to time it with."""
    expected = steering_truth(case)
    values, ids = (found[: expected.checked] for found in call(expected.tokens))
    best = expected.scores.topk(values.shape[1]).values
    # That the plan shows in the recommendations, or the comparison would compare nothing.
    changed = (expected.scores - expected.plain).abs().amax()
    assert changed > 10 * TOLERANCE * float(best.abs().max()), "the plan changes nothing"
    _assert_near(values, best)
    _assert_near(expected.scores.gather(1, ids), best)
    return expected.tokens


TASKS = {
    "topk": Task("Encode + decode, top-k", TOPK, sae_inputs, check_reconstruction),
    "relu": Task("Encode + decode, ReLU", RELU, sae_inputs, check_reconstruction),
    "step_topk": Task("Training step, top-k", STEP_TOPK, sae_inputs, check_gradients, training=True),
    "step_relu": Task("Training step, ReLU + L1", STEP_RELU, sae_inputs, check_gradients, training=True),
    "catalogue": Task("Catalogue scoring, seen items left out", CATALOGUE, catalogue_inputs, check_catalogue),
}


def _assert_near(actual: Tensor, truth: Tensor) -> None:
    assert_close(actual.detach().double(), truth, rtol=TOLERANCE, atol=TOLERANCE * float(truth.abs().max()))


def grad_mode(task: Task) -> Any:
    """The context a task's ways are called in."""
    return torch.enable_grad() if task.training else torch.inference_mode()
