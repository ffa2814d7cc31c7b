"""Ways to fill a synthetic set: one interface, a file each."""

from methods.advdiffuser import AdvDiffuser
from methods.base import Base
from methods.best_of import BestOfN
from methods.cig import CIG
from methods.da_fusion import DAFusion
from methods.diff_pgd import DiffPGD
from methods.diffaug import DiffAug
from methods.gal import GAL
from methods.guidance import AdversarialGuidance
from methods.hat import Hat
from methods.initno import InitNO
from methods.inpainting import Inpainting
from methods.method import Method, Preparation, Request
from methods.mined import Mined
from methods.mixture import Mixture
from methods.p2p import P2P
from methods.sdedit import SDEdit
from methods.seed_scorer import SeedScorer

__all__ = [
    "CIG",
    "GAL",
    "P2P",
    "AdvDiffuser",
    "AdversarialGuidance",
    "Base",
    "BestOfN",
    "DAFusion",
    "DiffAug",
    "DiffPGD",
    "Hat",
    "InitNO",
    "Inpainting",
    "Method",
    "Mined",
    "Mixture",
    "Preparation",
    "Request",
    "SDEdit",
    "SeedScorer",
]
