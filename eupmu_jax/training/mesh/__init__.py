"""Runs on a mesh of devices and of many processes."""
