"""The benchmarks behind the pages of recipes/results: each module is a command, started from the checkout.

python -m recipes.benchmarks.methods --help
"""

from edgerazor.terminal import limit_spinning

limit_spinning()  # as the command line does; torch reads it when it is imported
