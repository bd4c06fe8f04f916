"""Value types shared by every layer; they hold no algorithm."""

from saerec_fast.types.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK, inference_threshold
from saerec_fast.types.packed import PackedWeights
from saerec_fast.types.plan import Direction, Edit, PlanCost, SteeringPlan
from saerec_fast.types.ragged import Ragged
from saerec_fast.types.results import SparseFeatures, TopKResult

__all__ = [
    "Activation",
    "BatchTopK",
    "Direction",
    "Edit",
    "JumpReLU",
    "PackedWeights",
    "PlanCost",
    "Ragged",
    "ReLU",
    "SparseFeatures",
    "SteeringPlan",
    "TopK",
    "TopKResult",
    "inference_threshold",
]
