"Copies the shipped checkpoint, its text encoder and the params into the wheel"

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# read by `asap.core.resource_path`
SHIPPED = ("params.yaml", "weights/asap", "weights/organs", "weights/text")


class BuildWithWeights(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return  # the project itself is there
        target = Path(self.build_lib) / "asap/shipped"
        shutil.rmtree(target, ignore_errors=True)
        for name in SHIPPED:
            source = Path(__file__).parent / name
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if not source.exists():
                continue
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, target / name)


setup(cmdclass={"build_py": BuildWithWeights})
