"""Exchanges: rows to the devices that hold their experts, and back. One file each."""
