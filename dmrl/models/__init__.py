"""Flax Linen modules and the door to them, `bind`."""

from dmrl.models import heads, unmasking
from dmrl.models.bind import bind
from dmrl.models.config import Config
from dmrl.models.llada import init

__all__ = ["Config", "bind", "heads", "init", "unmasking"]
