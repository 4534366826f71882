"""Four-bit integers, -8 to 7: near lossless after training, and what embeddings and heads are stored in. Two a byte."""

from edgerazor.formats.core.absmax import Absmax

FORMAT = Absmax(bits=4)
