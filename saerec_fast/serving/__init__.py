"""Answering requests: one object that batch engines and servers call."""

from saerec_fast.serving.predictor import Predictor

__all__ = ["Predictor"]
