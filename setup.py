"""Lists the packages: those below quantizable_flax, and configs/ as one of them."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["quantizable_flax*"]), "quantizable_flax.configs"])
