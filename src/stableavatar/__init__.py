"""From one portrait and a recording to a talking video of any length."""

__version__ = "0.1.0"
