"""Decoder-only language models: parameters, forward pass, decoding, layout over devices, costs."""
