"""A dictionary in the model that it was made for: what it reads there, and what happens if its reconstruction takes its place."""

from saekit.splice.attach import attach
from saekit.splice.attached import Attached
from saekit.splice.capture import capture

__all__ = ["Attached", "attach", "capture"]
