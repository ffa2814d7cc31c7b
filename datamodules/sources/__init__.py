"""Image sets: generated phantoms, folders of images and masks, polyps, and slices of sets of volumes."""

from datamodules.sources.acdc import ACDCSource, ACDCTest
from datamodules.sources.as_trained import AsTrainedSource
from datamodules.sources.folder import Folder, FolderSource
from datamodules.sources.mmwhs import MMWHSSource, MMWHSTest
from datamodules.sources.phantom import PhantomSource
from datamodules.sources.polyps import PolypsSource
from datamodules.sources.source import Sample, Source, Volume
from datamodules.sources.synapse import SynapseSource, SynapseTest

__all__ = [
    "ACDCSource",
    "ACDCTest",
    "AsTrainedSource",
    "Folder",
    "FolderSource",
    "MMWHSSource",
    "MMWHSTest",
    "PhantomSource",
    "PolypsSource",
    "Sample",
    "Source",
    "SynapseSource",
    "SynapseTest",
    "Volume",
]
