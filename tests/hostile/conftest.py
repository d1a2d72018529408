"""Inputs that Hypothesis tries: the same few in `make test`, thousands of new ones in `make test-slow`."""

import os

from hypothesis import settings

settings.register_profile("few", max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile("thousands", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))
