"""Searches over strengths and thresholds: runs of copies."""
