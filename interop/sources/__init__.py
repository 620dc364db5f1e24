"""Models in any form: a run, a folder or file of another library, JAX modules and arrays."""

from interop.sources.opening import open_source
from interop.sources.source import Options, Source

__all__ = ["Options", "Source", "open_source"]
