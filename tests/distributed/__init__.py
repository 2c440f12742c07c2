"""Tests with two processes on the CPU (gloo)."""
