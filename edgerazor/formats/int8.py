"""Eight-bit integers, -128 to 127, one a byte: for matrices that must not change."""

from edgerazor.formats.core.absmax import Absmax
from edgerazor.formats.core.least_error import ScaleGrid, geometric

FORMAT = Absmax(bits=8, grid=ScaleGrid(geometric(0.97, 1.2, 52), rms_factor=0.1, absmax=True))
