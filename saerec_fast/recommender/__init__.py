"""The recommender: a causal transformer over item sequences, its training, evaluation and hidden states."""

from saerec_fast.recommender.baselines import ItemKNNRecommender, PopularityRecommender
from saerec_fast.recommender.collect import collect, iterate_hidden
from saerec_fast.recommender.comparison import Comparison, cross_validate
from saerec_fast.recommender.evaluation import (
    Metrics,
    TransformerScorer,
    bootstrap_interval,
    evaluate,
    item_popularity,
    last_hidden,
    pad_histories,
)
from saerec_fast.recommender.model import RecommenderConfig, SequenceRecommender, hidden_of, site_module, sites
from saerec_fast.recommender.training import EpochRecord, train_recommender

__all__ = [
    "Comparison",
    "EpochRecord",
    "ItemKNNRecommender",
    "Metrics",
    "PopularityRecommender",
    "RecommenderConfig",
    "SequenceRecommender",
    "TransformerScorer",
    "bootstrap_interval",
    "collect",
    "cross_validate",
    "evaluate",
    "hidden_of",
    "item_popularity",
    "iterate_hidden",
    "last_hidden",
    "pad_histories",
    "site_module",
    "sites",
    "train_recommender",
]
