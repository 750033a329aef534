"""The repository root is the package ``antiphon``: map every folder with an ``__init__.py`` below it."""

from setuptools import find_packages, setup

folders = find_packages(exclude=["tests", "tests.*", "build", "build.*"])
setup(
    package_dir={"antiphon": "."},
    packages=["antiphon", *(f"antiphon.{name}" for name in folders)],
)
