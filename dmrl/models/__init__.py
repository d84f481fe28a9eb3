"""Flax Linen modules and the door to them, `bind`."""

from dmrl.models import heads, unmasking
from dmrl.models.bind import bind
from dmrl.models.config import Config
from dmrl.models.llada import in_compute_type, init

__all__ = ["Config", "bind", "heads", "in_compute_type", "init", "unmasking"]
