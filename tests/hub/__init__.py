"""A hub of models for tests: the Hugging Face hub's protocol over real HTTP, with faults that can be set."""

from tests.hub.faults import Fault, Kind
from tests.hub.repository import Repository
from tests.hub.server import Hub, Served, serving

__all__ = ["Fault", "Hub", "Kind", "Repository", "Served", "serving"]
