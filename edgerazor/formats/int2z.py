"""Two-bit integers with a zero level, -2 to 1: absmax at its coarsest, whose published rule never uses -2."""

from edgerazor.formats.core.absmax import Absmax
from edgerazor.formats.core.least_error import ScaleGrid, geometric

FORMAT = Absmax(bits=2, grid=ScaleGrid(geometric(0.85, 1.8, 6), rms_factor=1.0, absmax=False), name="int2z")
