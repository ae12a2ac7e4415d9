"Print, for each stage, the modules that dvc.yaml must declare (after an import has changed)"

from test_graph import STAGES, body, files

for stage in STAGES:
    declared = {d for d in body(stage.stem)["deps"] if d.startswith("asap/")}
    if declared != files(stage):
        print(stage.stem, "deps:", ", ".join(sorted(files(stage))))
