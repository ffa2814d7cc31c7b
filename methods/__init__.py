"""Ways to fill a synthetic set: one interface, a file each."""

from methods.base import Base
from methods.method import Method, Preparation, Request
from methods.mined import Mined
from methods.seed_scorer import SeedScorer

__all__ = ["Base", "Method", "Mined", "Preparation", "Request", "SeedScorer"]
