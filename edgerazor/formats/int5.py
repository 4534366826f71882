"""Five-bit integers, -16 to 15: for what four bits would still hurt. Eight codes fill five bytes."""

from edgerazor.formats.core.absmax import Absmax

FORMAT = Absmax(bits=5)
