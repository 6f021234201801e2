"""The API server that the chaos tests share: one after the other, or side by side in namespaces of their own."""

from tests.apiserver.conftest import api_server

__all__ = ["api_server"]
