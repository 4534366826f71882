"""Three-bit integers, -4 to 3: where rounding alone stops being harmless. Eight codes fill three bytes."""

from edgerazor.formats.core.absmax import Absmax

FORMAT = Absmax(bits=3)
