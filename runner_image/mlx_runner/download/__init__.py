"""The download: a child process that makes a model's files present and verified, and says what it found."""
