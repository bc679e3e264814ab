"""The paper's claims, measured on the embedded world: tiny-sd on ShapesWorld, three seeds of everything.

    ./launch/study.sh                    # installs, computes every cell that is not known, writes results/study.md
    python -m launch.study --report      # draws the report from the cells that are known

A cell is one training run or one evaluation; its record, `results/study/cells/NAME.json`, is part of the project, and a
cell whose settings have changed is computed again. What is under way lies in `study/` and goes on after a kill.
"""
