"""Four-bit integers, -8 to 7: near lossless after training, and what embeddings and heads are stored in. Two a byte."""

from edgerazor.formats.core.absmax import Absmax
from edgerazor.formats.core.least_error import ScaleGrid, geometric

FORMAT = Absmax(bits=4, grid=ScaleGrid(geometric(0.42, 1.16, 15), rms_factor=1.0, absmax=True))
