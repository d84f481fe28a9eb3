"""Flax Linen modules and the door to them, `bind`."""

from dmrl.models import heads, unmasking
from dmrl.models.bind import bind
from dmrl.models.llada import Config, init

__all__ = ["Config", "bind", "heads", "init", "unmasking"]
