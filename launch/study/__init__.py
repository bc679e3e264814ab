"""The paper's claims, measured on the embedded world: tiny-sd on ShapesWorld, three seeds of everything.

    ./launch/study.sh                    # installs, computes every cell that is not known, writes results/study.md
    python -m launch.study --report      # draws the report from the cells that are known

A cell is one training run or one evaluation; its record, `results/study/cells/NAME.json`, is part of the project, and a
cell whose settings have changed is computed again. What is under way lies in `study/` and goes on after a kill.

On two CPU cores a training step takes 0.15 to 0.2 s and a guided step of the sampler 4 ms a picture. The study is 18
runs of resolution adaptation of 800 steps (5 min each, half of it judging), 24 of alignments (2 min), 9 of reflow and
their 3 sets of 4096 pairs (4 min), 6 tables of solvers (6 min), 18 runs of depth (2.5 min), 9 of colours (4 min): about
five hours, if nothing else runs there.
"""
