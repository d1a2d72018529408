"""Supervised fine-tuning, which has no section of its own: what its recipes must say."""

from __future__ import annotations

from maxllm.config.rules import Rules, needs_policy

RULES = Rules(check=needs_policy, replies=True, next_token=True)
