"""Five-bit integers, -16 to 15: for what four bits would still hurt. Eight codes fill five bytes."""

from edgerazor.formats.core.absmax import Absmax
from edgerazor.formats.core.least_error import ScaleGrid, geometric

FORMAT = Absmax(bits=5, grid=ScaleGrid(geometric(0.64, 1.2, 22), rms_factor=0.5, absmax=True))
