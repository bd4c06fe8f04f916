"""Steering plans inside a model's forward pass."""

from saerec_fast.steering.attach import SteeringHandle, attach

__all__ = ["SteeringHandle", "attach"]
