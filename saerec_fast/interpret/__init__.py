"""What the features of a sparse autoencoder mean, and what editing them does.

Figures and reports need the extra ``study`` and are imported from their modules, ``interpret.figures`` and
``interpret.report``.
"""

from saerec_fast.interpret.examples import Example, TopExamples
from saerec_fast.interpret.plans import attribute_plan
from saerec_fast.interpret.statistics import (
    AttributeSummary,
    BestFeatures,
    Estimate,
    FeatureStatistics,
    FeatureStatisticsResult,
    Summary,
    ratio,
)

__all__ = [
    "AttributeSummary",
    "BestFeatures",
    "Estimate",
    "Example",
    "FeatureStatistics",
    "FeatureStatisticsResult",
    "Summary",
    "TopExamples",
    "attribute_plan",
    "ratio",
]
