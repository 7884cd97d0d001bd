"""The test-suite: one folder per source folder, and what they share (lanes, accuracy)."""
