"""Steering plans inside a model's forward pass."""

from saerec_fast.steering.attach import SteeringHandle, attach
from saerec_fast.steering.calibration import Calibration, calibrate
from saerec_fast.steering.directions import contrastive_direction

__all__ = ["Calibration", "SteeringHandle", "attach", "calibrate", "contrastive_direction"]
