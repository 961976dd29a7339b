"""Inference: prefill, decode, sampling."""
