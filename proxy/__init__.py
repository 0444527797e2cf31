"""Penstock: an observability-first LLM gateway."""
