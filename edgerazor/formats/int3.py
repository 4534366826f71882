"""Three-bit integers, -4 to 3: where rounding alone stops being harmless. Eight codes fill three bytes."""

from edgerazor.formats.core.absmax import Absmax
from edgerazor.formats.core.least_error import ScaleGrid, geometric

FORMAT = Absmax(bits=3, grid=ScaleGrid(geometric(0.3, 1.0, 12), rms_factor=2.0, absmax=True))
