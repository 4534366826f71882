"""Two-bit integers with a zero level, -2 to 1: absmax at its coarsest, whose published rule never uses -2."""

from edgerazor.formats.core.absmax import Absmax

FORMAT = Absmax(bits=2, name="int2z")
