"""Sparse autoencoders for sequential recommenders: fused kernels, interpretation and steering.

The names below are the public API. ``saerec_fast.reference`` holds the pure PyTorch twin of every op;
``python -m saerec_fast.info`` says which kernels run here and why.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from saerec_fast import reference
from saerec_fast.api import (
    decode_sparse,
    encode_features,
    encode_threshold,
    encode_topk,
    linear_topk,
    pack_weights,
    reconstruct,
    steer,
)
from saerec_fast.sae import (
    ActivationStore,
    SAETrainingConfig,
    SparseAutoencoder,
    evaluate_sae,
    load_sae,
    save_sae,
    train_sae,
)
from saerec_fast.serving import Predictor
from saerec_fast.steering import Calibration, Site, SteeringHandle, attach, calibrate, contrastive_direction, sites
from saerec_fast.types import (
    BatchTopK,
    Direction,
    Edit,
    JumpReLU,
    PackedWeights,
    PlanCost,
    Ragged,
    ReLU,
    SparseFeatures,
    SteeringPlan,
    TopK,
    TopKResult,
)

try:
    __version__ = _version("saerec-fast")
except _PackageNotFoundError:
    __version__ = "unknown"

__all__ = [
    "ActivationStore",
    "BatchTopK",
    "Calibration",
    "Direction",
    "Edit",
    "JumpReLU",
    "PackedWeights",
    "PlanCost",
    "Predictor",
    "Ragged",
    "ReLU",
    "SAETrainingConfig",
    "Site",
    "SparseAutoencoder",
    "SparseFeatures",
    "SteeringHandle",
    "SteeringPlan",
    "TopK",
    "TopKResult",
    "__version__",
    "attach",
    "calibrate",
    "contrastive_direction",
    "decode_sparse",
    "encode_features",
    "encode_threshold",
    "encode_topk",
    "evaluate_sae",
    "linear_topk",
    "load_sae",
    "pack_weights",
    "reconstruct",
    "reference",
    "save_sae",
    "sites",
    "steer",
    "train_sae",
]
