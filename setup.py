"""The repository root is the package ``antiphon``: map every folder with an ``__init__.py`` below it."""

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.build_py import build_py


class BuildPackage(build_py):
    """Leaves this file out of the package that it lies in."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


code = find_packages(exclude=["tests", "tests.*", "build", "build.*"])
data = find_namespace_packages(include=["apps.samples", "apps.web*", "models.weights"])
setup(
    package_dir={"antiphon": "."},
    packages=["antiphon", *(f"antiphon.{name}" for name in (*code, *data))],
    cmdclass={"build_py": BuildPackage},
)
