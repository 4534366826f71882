"""The benchmarks behind the pages of recipes/results: each module is a command, started from the checkout.

python -m recipes.benchmarks.methods --help
"""
