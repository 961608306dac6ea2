"""``pytest tests/model --hypothesis-profile=long`` tries for hours, the suite for seconds."""

from hypothesis import settings

settings.register_profile("long", max_examples=20_000, stateful_step_count=80)
