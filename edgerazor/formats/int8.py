"""Eight-bit integers, -128 to 127, one a byte: for matrices that must not change."""

from edgerazor.formats.core.absmax import Absmax

FORMAT = Absmax(bits=8)
