"""tta: a continual test-time adaptation daemon for deployed vision classifiers.

Importing this package needs numpy, pyzmq and msgspec only; `load_bundle` needs the `serve` extra.
"""

from tta.bundle import load_bundle
from tta.client import AsyncClient, Client
from tta.keys import Credentials

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Credentials", "__version__", "load_bundle"]
