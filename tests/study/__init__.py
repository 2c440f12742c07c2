"""Tests of the study, an example of its own size: examples/study/."""
