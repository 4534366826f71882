"""Two-bit integers with a zero level, -1 to 1: absmax at its coarsest. One of the four codes is never used."""

from edgerazor.formats._absmax import Absmax

FORMAT = Absmax(bits=2, name="int2z")
