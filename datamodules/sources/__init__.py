"""Image sets: generated phantoms, and folders of images and masks."""

from datamodules.sources.folder import Folder, FolderSource
from datamodules.sources.phantom import PhantomSource
from datamodules.sources.source import Sample, Source, Volume

__all__ = ["Folder", "FolderSource", "PhantomSource", "Sample", "Source", "Volume"]
