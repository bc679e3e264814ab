"""The paper's claims, measured on the embedded world: tiny-sd on ShapesWorld, three seeds of everything.

    ./launch/study.sh                    # installs, computes every cell that is not known, writes results/study.md
    python -m launch.study --report      # draws the report from the cells that are known

A cell is one training run or one evaluation; its record, `results/study/cells/NAME.json`, is part of the project, and a
cell whose settings have changed is computed again. What is under way lies in `study/` and goes on after a kill.

The study is 18 runs of resolution adaptation of 800 steps, 24 of alignments of 200, 9 of reflow of 200 and 3 of 800
with their 3 sets of 2048 pairs, 6 tables of solvers, 18 runs of depth of 400 steps, 9 of colours of 200, looks at the
prior before any training, and what a step costs; results/study.md ends with the hours that it took.
"""
