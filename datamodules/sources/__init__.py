"""Image sets: generated phantoms, and folders of images and masks."""

from datamodules.sources.folder import Folder, FolderSource
from datamodules.sources.phantom import PhantomSource
from datamodules.sources.polyps import PolypsSource
from datamodules.sources.source import Sample, Source

__all__ = ["Folder", "FolderSource", "PhantomSource", "PolypsSource", "Sample", "Source"]
