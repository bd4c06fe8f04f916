"""Steering plans inside a model's forward pass."""

from saerec_fast.steering.attach import SteeringHandle, attach
from saerec_fast.steering.calibration import Calibration, calibrate
from saerec_fast.steering.directions import contrastive_direction
from saerec_fast.steering.sites import Site, sites

__all__ = ["Calibration", "Site", "SteeringHandle", "attach", "calibrate", "contrastive_direction", "sites"]
