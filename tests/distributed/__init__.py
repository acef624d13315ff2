"""Tests on several real gloo processes."""
