"""Packages found by folder, so that a new one cannot be forgotten, plus two that stand beside the package.

conf/ and the shipped model reach a wheel as laddpo/conf and laddpo/data; everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["laddpo", "laddpo.*"]), "laddpo.conf", "laddpo.data"],
    package_dir={"laddpo": "laddpo", "laddpo.conf": "conf", "laddpo.data": "data"},
)
