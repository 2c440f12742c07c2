"""Tests of the callbacks in a real Trainer."""
