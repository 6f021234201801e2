"""`make demo`: from nothing to a chat answer over two runners."""
