"""What every test needs."""

import asyncio


def pytest_sessionstart() -> None:
    """Tell asyncio that there is no current loop.

    Otherwise pytest-asyncio, asking for the current one before its first test, makes Python 3.11 create a loop that
    nobody closes, and warnings are errors here.
    """
    asyncio.set_event_loop(None)
