"""Entry point of tools that know no pyproject.toml. All metadata is there."""

from setuptools import setup

setup()
